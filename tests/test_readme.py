"""The commands of the README, run as they stand there; only the training is made short."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from full_stack_transformer.__main__ import COMMANDS, _make_app, _normalize
from full_stack_transformer.tokenization.document_tokenizer import load_tokenizer
from tests.conftest import SHARED_DATA, RunFst
from tests.logged_process import running_service

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [page.read_text(encoding="utf-8") for page in sorted((REPOSITORY / "docs").glob("*.md"))]


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _commands(text: str = README) -> Iterator[list[str]]:
    """Words of every command line in the sh blocks."""
    for block in _blocks("sh", text):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


def _command(name: str) -> list[str]:
    return next(words[1:] for words in _commands() if words[:2] == ["fst", name])


def test_every_command_line_is_valid() -> None:
    """Of the README and the pages of docs; parsed by the real command line, without running it."""
    names = {name for name, _, _ in COMMANDS}
    seen = set()
    for words in (words for text in (README, *PAGES) for words in _commands(text)):
        words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if words[0] == "python" and "/scripts/" in words[1]:
            assert (REPOSITORY / words[1]).is_file()
            words = ["fst", Path(words[1]).stem, *words[2:]]
        if words[0] != "fst":
            assert words[0] in ("make", "curl")
            continue
        assert words[1] in names
        seen.add(words[1])
        words = [word for word in words if word != "--show_all_args"]
        _make_app().parse_args(_normalize(words[1:]), exit_on_error=False, print_error=False)
    assert seen == names - {"demo"}


def test_the_two_commands_stand_within_sixty_words() -> None:
    before = README[: README.index("make test")]
    assert len(before.split()) <= 60


@pytest.fixture(scope="module")
def road(run_fst: RunFst, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the tour was walked, up to the training."""
    directory = tmp_path_factory.mktemp("readme")
    for name in ("collect_documents", "prepare_dataset", "train"):
        words = _command(name)
        if name == "train":
            words[words.index("--max_minutes") + 1] = "0.05"
        done = run_fst(*words, cwd=directory)
        assert done.returncode == 0, done.stderr
    return directory


def test_the_tour_prints_figures_and_texts(road: Path, run_fst: RunFst) -> None:
    for name in ("evaluate", "generate"):
        done = run_fst(*_command(name), cwd=road)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_the_python_lines_generate(road: Path) -> None:
    [block] = [block for block in _blocks("python") if "TextGenerator" in block]
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=road, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_curl_lines_are_answered(road: Path) -> None:
    model = road / _command("serve")[1]
    lines = [words for words in _commands() if words[0] == "curl"]
    assert len(lines) == 2
    with running_service(model) as (url, _):
        for words in lines:
            words[1] = words[1].replace("http://127.0.0.1:9228", url)
            done = subprocess.run(
                [*words, "--silent", "--fail"], capture_output=True, text=True, check=True
            )
            assert '"texts"' in done.stdout or done.stdout.endswith("data: [DONE]\n\n")


def test_the_tokenizer_of_the_readme_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip("GPT-2's vocabulary is not here: expected ../shared/data/gpt2")
    [block] = [block for block in _blocks("python") if "LowerCaseTokenizer" in block]
    (tmp_path / "my_module.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = load_tokenizer("my_module.LowerCaseTokenizer", str(SHARED_DATA / "gpt2"))
    [ids] = tokenizer.encode_documents(["Hello"])
    assert tokenizer.decode(ids).strip() == "hello"


def test_every_picture_is_there_and_small() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(pictures) >= 2
    for picture in pictures:
        assert 1_000 < (REPOSITORY / picture).stat().st_size < 300_000


def test_arguments_are_described_where_the_readme_says() -> None:
    for _, options, _ in COMMANDS:
        assert options.__module__.startswith("full_stack_transformer.arguments.")
