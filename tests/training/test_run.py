"""Training through the real command: what it writes, that it learns, and what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from full_stack_transformer.datasets.description import DatasetDirectory
from full_stack_transformer.modelling.backbones import DECODER_PRESETS
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.run import SUMMARY_FILE_NAME
from tests.conftest import RunFst

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def experiment(
    run_fst: RunFst, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An experiment of 30 steps with three validations."""
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
    experiment: Path, dataset_dir: Path, run_fst: RunFst
) -> None:
    for model in (experiment, experiment / "checkpoints" / "last.ckpt"):
        done = run_fst("evaluate", model, dataset_dir, "--device", "cpu")
        loss = json.loads(done.stdout)["loss"]
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
    for name in (
        metric_names.TRAIN_LOSS,
        metric_names.VALID_LOSS,
        metric_names.VALID_PERPLEXITY,
        metric_names.GRADIENT_NORM,
        metric_names.TOKENS_PER_SECOND,
        metric_names.LEARNING_RATE,
    ):
        assert name in scalars
    # Lightning counts steps from zero on its curves.
    assert [event.step for event in events.Scalars(metric_names.VALID_LOSS)] == [11, 23, 29]
    tensors = events.Tags()["tensors"]
    assert {"arguments/text_summary", "dataset/text_summary", "sample/0/text_summary"} <= set(
        tensors
    )


def test_arguments_are_read_again(
    experiment: Path, dataset_dir: Path, run_fst: RunFst, tmp_path: Path
) -> None:
    """The same options give the same model, bit for bit; an option typed beside the file wins."""
    done = run_fst(
        *("train", "--config", experiment / "arguments.json", "--experiments_root", tmp_path)
    )
    assert done.returncode == 0, done.stderr
    again = Path(done.stdout.strip())
    assert again.parent == tmp_path / "tiny"
    weights = (experiment / "model/model.safetensors").read_bytes()
    assert (again / "model/model.safetensors").read_bytes() == weights


def test_a_model_directory_is_a_starting_point(
    experiment: Path, dataset_dir: Path, run_fst: RunFst, tmp_path: Path
) -> None:
    done = run_fst(
        *("train", "--dataset_dir", dataset_dir, "--model_path", experiment / "model"),
        *("--experiments_root", tmp_path, "--max_steps", "2", "--learning_rate", "0"),
        *("--accelerator", "cpu", "--num_generated_samples", "0"),
    )
    assert done.returncode == 0, done.stderr
    before = json.loads((experiment / "model/description.json").read_text())["validation_loss"]
    after = json.loads((Path(done.stdout.strip()) / "model/description.json").read_text())
    assert after["validation_loss"] == pytest.approx(before, rel=1e-6)


def test_minutes_end_the_training(dataset_dir: Path, run_fst: RunFst, tmp_path: Path) -> None:
    done = run_fst(
        *("train", "--dataset_dir", dataset_dir, "--model_config", "tiny", "--max_epochs", "-1"),
        *("--experiments_root", tmp_path, "--max_minutes", "0.02", "--accelerator", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    experiment = Path(done.stdout.strip())
    assert json.loads((experiment / SUMMARY_FILE_NAME).read_text())["num_steps"] > 0
    assert (experiment / "model" / "model.safetensors").is_file()


def test_a_diverging_loss_stops_with_a_sentence(
    dataset_dir: Path, run_fst: RunFst, tmp_path: Path
) -> None:
    done = run_fst(
        *("train", "--dataset_dir", dataset_dir, "--model_config", "tiny", "--max_steps", "50"),
        *("--experiments_root", tmp_path, "--learning_rate", "100", "--num_warmup_steps", "0"),
        *("--gradient_clip_val", "0", "--max_epochs", "-1", "--accelerator", "cpu"),
        *("--precision", "32", "--weight_decay", "3"),
    )
    assert done.returncode == 1
    assert "the loss became nan at step" in done.stderr or "became inf" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--dataset_dir", "/none"], 1, "/none is no dataset directory"),
        ([], 2, "--dataset_dir"),
        (["--model_config", "huge"], 2, "--model_config must be one of"),
        (["--model_path", "/none"], 1, "no causal language model at '/none'"),
        (["--learning_rate", "-1"], 2, "--learning_rate must lie between"),
        (["--accelerator", "warp"], 2, "--accelerator warp"),
        (["--max_epochs", "-1"], 2, "--max_epochs -1 has no end"),
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
    run_fst: RunFst,
    tmp_path: Path,
) -> None:
    given = options if "--dataset_dir" in options or not options else [
        "--dataset_dir", str(dataset_dir), *options
    ]  # fmt: skip
    done = run_fst("train", *given, "--experiments_root", tmp_path)
    assert done.returncode == exit_code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("model"))
