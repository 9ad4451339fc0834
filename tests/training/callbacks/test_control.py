"""What ends a training before its time: signals, a loss that is no number, no improvement, a full disk."""

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.errors import MachineError, TrainingError
from full_stack_transformer.training.callbacks.control import CatchSignals
from full_stack_transformer.training.checkpoints import DurableCheckpointIO
from full_stack_transformer.training.module import TrainingModule
from tests.training.training_here import TrainingHere, checkpoint_of, curve_of


@pytest.fixture
def training(dataset_dir: Path, tmp_path: Path) -> TrainingHere:
    """Trains into tmp_path."""
    return TrainingHere(dataset_dir, tmp_path)


@contextmanager
def _in_step(name: str, action: Callable[[TrainingModule], Any]) -> Iterator[None]:
    """Do something at the start of each `training_step` or `validation_step`."""
    step = getattr(TrainingModule, name)

    def act_and_step(task: TrainingModule, batch: Batch, batch_index: int) -> Any:
        action(task)
        return step(task, batch, batch_index)

    with mock.patch.object(TrainingModule, name, act_and_step):
        yield


def _send(number: signal.Signals, at_step: int) -> Callable[[TrainingModule], None]:
    sent: list[int] = []

    def send(task: TrainingModule) -> None:
        if task.global_step == at_step and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_a_signal_saves_after_the_running_step(
    number: signal.Signals,
    exit_code: int,
    training: TrainingHere,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler = signal.getsignal(number)
    with _in_step("training_step", _send(number, at_step=3)), caplog.at_level(logging.INFO):
        assert training(max_steps=20) == exit_code
    assert signal.getsignal(number) == handler
    experiment = tmp_path / "experiment" / "0"
    assert checkpoint_of(experiment)["global_step"] == 4
    assert not (experiment / "summary.json").exists()
    said = caplog.messages[-1]
    line = f"fst train --resume {experiment}"
    assert said == f"{number.name}: stopped after step 4; resume with: {line}"


def test_a_signal_in_a_validation_ends_it_and_the_resumed_training_repeats_it(
    training: TrainingHere, tmp_path: Path
) -> None:
    options = {"max_steps": 6, "val_check_interval": 4.0}
    with _in_step("validation_step", _send(signal.SIGTERM, at_step=4)):
        assert training(**options) == 143
    experiment = tmp_path / "experiment" / "0"
    assert checkpoint_of(experiment)["global_step"] == 4
    assert not (experiment / "model").exists()
    training.to_the_end(**options, resume="last")
    assert [step for step, _ in curve_of(experiment)] == [4, 6]


def test_a_signal_in_an_accumulation_window_waits_for_its_step(
    training: TrainingHere, tmp_path: Path
) -> None:
    with _in_step("training_step", _send(signal.SIGTERM, at_step=2)):
        assert training(max_steps=9, accumulate_grad_batches=3) == 143
    content = checkpoint_of(tmp_path / "experiment" / "0")
    assert content["global_step"] == 3
    assert content["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"num_batches": 9}]


def test_a_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with CatchSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            if signals.received == signal.SIGINT:
                os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGINT


def _spoil(what: float) -> Callable[[TrainingModule], None]:
    def spoil(task: TrainingModule) -> None:
        if task.global_step == 4:
            with torch.no_grad():
                next(task.backbone.parameters()).fill_(what)

    return spoil


@pytest.mark.parametrize("what", [float("nan"), float("inf"), 1e30], ids=str)
def test_a_loss_that_is_no_number_names_the_step_and_is_not_saved(
    what: float, training: TrainingHere, tmp_path: Path
) -> None:
    with (
        _in_step("training_step", _spoil(what)),
        pytest.raises(TrainingError, match=r"became (nan|inf) at step 5; .* --learning_rate"),
    ):
        training(max_steps=9, val_check_interval=3.0, checkpoint_every_n_minutes=0)
    experiment = tmp_path / "experiment" / "0"
    steps = [checkpoint_of(experiment, f"{name}.ckpt")["global_step"] for name in ("last", "best")]
    assert steps == [4, 3]
    for tensor in checkpoint_of(experiment)["state_dict"].values():
        assert torch.isfinite(tensor).all()


def test_weights_that_are_no_numbers_are_not_saved(training: TrainingHere, tmp_path: Path) -> None:
    optimizer_step = TrainingModule.optimizer_step

    def step_and_spoil(task: TrainingModule, *rest: Any) -> None:
        optimizer_step(task, *rest)
        next(task.backbone.parameters()).data.fill_(torch.nan)

    with (
        mock.patch.object(TrainingModule, "optimizer_step", step_and_spoil),
        pytest.raises(TrainingError, match="no longer finite after step 1"),
    ):
        training(max_steps=9, checkpoint_every_n_minutes=0)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_training_that_no_longer_improves_ends(
    training: TrainingHere, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        experiment = training.to_the_end(
            max_steps=40,
            val_check_interval=2.0,
            learning_rate=0.0,
            early_stopping_patience=2,
        )
    assert json.loads((experiment / "summary.json").read_text())["num_steps"] == 6
    assert [step for step, _ in curve_of(experiment)] == [2, 4, 6]
    assert "no improvement on" in caplog.text


def test_a_full_disk_ends_the_training_with_the_checkpoint_before(
    training: TrainingHere, tmp_path: Path
) -> None:
    save = DurableCheckpointIO.save_checkpoint

    def save_or_fail(
        io: DurableCheckpointIO, content: dict[str, Any], *place: Any, **options: Any
    ) -> None:
        full = OSError(28, "No space left on device")
        with mock.patch("os.fsync", side_effect=full if content["global_step"] == 3 else None):
            save(io, content, *place, **options)

    with (
        mock.patch.object(DurableCheckpointIO, "save_checkpoint", save_or_fail),
        pytest.raises(MachineError, match=r"the disk is full.* --resume last"),
    ):
        training(max_steps=5, checkpoint_every_n_minutes=0)
    experiment = tmp_path / "experiment" / "0"
    assert checkpoint_of(experiment)["global_step"] == 2
    assert sorted(path.name for path in (experiment / "checkpoints").iterdir()) == [
        *("last.ckpt", "previous.ckpt")
    ]
    training.to_the_end(max_steps=5, resume="last")
