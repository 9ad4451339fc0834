"""Checkpoints that are written while the training goes on, by one process."""

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from full_stack_transformer.errors import MachineError
from full_stack_transformer.modelling.model_directory import open_model
from full_stack_transformer.training import background
from tests.training.training_here import TrainingHere, checkpoint_of

_OPTIONS: dict[str, Any] = {"max_steps": 6, "val_check_interval": 4.0, "checkpoints": "sharded"}


def test_a_crash_leaves_no_trace(dataset_dir: Path, tmp_path: Path) -> None:
    """Dropout and optimizer go on to the same bits, from either form."""
    training = TrainingHere(dataset_dir, tmp_path)
    whole = training.to_the_end(experiment_name="whole", max_steps=6, val_check_interval=4.0)
    often = {**_OPTIONS, "checkpoint_every_n_minutes": 0.0, "experiment_name": "crashed"}
    training.crash(in_batch=3, **often)
    training.crash(in_batch=5, **{**often, "checkpoints": "single"}, resume="last")
    crashed = training.to_the_end(**often, resume="last")
    for name in ("last.ckpt", "best.ckpt"):
        assert (crashed / "checkpoints" / name).is_dir()
        expected, found = (checkpoint_of(one, name)["state_dict"] for one in (whole, crashed))
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    model = open_model(crashed / "checkpoints" / "last.ckpt", device="cpu")
    assert model.backbone.num_parameters() > 0
    assert not [*(crashed / "checkpoints").glob(".*")]


def test_a_failed_save_is_told(dataset_dir: Path, tmp_path: Path) -> None:
    training = TrainingHere(dataset_dir, tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        mock.patch.object(background, "write_parts", side_effect=full),
        pytest.raises(MachineError, match="failed: the disk is full"),
    ):
        training.to_the_end(**_OPTIONS)
