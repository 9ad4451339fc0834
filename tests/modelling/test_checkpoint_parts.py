"""A checkpoint that is taken apart is the same when it is put together."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from full_stack_transformer.modelling.checkpoint_parts import (
    check_parts,
    read_checkpoint,
    read_parts,
    read_values,
    split,
    write_parts,
)


@pytest.fixture
def content() -> dict[str, Any]:
    """Two names of one tensor, an empty one, numbers, and names that need care."""
    torch.manual_seed(0)
    tied = torch.randn(5, 3)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.randn(5, 3), "half": torch.ones(2).half()}
    return {
        "state_dict": {"first": tied, 'a "name/x"': tied.detach(), "empty": torch.zeros(0, 3)},
        "optimizer_states": [{"state": {0: state}, "param_groups": [{"betas": (0.9, 0.95)}]}],
        "global_step": 7,
        "callbacks": {"of": [torch.arange(4), None]},
    }


@pytest.fixture
def directory(content: dict[str, Any], tmp_path: Path) -> Path:
    """The checkpoint on the disk."""
    place = tmp_path / "last.ckpt"
    write_parts(split(content), place, None)
    return place


def test_what_is_read_is_what_was_written(content: dict[str, Any], directory: Path) -> None:
    found = read_parts(directory)
    torch.testing.assert_close(found, content, atol=0, rtol=0)
    assert list(found["state_dict"]) == list(content["state_dict"])
    check_parts(directory)


def test_a_part_is_read_alone(content: dict[str, Any], directory: Path) -> None:
    found = read_checkpoint(directory)
    assert found["global_step"] == 7
    torch.testing.assert_close(found["state_dict"], content["state_dict"], atol=0, rtol=0)
    assert found["optimizer_states"][0]["state"][0]["exp_avg"] is None
    assert read_values(directory)["state_dict"]["first"] is None


def test_the_training_may_change_its_tensors(content: dict[str, Any], tmp_path: Path) -> None:
    expected, parts = content["state_dict"]["first"].clone(), split(content)
    content["state_dict"]["first"].zero_()
    content["callbacks"]["of"].append(1)
    write_parts(parts, tmp_path / "copied.ckpt", None)
    found = read_parts(tmp_path / "copied.ckpt")
    assert torch.equal(found["state_dict"]["first"], expected)
    assert len(found["callbacks"]["of"]) == 2


@pytest.mark.parametrize("name", ["values.pt", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
def test_damage_is_found(name: str, how: str, directory: Path) -> None:
    file = directory / name
    found = bytearray(file.read_bytes())
    file.unlink()
    if how == "cut":
        file.write_bytes(found[: len(found) // 2])
    elif how == "changed":
        start = found.find(torch.full((), 3.0).numpy().tobytes()) if name == "values.pt" else 80
        if name == "__0_0.distcp":
            start = len(found) // 2
        for place in range(start, start + 16):
            found[place] ^= 0xFF
        file.write_bytes(found)
    with pytest.raises((ValueError, OSError, KeyError)):
        check_parts(directory)


def test_no_index_makes_code_run(directory: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch evil",)

    (directory / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="system does not belong there"):
        read_parts(directory)
