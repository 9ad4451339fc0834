"""Models by their names on the hub: imported once, and what is said where there is no hub."""

import json
import shutil
from pathlib import Path

import pytest

from full_stack_transformer.model_sources.names import is_hub_name
from tests.chat_model import make_chat_model
from tests.conftest import RunFst
from tests.model_sources.fake_hub import COMMIT, running_hub

NAME = "makers/chatty"


@pytest.fixture(scope="module")
def published(documents_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = (documents_dir / "train.txt").read_text()
    return make_chat_model(tmp_path_factory.mktemp("hub") / "chatty", text)


def test_commands_take_names_of_the_hub(published: Path, tmp_path: Path, run_fst: RunFst) -> None:
    shutil.copytree(published, tmp_path / "published")
    (tmp_path / "published/modeling_own.py").write_text("raise SystemExit('was run')")
    (tmp_path / "published/pytorch_model.bin").write_bytes(b"never fetched")
    words = ("generate", NAME, "--raw", "--prompt", "Nr", "--max_new_tokens", "3", "--seed", "1")
    with running_hub(NAME, tmp_path / "published") as (url, asked):
        env = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        first = run_fst(*words, cwd=tmp_path, env=env)
        assert first.returncode == 0, first.stderr
        assert not any("modeling_own" in path or "pytorch" in path for path in asked)
        num_asked = len(asked)
        second = run_fst(*words, cwd=tmp_path, env=env)
        assert len(asked) == num_asked, "the hub is asked once"
        missing = run_fst("generate", "makers/nothing", "--prompt", "a", cwd=tmp_path, env=env)
    assert second.stdout == first.stdout
    assert "using data/models/chatty, imported before" in second.stderr
    model = tmp_path / "data/models/chatty"
    assert (model / "model.safetensors").read_bytes() == (
        published / "model.safetensors"
    ).read_bytes()
    description = json.loads((model / "description.json").read_text())
    assert (description["imported_from"], description["revision"]) == (NAME, COMMIT)
    assert missing.returncode == 1
    assert "makers/nothing is no path here and no model on the hub" in missing.stderr
    # Another model of that name is not taken for it.
    other = run_fst("generate", "others/chatty", "--prompt", "a", cwd=tmp_path)
    assert "is another model (of makers/chatty)" in other.stderr


@pytest.mark.parametrize("command", ["generate", "serve", "evaluate", "import_model"])
def test_without_a_hub_it_is_said_what_to_do(
    command: str, tmp_path: Path, run_fst: RunFst, dataset_dir: Path
) -> None:
    more: dict[str, list[str]] = {
        "evaluate": [str(dataset_dir)],
        "generate": ["--prompt", "a"],
        "serve": ["--port", "0"],
    }
    done = run_fst(command, NAME, *more.get(command, []), cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert f"{NAME} is no path here, and the hub cannot be reached" in done.stderr
    assert f"fst import_model {NAME}" in done.stderr
    assert "Traceback" not in done.stderr


def test_paths_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_hub_name(NAME)
    assert is_hub_name(Path(NAME))
    for path in ("data/models", "a/b/c", "/a/b", "./a", "word", "a/b.gguf", "a/last.ckpt", None):
        assert not is_hub_name(path)
