"""A training that was interrupted and resumed is, bit for bit, one that was not."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from full_stack_transformer.training import metric_names, run
from tests.training.training_here import TrainingHere, checkpoint_of, curve_of

_SAVE_EACH_STEP = {"checkpoint_every_n_minutes": 0.0}
# A training of each kind, and the crashes that its second run survives one after the other.
_TRAININGS: dict[str, tuple[dict[str, Any], list[dict[str, int]]]] = {
    "over the end of an epoch": (
        {"max_epochs": 2, "limit_train_batches": 6.0, "val_check_interval": 4.0, **_SAVE_EACH_STEP},
        [{"in_batch": 0}, {"in_batch": 3}, {"in_validation": 4}, {"in_batch": 8}],
    ),
    "in an accumulation window": (
        {
            "max_epochs": 2,
            "limit_train_batches": 7.0,
            "accumulate_grad_batches": 3,
            "val_check_interval": 0.5,
            "optimizer": "muon",
            **_SAVE_EACH_STEP,
        },
        [{"in_batch": 4}, {"in_batch": 11}],
    ),
    "packed, in the last validation": (
        {"batching": "packed", "max_steps": 8, "val_check_interval": 3.0, "ema_decay": 0.5},
        [{"in_batch": 5}, {"in_validation": 8}],
    ),
    "concatenated, rarely saved": (
        {"batching": "concatenated", "max_steps": 8, "val_check_interval": 3.0},
        [{"in_batch": 2}, {"in_batch": 7}],
    ),
}


def _assert_equal(left: object, right: object, place: str = "") -> None:
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor)
        assert torch.equal(left, right), place
    elif isinstance(left, dict):
        assert isinstance(right, dict)
        assert left.keys() == right.keys(), place
        for key in left:
            if key not in ("seconds", "experiment_id"):  # each run has its own
                _assert_equal(left[key], right[key], f"{place}/{key}")
    elif isinstance(left, list):
        assert isinstance(right, list)
        assert len(left) == len(right), place
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            _assert_equal(one, other, f"{place}/{index}")
    else:
        assert left == right, place


@pytest.mark.parametrize("kind", _TRAININGS)
def test_crashes_leave_no_trace(kind: str, dataset_dir: Path, tmp_path: Path) -> None:
    options, crashes = _TRAININGS[kind]
    training = TrainingHere(dataset_dir, tmp_path)
    whole = training.to_the_end(**options, experiment_name="whole")
    resume: dict[str, Any] = {}
    for crash in crashes:
        training.crash(**crash, **options, **resume, experiment_name="crashed")
        resume = {"resume": "last"}
    crashed = training.to_the_end(**options, **resume, experiment_name="crashed")
    assert crashed.name == "0", "all runs wrote into one directory"
    _assert_equal(checkpoint_of(whole), checkpoint_of(crashed))
    weights = "model/model.safetensors"
    assert (whole / weights).read_bytes() == (crashed / weights).read_bytes()
    assert curve_of(whole) == curve_of(crashed)
    assert set(curve_of(crashed, metric_names.TRAIN_LOSS)) <= set(
        curve_of(whole, metric_names.TRAIN_LOSS)
    )


@pytest.mark.parametrize("limit", ["max_steps", "max_epochs"])
def test_a_training_that_ended_goes_on_under_a_higher_limit(
    limit: str, dataset_dir: Path, tmp_path: Path
) -> None:
    """With a constant rate as if it had been the limit from the start."""
    training = TrainingHere(dataset_dir, tmp_path)
    options: dict[str, Any] = {"lr_schedule": "constant", "val_check_interval": 4.0}
    short, long = {"max_steps": 4}, {"max_steps": 8}
    if limit == "max_epochs":
        options["limit_train_batches"] = 4.0
        short, long = {"max_epochs": 1}, {"max_epochs": 2}
    whole = training.to_the_end(**options, **long, experiment_name="whole")
    training.to_the_end(**options, **short, experiment_name="extended")
    extended = training.to_the_end(**options, **long, experiment_name="extended", resume="last")
    assert extended.name == "0"
    _assert_equal(checkpoint_of(whole), checkpoint_of(extended))
    assert curve_of(whole) == curve_of(extended)


def test_the_order_of_the_callbacks_does_not_matter(dataset_dir: Path, tmp_path: Path) -> None:
    training = TrainingHere(dataset_dir, tmp_path)
    options: dict[str, Any] = {
        "max_steps": 6,
        "val_check_interval": 4.0,
        "accumulate_grad_batches": 2,
        "ema_decay": 0.5,
        "num_generated_samples": 1,
        "histograms": True,
        "early_stopping_patience": 2,
        "checkpoint_every_n_minutes": 0.0,
    }
    usual = training.to_the_end(**options, experiment_name="usual")
    callbacks = run._Training._callbacks
    with mock.patch.object(run._Training, "_callbacks", lambda self: callbacks(self)[::-1]):
        reverse = training.to_the_end(**options, experiment_name="reverse")
    _assert_equal(checkpoint_of(usual), checkpoint_of(reverse))
    for name in ("model/model.safetensors", "generated.jsonl"):
        assert (usual / name).read_bytes() == (reverse / name).read_bytes()
    for name in (metric_names.VALID_LOSS, metric_names.TRAIN_LOSS, metric_names.GRADIENT_NORM):
        assert curve_of(usual, name) == curve_of(reverse, name)
