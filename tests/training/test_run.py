"""Training through the real command: what it writes, that it learns, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from full_stack_transformer.__main__ import run
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.modelling.backbones import DECODER_PRESETS
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks.progress import SUMMARY_FILE_NAME
from tests.conftest import RunFst
from tests.training.training_here import TrainingHere, checkpoint_of


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
    assert set(scalars) == curves - texts - {metric_names.CUDA_MEGABYTES}
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
    options: dict[str, Any] = {"max_minutes": 0.02, "checkpoint_every_n_minutes": 0.0}
    training.crash(in_batch=1, **options)
    seconds_before = checkpoint_of(tmp_path / "experiment" / "0")["seconds"]
    experiment = training.to_the_end(**options, resume="last")
    assert seconds_before > 0
    assert checkpoint_of(experiment)["seconds"] >= 1.2
    assert json.loads((experiment / SUMMARY_FILE_NAME).read_text())["num_steps"] > 1
    assert (experiment / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--dataset_dir", "/none"], 1, "/none is not a dataset directory"),
        ([], 2, "--dataset_dir"),
        (["--model_config", "huge"], 2, "--model_config must be one of"),
        (["--model_path", "/none"], 1, "no causal language model at '/none'"),
        (["--learning_rate", "-1"], 2, "--learning_rate must be between"),
        (["--accelerator", "warp"], 2, "--accelerator warp"),
        (["--max_epochs", "-1"], 2, "--max_epochs -1 never ends"),
        (["--val_check_interval", "1.5"], 2, "--val_check_interval"),
        (["--precision", "8"], 2, "--precision"),
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
    assert not list(tmp_path.rglob("*.json")), "nothing stays of what never began"
