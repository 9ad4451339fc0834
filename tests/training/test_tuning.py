"""The finders of the learning rate and the batch size."""

import json
import logging
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from full_stack_transformer.errors import TrainingError
from full_stack_transformer.training import tuning
from full_stack_transformer.training.tuning import steepest_descent
from tests.training.training_here import TrainingHere


def test_the_steepest_place_of_a_curve_is_found() -> None:
    rates = np.geomspace(1e-6, 1.0, 120)
    noise = np.random.default_rng(0).normal(scale=0.02, size=120)
    # A fall whose middle is at 3e-3, then a rise.
    fall = 6.0 - 3.0 / (1.0 + np.exp(-3.0 * (np.log10(rates) - math.log10(3e-3))))
    losses = (fall + np.where(rates > 0.1, 20.0 * (rates - 0.1), 0.0) + noise).tolist()
    assert 1.5e-3 < steepest_descent(rates.tolist(), losses) < 6e-3


@pytest.mark.parametrize(
    "losses", [list(range(50)), [3.0] * 50, [1.0, 0.5]], ids=["rises", "flat", "short"]
)
def test_a_loss_that_never_falls_is_said(losses: list[float]) -> None:
    with pytest.raises(TrainingError, match="the loss does not fall at any rate"):
        steepest_descent(np.geomspace(1e-6, 1.0, 50)[: len(losses)].tolist(), losses)


def test_what_is_found_is_trained_with_and_saved(
    dataset_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = TrainingHere(dataset_dir, tmp_path)
    options = {"batch_size": 2, "learning_rate": 0.5, "max_steps": 1, "accumulate_grad_batches": 2}
    speeds = iter([100.0, 180.0, 250.0, 255.0])
    with (
        caplog.at_level(logging.INFO),
        mock.patch.object(tuning, "_tokens_per_second", lambda trial, size: next(speeds)),
    ):
        experiment = training.to_the_end(**options, find_batch_size=True, find_learning_rate=True)
    saved = json.loads((experiment / "arguments.json").read_text())
    assert saved["batch_size"] == 8
    assert 1e-4 < saved["learning_rate"] < 0.3
    assert not saved["find_learning_rate"]
    assert "16 samples: 255 tokens/s are not faster; --batch_size 8" in caplog.text
    assert f"falls fastest at --learning_rate {saved['learning_rate']:g}" in caplog.text
    # The trials leave nothing behind: the same training with what they found is the same.
    options |= {"batch_size": 8, "learning_rate": saved["learning_rate"]}
    plain = training.to_the_end(**options, experiment_name="plain")
    weights = "model/model.safetensors"
    assert (experiment / weights).read_bytes() == (plain / weights).read_bytes()


def test_a_size_that_leaves_too_few_batches_is_not_tried(
    dataset_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = TrainingHere(dataset_dir, tmp_path)
    with (
        caplog.at_level(logging.INFO),
        mock.patch.object(tuning, "_SECONDS_PER_SIZE", 0.0),
    ):
        training.to_the_end(batch_size=32, max_steps=1, find_batch_size=True)
    assert "64 samples: an epoch would have fewer than 8 batches; --batch_size 32" in caplog.text
