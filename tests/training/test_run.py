"""Training through the real command: what it writes, that it learns, and what it refuses."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from full_stack_transformer import machine
from full_stack_transformer.command_line import run
from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.modelling.backbones import DECODER_PRESETS
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks.progress import SUMMARY_FILE_NAME
from full_stack_transformer.training.module import TrainingModule
from tests.conftest import RunFst
from tests.training.training_here import TrainingHere, checkpoint_of, curve_of


@pytest.fixture(scope="module")
def experiment(
    run_fst: RunFst, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An experiment of 30 steps with three validations, by the command in a process of its own."""
    done = run_fst(
        "train",
        *("--dataset_dir", dataset_dir, "--experiments_root", tmp_path_factory.mktemp("runs")),
        *("--experiment_name", "tiny", "--model_config", "tiny", "--batch_size", "8"),
        *("--max_epochs", "-1", "--max_steps", "30", "--val_check_interval", "12"),
        *("--num_warmup_steps", "2", "--learning_rate", "5e-3", "--log_every_n_steps", "2"),
        *("--accelerator", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return Path(done.stdout.strip())


def test_the_loss_falls(experiment: Path, dataset: DatasetDirectory) -> None:
    summary = json.loads((experiment / SUMMARY_FILE_NAME).read_text())
    assert summary["num_steps"] == 30
    assert summary["best_validation_loss"] < 0.75 * math.log(dataset.description["vocab_size"])


def test_the_model_directory_is_the_best_model(experiment: Path, dataset: DatasetDirectory) -> None:
    description = json.loads((experiment / "model/description.json").read_text())
    summary = json.loads((experiment / SUMMARY_FILE_NAME).read_text())
    assert description["validation_loss"] == summary["best_validation_loss"]
    assert description["step"] == 30
    assert description["dataset"]["number_of_train_tokens"] == len(dataset.train.tokens)
    backbone = transformers.AutoModelForCausalLM.from_pretrained(experiment / "model")
    assert backbone.dtype == torch.float32
    assert backbone.config.num_hidden_layers == DECODER_PRESETS["tiny"][0]


def test_evaluate_repeats_the_validation_loss(
    experiment: Path, dataset_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (experiment, experiment / "checkpoints" / "last.ckpt"):
        assert run(["evaluate", str(model), str(dataset_dir), "--device", "cpu"]) == 0
        loss = json.loads(capsys.readouterr().out)["loss"]
        written = json.loads((experiment / "model/description.json").read_text())["validation_loss"]
        assert loss == pytest.approx(written, rel=5e-3)  # trained in bf16, evaluated in fp32


def test_checkpoints_open_without_code(experiment: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        content = torch.load(experiment / "checkpoints" / name, weights_only=True)
        assert content["global_step"] == 30


def test_samples_of_each_validation_are_written(experiment: Path) -> None:
    lines = (experiment / "generated.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [12, 12, 24, 24, 30, 30]


def test_the_curves_are_there(experiment: Path) -> None:
    events = EventAccumulator(str(experiment))
    events.Reload()
    scalars = events.Tags()["scalars"]
    curves = {
        value for name, value in vars(metric_names).items() if name.isupper() and "/" in value
    }
    texts = {metric_names.ARGUMENTS_TEXT, metric_names.DATASET_TEXT}
    elsewhere = {metric_names.CUDA_MEGABYTES, metric_names.TRAIN_REPLAY_LOSS}
    assert set(scalars) == curves - texts - elsewhere
    assert [event.step for event in events.Scalars(metric_names.VALID_LOSS)] == [12, 24, 30]
    samples = {f"{metric_names.SAMPLE_TEXT}/{index}" for index in range(2)}
    assert {f"{name}/text_summary" for name in texts | samples} == set(events.Tags()["tensors"])


def test_arguments_are_read_again(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same options give the same model, bit for bit; an option typed beside the file wins."""
    words = ["train", "--config", str(experiment / "arguments.json")]
    assert run([*words, "--experiments_root", str(tmp_path)]) == 0
    again = Path(capsys.readouterr().out.strip())
    assert again.parent == tmp_path / "tiny"
    weights = "model/model.safetensors"
    assert (again / weights).read_bytes() == (experiment / weights).read_bytes()


def test_a_model_directory_is_a_starting_point(
    experiment: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    again = TrainingHere(dataset_dir, tmp_path).to_the_end(
        model_path=str(experiment / "model"), max_steps=2, learning_rate=0.0, batch_size=16
    )
    before = json.loads((experiment / "model/description.json").read_text())["validation_loss"]
    after = json.loads((again / "model/description.json").read_text())["validation_loss"]
    assert after == pytest.approx(before, rel=5e-3)  # in bf16 before, in fp32 here


def test_minutes_end_the_training_also_over_several_runs(dataset_dir: Path, tmp_path: Path) -> None:
    training = TrainingHere(dataset_dir, tmp_path)
    options: dict[str, Any] = {"max_minutes": 0.08, "checkpoint_every_n_minutes": 0.0}
    training.crash(in_batch=1, **options)
    seconds_before = checkpoint_of(tmp_path / "experiment" / "0")["seconds"]
    experiment = training.to_the_end(**options, resume="last")
    assert seconds_before > 0
    assert seconds_before < checkpoint_of(experiment)["seconds"] < 4.8 + 5.0
    assert json.loads((experiment / SUMMARY_FILE_NAME).read_text())["num_steps"] > 1
    assert (experiment / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("interval", [1.0, 100_000.0], ids=["many validations", "none planned"])
def test_minutes_include_validations(interval: float, dataset_dir: Path, tmp_path: Path) -> None:
    """However long they take: the last one ends in time, and there is time to learn between them."""
    step = TrainingModule.validation_step

    def slow_step(module: TrainingModule, batch: Batch, batch_index: int) -> None:
        time.sleep(1.0)
        step(module, batch, batch_index)

    started = time.monotonic()
    with mock.patch.object(TrainingModule, "validation_step", slow_step):
        experiment = TrainingHere(dataset_dir, tmp_path).to_the_end(
            max_minutes=0.12, max_epochs=-1, val_check_interval=interval, limit_val_batches=2.0
        )
    taken = time.monotonic() - started
    assert taken < 7.2 + 2.0  # a validation takes 2 seconds; one more would be too much
    assert taken > 4.0
    curve = curve_of(experiment)
    assert len(curve) in (2, 3)
    assert [step for step, _ in curve][-1] > 10


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--dataset_dir", "/none"], 1, "/none is not a dataset directory"),
        ([], 2, "--dataset_dir"),
        (["--model_config", "huge"], 2, "--model_config must be one of"),
        (["--model_path", "/none"], 1, "/none should be a model directory"),
        (["--learning_rate", "-1"], 2, "--learning_rate must be between"),
        (["--accelerator", "warp"], 2, "--accelerator must be auto, cpu, gpu or mps"),
        (["--max_epochs", "-1"], 2, "--max_epochs -1 never ends"),
        (["--val_check_interval", "1.5"], 2, "--val_check_interval"),
        (["--precision", "8"], 2, "--precision"),
        (["--metric_for_best_model", "acc"], 2, "must be one of loss, perplexity, bits_per_byte"),
        (["--batch_size", "8.7"], 2, "--batch_size must be a whole number such as 8, found '8.7'"),
        (["--seed", "1e3"], 2, "--seed must be a whole number"),
        (["--seed", "0x10"], 2, "--seed must be a whole number"),
        (["--max_steps", "8.0"], 2, "--max_steps must be a whole number"),
        (["--max_minutes", "inf"], 2, "--max_minutes must be a number of minutes"),
        (["--limit_val_batches", "inf"], 2, "--limit_val_batches must be a fraction"),
    ],
    ids=[
        "no dataset",
        "missing",
        "preset",
        "path",
        "rate",
        "accelerator",
        "end",
        "part",
        "precision",
        "metric",
        "rounded",
        "exponent",
        "hexadecimal",
        "point",
        "endless",
        "infinite",
    ],
)
def test_bad_input_is_one_sentence(
    options: list[str],
    exit_code: int,
    message: str,
    dataset_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = options if "--dataset_dir" in options or not options else [
        "--dataset_dir", str(dataset_dir), *options
    ]  # fmt: skip
    assert run(["train", *given, "--experiments_root", str(tmp_path)]) == exit_code
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("fst: ")
    assert not list(tmp_path.iterdir()), "nothing stays of what never began"


def test_a_refused_training_on_rows_leaves_no_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tokenizer had been written."""
    rows = "".join(f"text {n},{n % 2}\n" for n in range(80))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}")
    words = [
        *("train", "--task", "sequence_classification", "--train_file", str(tmp_path / "rows.csv")),
        *(
            "--model_config",
            "tiny",
            "--vocab_size",
            "300",
            "--experiments_root",
            str(tmp_path / "x"),
        ),
    ]
    assert run([*words, "--metric_for_best_model", "acc"]) == 2
    assert "must be one of loss, accuracy, f1_macro" in capsys.readouterr().err
    assert run([*words, "--accelerator", "warp"]) == 2
    assert not list((tmp_path / "x").iterdir())


def test_an_id_beyond_the_vocabulary_is_one_sentence(
    dataset_dir: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training and evaluation read no id that the model does not have."""
    shutil.copytree(dataset_dir, tmp_path / "data")
    for split in ("train", "valid"):
        with (tmp_path / "data" / split / "corpus.npy").open("r+b") as file:
            file.seek(-6, os.SEEK_END)
            file.write((9999).to_bytes(2, "little"))
    train = [
        "train",
        "--dataset_dir",
        str(tmp_path / "data"),
        "--experiments_root",
        str(tmp_path / "x"),
    ]
    for words in (
        [*train, "--model_config", "tiny", "--accelerator", "cpu", "--compile", "never"],
        ["evaluate", str(model_dir), str(tmp_path / "data"), "--device", "cpu"],
    ):
        assert run(words) == 1
        said = capsys.readouterr().err
        assert "corpus.npy holds the token id 9,999, but the tokenizer has 300 tokens" in said
        assert "Traceback" not in said
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_for_others_have_the_mode_of_new_files(
    umask: int, dataset_dir: Path, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        experiment = TrainingHere(dataset_dir, tmp_path).to_the_end(max_steps=1)
    finally:
        os.umask(before)
    files = [path for path in experiment.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "last.ckpt", "config.json"}
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def test_a_full_disk_is_called_so(dataset_dir: Path, tmp_path: Path) -> None:
    """A real one, in a file system of 1 MB; what was begun is removed."""
    script = (
        f"mount -t tmpfs -o size=1m tmpfs {shlex.quote(str(tmp_path))} || exit 77\n"
        f"{sys.executable} -m full_stack_transformer train --dataset_dir {shlex.quote(str(dataset_dir))} "
        f"--experiments_root {shlex.quote(str(tmp_path))}/x --model_config tiny --max_steps 2 "
        f"--accelerator cpu --precision 32\necho code $?; ls {shlex.quote(str(tmp_path))}/x | wc -l\n"
    )
    unshare = ["unshare", "--map-root-user", "--mount", "bash", "-c", script]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare, to mount a small file system")
    done = subprocess.run(unshare, capture_output=True, text=True, check=False)
    if "code" not in done.stdout:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr[:200]}")
    assert done.stdout.split() == ["code", "1", "0"]
    assert "last.ckpt failed: the disk is full; nothing was saved" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("free_bytes", "model", "message"),
    [
        (100_000, [], "for the weights of tiny: at least 1 MB"),
        (700_000, [], "for training 126,"),
        (100_000, ["--model_path"], "for the weights at "),
    ],
    ids=["weights", "gradients", "pretrained"],
)
def test_a_model_too_large_for_the_memory_is_refused_before_it_is_made(
    free_bytes: int,
    model: list[str],
    message: str,
    dataset_dir: Path,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A container's limit would kill the process without a word."""
    monkeypatch.setattr(machine, "free_memory_bytes", lambda device: free_bytes)
    words = ["train", "--dataset_dir", str(dataset_dir), "--experiments_root", str(tmp_path / "x")]
    words += [*model, str(model_dir)] if model else ["--model_config", "tiny"]
    assert run([*words, "--accelerator", "cpu", "--max_steps", "1", "--max_epochs", "-1"]) == 1
    assert f"memory is short {message}" in capsys.readouterr().err
    assert not any((tmp_path / "x").glob("*/*"))


def test_a_batch_that_does_not_fit_into_memory_is_one_sentence(
    dataset_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("full_stack_transformer.training.module.TrainingModule.mean_losses", fail)
    words = ("--dataset_dir", str(dataset_dir), "--experiments_root", str(tmp_path))
    assert run(["train", *words, "--model_config", "tiny", "--accelerator", "cpu"]) == 1
    assert "too little memory for --batch_size 16: halve it" in capsys.readouterr().err
    assert not (tmp_path / "experiment").exists()
