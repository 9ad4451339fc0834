"""Checkpoints are complete or absent, and hold no code."""

import pickle
from pathlib import Path
from unittest import mock

import pytest
import torch

from full_stack_transformer.errors import MachineError
from full_stack_transformer.training.checkpoints import DurableCheckpointIO


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = {"state_dict": {"weight": torch.arange(5.0)}, "step": 3}
    DurableCheckpointIO().save_checkpoint(checkpoint, path)
    again = DurableCheckpointIO().load_checkpoint(path)
    assert torch.equal(again["state_dict"]["weight"], torch.arange(5.0))
    assert again["step"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_failed_write_keeps_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    DurableCheckpointIO().save_checkpoint({"step": 1}, path)
    full = OSError(28, "No space left on device")
    with (
        mock.patch("os.fsync", side_effect=full),
        pytest.raises(MachineError, match=r"No space left.*previous one is intact"),
    ):
        DurableCheckpointIO().save_checkpoint({"step": 2}, path)
    assert DurableCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("open('/tmp/never', 'w')",))


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"a": _Hostile()}, path)
    with pytest.raises(pickle.UnpicklingError):
        DurableCheckpointIO().load_checkpoint(path)


def test_removing_twice_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    DurableCheckpointIO().save_checkpoint({}, path)
    DurableCheckpointIO().remove_checkpoint(path)
    DurableCheckpointIO().remove_checkpoint(path)
    assert not path.exists()
