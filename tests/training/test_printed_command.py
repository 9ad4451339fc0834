"""The command that an interrupted training prints: pasted elsewhere, it resumes with the saved options."""

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from full_stack_transformer import machine
from full_stack_transformer.command_line import run
from full_stack_transformer.training.callbacks.control import CatchSignals

REPOSITORY = Path(__file__).resolve().parents[2]
_QUICK = [
    *("--model_config", "tiny", "--vocab_size", "300", "--batch_size", "4", "--seed", "3"),
    *("--max_steps", "9", "--max_epochs", "-1", "--accelerator", "cpu", "--precision", "32"),
    *(
        "--compile",
        "never",
        "--experiments_root",
        "it's my/root",
        "--metric_for_best_model",
        "loss",
    ),
]
_ENDLESS = {"9": "1000000"}  # the steps
_OWN_DATA = """
from full_stack_transformer.training.data.rows import BaseDataModule

class Parity(BaseDataModule):
    task_name = "sequence_classification"

    def all_rows(self):
        for number in range(400):
            yield {"text": f"{number:,}", "label": "odd" if number % 2 else "even"}
"""
_START = "from full_stack_transformer.__main__ import main\nmain()\n"


@pytest.fixture
def place(
    dataset_dir: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working directory with data under names that a shell splits; trainings here are quick."""
    directory = tmp_path / "with space"
    directory.mkdir()
    shutil.copytree(dataset_dir, directory / "a dataset")
    shutil.copytree(model_dir, directory / "a model")
    rows = "".join(f"text {n} {'good' if n % 2 else 'bad'},{n % 2}\n" for n in range(80))
    (directory / "my rows.csv").write_text(f"text,label\n{rows}")
    (directory / "conf.json").write_text(json.dumps({"dataset_dir": "a dataset", "seed": 5}))
    (directory / "my_data.py").write_text(_OWN_DATA)
    monkeypatch.chdir(directory)
    monkeypatch.setattr(machine, "_SECONDS_PER_SIDE", 1e-3)
    return directory


@pytest.mark.parametrize(
    "words",
    [
        ["--dataset_dir", "a dataset"],
        ["--config", "conf.json"],
        ["--dataset_dir", "a dataset", "--model_path", "a model"],
        ["--task", "masked_lm", "--dataset_dir", "a dataset", "--mask_probability", "0.3"],
        ["--task", "sequence_classification", "--train_file", "my rows.csv", "--max_length", "16"],
    ],
    ids=["corpus", "config", "model_path", "masked_lm", "rows"],
)
def test_the_line_resumes_every_kind_of_start(
    words: list[str],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    quick = [word for word in _QUICK if "--config" not in words or word not in ("--seed", "3")]
    with (
        mock.patch.object(CatchSignals, "on_train_start", _pretend_sigterm),
        caplog.at_level(logging.INFO),
    ):
        assert run(["train", *words, *quick]) == 143
    [line] = [one for one in caplog.messages if "resume with: " in one]
    experiment = place / "it's my/root/experiment/0"
    before = json.loads((experiment / "arguments.json").read_text())
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert run(shlex.split(line.partition("resume with: ")[2])[1:]) == 0
    assert json.loads((experiment / "summary.json").read_text())["num_steps"] == 9
    after = json.loads((experiment / "arguments.json").read_text())
    moved = {"dataset_dir", "train_file", "model_path", "experiments_root"}
    assert {name for name in before if before[name] != after[name]} <= moved
    assert f"resuming after step {1}" in caplog.text


def _pretend_sigterm(signals: CatchSignals, *_: object) -> None:
    signals.received = signal.SIGTERM


def test_the_line_of_ones_own_classes_is_pasted_into_a_shell(place: Path, tmp_path: Path) -> None:
    """A real process, stopped by a real signal; the line finds the module in the working directory."""
    (tmp_path / "bin").mkdir()
    fst = tmp_path / "bin" / "fst"
    fst.write_text(f"#!{sys.executable}\n{_START}")
    fst.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{fst.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    words = ["run_experiment", "--data_class", "my_data.Parity", "--do_train", "--do_eval"]
    with subprocess.Popen(
        [fst, *words, *(_ENDLESS.get(word, word) for word in _QUICK), "--val_check_interval", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stderr is not None
        said = ""
        for said in process.stderr:
            if said.startswith("step 2: "):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 143, said
    line = said.partition("resume with: ")[2]
    assert line.startswith(f"cd {shlex.quote(str(place))} && fst run_experiment --data_class")
    done = subprocess.run(
        f"{line.strip()} --max_steps 2",
        shell=True,
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    experiment = Path(done.stdout.strip())
    assert json.loads((experiment / "arguments.json").read_text())["seed"] == 3
    assert (experiment / "eval_results.json").is_file()
