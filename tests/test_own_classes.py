"""Code of strangers: a model, a dataset or a file of options never makes a module run, an option does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.command_line import run
from full_stack_transformer.errors import InputError, UsageError
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.own_classes import class_of_file, class_of_option, trust
from full_stack_transformer.tasks.opening import open_task
from tests.conftest import RunFst

REPOSITORY = Path(__file__).resolve().parents[1]
_EVIL = "import pathlib\n\npathlib.Path(__file__).with_name('RAN').touch()\n"
# What the commands import, also only if it is installed.
_PLANTED = (
    "torch",
    "transformers",
    "numpy",
    "tokenizers",
    "peft",
    "kernels",
    "flash_attn",
    "regex",
)
# What pip writes as `fst`.
_SCRIPT = """
import sys
from full_stack_transformer.__main__ import main
if __name__ == '__main__':
    sys.exit(main())
"""
_OWN_TOKENIZER = """
from full_stack_transformer.tokenization.document_tokenizer import TrainedTokenizer

class Lower(TrainedTokenizer):
    def normalize(self, text):
        return text.lower()
"""


@pytest.fixture
def hostile_dir(model_dir: Path, tmp_path: Path) -> Path:
    """A model that names a class of a module beside it; modules with the names of libraries."""
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    for name in ("evil_tok", *_PLANTED):
        (directory / f"{name}.py").write_text(_EVIL)
    _change(
        directory / "tokenizer_config.json", full_stack_transformer_cls_name="evil_tok.Tokenizer"
    )
    return directory


def _change(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


@pytest.mark.parametrize("start", ["script", "-m", "empty entry of PYTHONPATH"])
def test_nothing_beside_a_model_is_imported(start: str, hostile_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "fst").write_text(_SCRIPT)
    command = {"-m": ["-m", "full_stack_transformer"]}.get(start, [str(tmp_path / "fst")])
    before = os.pathsep if start.startswith("empty") else ""
    done = subprocess.run(
        [sys.executable, *command, "generate", ".", "--prompt", "a"],
        cwd=hostile_dir,
        env={**os.environ, "PYTHONPATH": f"{before}{REPOSITORY}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "fst: tokenizer_config.json names a tokenizer, evil_tok.Tokenizer, and code that only a file "
        "names is not run; if you trust it, add --allow_code_from evil_tok\n"
    )
    assert not (hostile_dir / "RAN").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["generate", ".", "--prompt", "a"],
        ["evaluate", ".", "DATASET"],
        ["average_checkpoints", ".", ".", "--output_dir", "mean"],
        ["check_tokenizer", "--tokenizer_path", "."],
        [
            *("prepare_dataset", "--documents_train_file", "README.md", "--dataset_name", "x"),
            *("--validation_fraction", "0.1", "--tokenizer_path", "."),
        ],
    ],
    ids=lambda words: words[0],
)
def test_every_door_refuses_a_tokenizer_of_a_stranger(
    words: list[str],
    hostile_dir: Path,
    dataset_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(hostile_dir)
    (hostile_dir / "README.md").write_text("text\n[END_OF_DOCUMENT]\n")
    assert run([str(dataset_dir) if word == "DATASET" else word for word in words]) == 1
    assert "if you trust it, add --allow_code_from evil_tok" in capsys.readouterr().err
    assert not (hostile_dir / "RAN").exists()


@pytest.mark.parametrize("field", ["task_class", "model_class"])
def test_a_description_makes_nothing_run(
    field: str,
    model_dir: Path,
    dataset_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "evil_tok.py").write_text(_EVIL)
    _change(tmp_path / "model" / "description.json", **{field: "evil_tok.Thing"})
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", "model", str(dataset_dir)]) == 1
    assert "--allow_code_from evil_tok" in capsys.readouterr().err
    assert not (tmp_path / "RAN").exists()


def test_a_further_model_of_the_service_makes_nothing_run(
    hostile_dir: Path, model_dir: Path, run_fst: RunFst
) -> None:
    done = run_fst("serve", model_dir, "--more_models", "b=.", "--port", "0", cwd=hostile_dir)
    assert done.returncode == 1
    assert "names a tokenizer, evil_tok.Tokenizer" in done.stderr
    assert not (hostile_dir / "RAN").exists()


@pytest.mark.parametrize(
    ("command", "option"),
    [("train", "task"), ("run_experiment", "data_class"), ("run_experiment", "model_class")],
)
def test_a_file_of_options_makes_nothing_run(
    command: str,
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "evil_tok.py").write_text(_EVIL)
    (tmp_path / "rows.csv").write_text("text,label\na,x\n")
    content = {option: "evil_tok.Thing", "allow_code_from": ["evil_tok"], "train_file": "rows.csv"}
    (tmp_path / "arguments.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    assert run([command, "--config", "arguments.json"]) == 2
    assert f"if you trust it, type --{option} evil_tok.Thing" in capsys.readouterr().err
    assert not (tmp_path / "RAN").exists()


def test_an_own_tokenizer_is_opened_again_by_who_names_its_module(
    documents_dir: Path, tmp_path: Path
) -> None:
    """Its class is found in the working directory, also by an encoding process."""
    (tmp_path / "my_tokens.py").write_text(_OWN_TOKENIZER)

    def fst(*words: str | Path) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "fst").write_text(_SCRIPT)
        return subprocess.run(
            [sys.executable, "fst", *map(str, words)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )

    trained = fst(
        *("prepare_dataset", "--documents_train_file", documents_dir / "train.txt"),
        *("--documents_valid_file", documents_dir / "valid.txt", "--dataset_name", "plain"),
        *("--vocab_size", "300"),
    )
    tokenizer = tmp_path / trained.stdout.strip() / "tokenizer"
    done = fst(
        *("prepare_dataset", "--documents_train_file", documents_dir / "train.txt"),
        *("--documents_valid_file", documents_dir / "valid.txt", "--dataset_name", "own"),
        *("--tokenizer_cls_name", "my_tokens.Lower", "--tokenizer_path", tokenizer),
        *("--num_workers", "5"),  # above four they are processes
    )
    assert done.returncode == 0, done.stderr
    own = tmp_path / done.stdout.strip() / "tokenizer"
    refused = fst("check_tokenizer", "--tokenizer_path", own)
    assert "names a tokenizer, my_tokens.Lower" in refused.stderr
    trusted = fst("check_tokenizer", "--tokenizer_path", own, "--allow_code_from", "my_tokens")
    assert "Lower passes" in trusted.stderr


def test_a_program_names_the_modules_that_it_trusts(hostile_dir: Path) -> None:
    with pytest.raises(InputError, match="--allow_code_from evil_tok"):
        TextGenerator.open(hostile_dir)
    with pytest.raises(InputError, match="--allow_code_from evil_tok"):
        open_task(hostile_dir, device="cpu")
    _change(
        hostile_dir / "tokenizer_config.json",
        full_stack_transformer_cls_name="tests.test_own_classes.Unknown",
    )
    with pytest.raises(UsageError, match="has no attribute 'Unknown'"):
        TextGenerator.open(hostile_dir, allow_code_from=["tests.test_own_classes"])


@pytest.mark.parametrize("name", ["", "my_module", "..x.Y", ".x.Y", "a b.C", 7, None, ["a.B"]])
def test_what_names_no_class_is_said(name: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"should name a task as my_module.MyClass"):
        class_of_file(name, tmp_path / "description.json", "a task")
    with pytest.raises(UsageError, match="must be the name of a module"):
        trust(["my_module.py "])


def test_a_module_beside_an_own_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "with_a_helper.py").write_text("import the_helper_of_it\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="add --allow_code_from the_helper_of_it"):
        class_of_option("with_a_helper.Task", "task", "a task")
