"""README and docs: the tour's commands are run (with a short training), and every name exists."""

import ast
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from full_stack_transformer.arguments.familiar_options import INSTEAD, SAME
from full_stack_transformer.command_line import COMMANDS, _make_app, _normalize
from full_stack_transformer.tokenization.document_tokenizer import load_tokenizer
from tests.conftest import SHARED_DATA, RunFst
from tests.logged_process import running_service

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "full_stack_transformer"
FILES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in FILES}
README = TEXTS["README.md"]
OPTIONS = {
    name: {f"--{field.name}" for field in dataclasses.fields(options)}
    for name, options, _ in COMMANDS
}


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
    for words in (words for text in TEXTS.values() for words in _commands(text)):
        words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if words[0] == "python" and "/scripts/" in words[1]:
            assert (REPOSITORY / words[1]).is_file()
            words = ["fst", Path(words[1]).stem, *words[2:]]
        if words[0] == "torchrun":
            words = ["fst", *words[words.index("full_stack_transformer") + 1 :]]
        if words[0] != "fst":
            assert words[0] in ("make", "curl", "source", "docker", "export")
            continue
        if words[1] == "--help":
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
    [block] = _blocks("python")
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


def test_the_tokenizer_of_the_docs_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip("GPT-2's vocabulary is not here: expected ../shared/data/gpt2")
    [block] = [block for block in _blocks("python", TEXTS["data.md"]) if "class Lower" in block]
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


def test_every_folder_of_the_package_is_on_the_map() -> None:
    [table] = re.findall(r"^\| folder .*?\n\n", README, re.MULTILINE | re.DOTALL)
    named = {name.rstrip("/") for name in re.findall(r"`(\w+/)`", table)}
    folders = {
        path.name
        for path in PACKAGE.rglob("*")
        if path.is_dir() and path.name != "__pycache__" and any(path.iterdir())
    }
    assert named == folders


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name: str) -> None:
    folder = REPOSITORY if name == "README.md" else REPOSITORY / "docs"
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", TEXTS[name]):
        path, _, anchor = link.partition("#")
        assert (folder / path).exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", (folder / path).read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in anchors, link


@pytest.mark.parametrize("name", TEXTS)
def test_every_module_that_a_page_names_exists(name: str) -> None:
    for path in re.findall(r"[\w./-]+\.py\b", TEXTS[name]):
        if "/" in path and not path.startswith("."):
            assert (REPOSITORY / path).is_file() or (PACKAGE / path).is_file(), path
    for dotted in re.findall(r"\b(?:full_stack_transformer|tests)(?:\.\w+)+", TEXTS[name]):
        if not (REPOSITORY / dotted.replace(".", "/")).with_suffix(".py").is_file():
            _import(dotted)


@pytest.mark.parametrize("name", TEXTS)
def test_the_python_of_a_page_imports_what_exists(name: str) -> None:
    for block in _blocks("python", TEXTS[name]):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("full_stack"):
                for imported in node.names:
                    assert hasattr(importlib.import_module(node.module or ""), imported.name)


def _import(dotted: str) -> object:
    """A package, module, class or function."""
    parent, _, name = dotted.rpartition(".")
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        return getattr(_import(parent), name)


@pytest.mark.parametrize("name", TEXTS)
def test_every_option_that_a_page_names_exists(name: str) -> None:
    everywhere = {"--config", "--show_all_args", "--help"}
    known = set().union(*OPTIONS.values(), everywhere, (f"--{old}" for old in [*SAME, *INSTEAD]))
    # One negation, and options of scripts in tests/.
    known |= {"--no_header", "--gpus", "--peer_python", "--schedules", "--stand_by"}
    # Of docker, up to the first hyphen.
    known |= {"--build", "--format", "--userns", "--stop", "--memory"}
    # Of vLLM, the same.
    known |= {"--tensor", "--pipeline", "--served", "--max", "--gpu", "--dtype", "--api"}
    known |= {"--enable", "--generation", "--chat", "--lora"}
    text = re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", text):
        options = set(re.findall(r"--[a-z]\w+", code))
        if command := re.match(r"fst (\w+)", code):
            taken = OPTIONS[command[1]] | everywhere | {f"--{old}" for old in SAME} | {"--gpus"}
            assert options <= taken, code
        elif code.startswith("--"):
            assert options <= known, code


def test_every_name_of_ours_in_the_tables_of_names_is_defined() -> None:
    """In the column that says what it is here; names of other libraries are listed in the test."""
    others = {"Path", "MyTask", "MyData"}
    sources = "\n".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    defined = set(re.findall(r"(?:def|class) (\w+)", sources))
    methods = TEXTS["tasks.md"].partition("| method of the Hugging Face Trainer")[2]
    rows = re.findall(r"^\| .*? \| (.*) \|$", TEXTS["coming_from.md"], re.MULTILINE)
    rows += re.findall(r"^\| .*? \| (.*?) \| .* \|$", methods, re.MULTILINE)
    assert len(rows) > 50
    for row in rows:
        for code in re.findall(r"`([^`]+)`", row):
            if code.startswith(("fst ", "--", "python ")):
                continue
            names = set(re.findall(r"\b(\w+)(?=\()|\b([A-Z][a-z]\w*[A-Z]\w*)", code))
            for found in {called or cls for called, cls in names} - others:
                assert found in defined, code
