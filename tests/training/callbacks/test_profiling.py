"""The profile says where the time of a step goes: to the right phase, and all of it."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.training.callbacks.profiling import (
    FORWARD,
    LOSS,
    PROFILE_FILE_NAME,
    StepProfiler,
    as_table,
)
from tests.training.small_training import SmallTraining

_STEPS_BEFORE = 7


class _Clock:
    """Time that passes only where a test says so, in milliseconds."""

    def __init__(self, profiler: StepProfiler) -> None:
        self._profiler = profiler
        self._now = 0.0

    def pass_by(self, milliseconds: float) -> None:
        self._now += 1e-3 * milliseconds

    def spend(self, action: str, milliseconds: float) -> None:
        with self._profiler.profile(action):
            self.pass_by(milliseconds)

    def step(self, num_batches: int = 1) -> None:
        """The actions of a step in Lightning's names and order."""
        profiler = self._profiler
        for batch in range(num_batches):
            self.spend("[_TrainingEpochLoop].train_dataloader_next", 2)
            with profiler.profile("run_training_batch"):
                self.pass_by(1)
                is_last = batch == num_batches - 1
                outer = "[LightningModule]Task.optimizer_step" if is_last else "closure"
                with profiler.profile(outer):
                    with profiler.profile("[Strategy]SingleDeviceStrategy.training_step"):
                        self.spend(FORWARD, 4)
                        self.spend(LOSS, 3)
                    with profiler.profile("[Strategy]SingleDeviceStrategy.backward"):
                        self.spend("[LightningModule]Task.on_after_backward", 5)
                    if is_last:
                        self.pass_by(6)
            self.spend("[Callback]Meter.on_train_batch_end", 1)

    def __call__(self) -> float:
        return self._now


@pytest.fixture
def profiler(tmp_path: Path) -> StepProfiler:
    """Of an experiment in tmp_path."""
    return StepProfiler(tmp_path)


@pytest.fixture
def clock(profiler: StepProfiler) -> Iterator[_Clock]:
    """The clock of the profiler, inside a training."""
    clock = _Clock(profiler)
    with (
        mock.patch("full_stack_transformer.training.callbacks.profiling.time.perf_counter", clock),
        profiler.profile("run_training_epoch"),
    ):
        yield clock


@pytest.mark.parametrize("num_batches", [1, 2])
def test_time_counts_for_the_innermost_phase(
    num_batches: int, profiler: StepProfiler, clock: _Clock
) -> None:
    for _ in range(_STEPS_BEFORE + 4):
        clock.step(num_batches)
    # The last step ends with the next one, or with the training.
    clock.spend("[_TrainingEpochLoop].train_dataloader_next", 0)
    per_batch = {"loading": 2, FORWARD: 4, LOSS: 3, "backward": 5, "logging": 1, "other": 1}
    expected = {phase: num_batches * milliseconds for phase, milliseconds in per_batch.items()}
    content = profiler.content()
    assert content["milliseconds_per_step"] == pytest.approx({**expected, "optimizer": 6})
    assert content["num_measured_steps"] == 4
    assert content["num_steps"] == _STEPS_BEFORE + 4


def test_a_validation_is_no_part_of_a_step(profiler: StepProfiler, clock: _Clock) -> None:
    for _ in range(_STEPS_BEFORE):
        clock.step()
    clock.spend("[Callback]SaveCheckpoints.on_validation_start", 1)
    clock.pass_by(20)  # between the actions of Lightning's loop
    clock.spend("[_EvaluationLoop].val_next", 1)
    with profiler.profile("[Strategy]SingleDeviceStrategy.validation_step"):
        clock.spend(FORWARD, 10)
    clock.spend("[Callback]SampleTexts.on_validation_end", 30)
    clock.spend("[Callback]ExportModel.on_validation_end", 40)
    with profiler.profile("[Callback]SaveCheckpoints.on_validation_end"):
        clock.spend("save_checkpoint", 50)
    clock.step()
    clock.spend("[_TrainingEpochLoop].train_dataloader_next", 0)
    content = profiler.content()
    assert content["seconds_beside_steps"] == pytest.approx(
        {
            "validation": 0.032,
            "text samples": 0.03,
            "model directory": 0.04,
            "checkpoints": 0.05,
            "histograms": 0.0,
        }
    )
    assert sum(content["milliseconds_per_step"].values()) == pytest.approx(22)


def test_the_parts_add_up_to_the_clock(
    dataset: DatasetDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profiler = StepProfiler(tmp_path)
    clock: dict[int, float] = {}

    def note(step: int) -> None:
        clock[step] = time.perf_counter()

    training = SmallTraining(
        dataset,
        tmp_path,
        profiler=profiler,
        at_step=note,
        max_steps=20,
        val_check_interval=100,
    )
    with caplog.at_level(logging.INFO):
        training.fit()
    content = json.loads((tmp_path / PROFILE_FILE_NAME).read_text())
    assert content["num_measured_steps"] == 20 - _STEPS_BEFORE
    by_clock = 1e3 * (clock[20] - clock[_STEPS_BEFORE]) / (20 - _STEPS_BEFORE)
    assert sum(content["milliseconds_per_step"].values()) == pytest.approx(by_clock, rel=0.1)
    assert content["milliseconds_per_step"]["backward"] > 0.05 * by_clock
    assert len(content["operators"]) == 15
    assert any(operator["name"] == "aten::mm" for operator in content["operators"])
    assert as_table(content) in caplog.text
    assert "time of a step, mean of 13 steps" in caplog.text


def test_a_short_training_has_no_profile(
    dataset: DatasetDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        SmallTraining(dataset, tmp_path, profiler=StepProfiler(tmp_path), max_steps=5).fit()
    assert "too short to profile: 5 steps, of which the first 7 are not counted" in caplog.text
    assert not (tmp_path / PROFILE_FILE_NAME).exists()
