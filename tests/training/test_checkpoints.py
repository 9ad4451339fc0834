"""Checkpoints are complete or absent, hold no code, and a damaged one is noticed."""

import pickle
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from full_stack_transformer.errors import MachineError, TrainingError
from full_stack_transformer.training.checkpoints import (
    BEST_FILE_NAME,
    LAST_FILE_NAME,
    PREVIOUS_FILE_NAME,
    VALIDATION_IS_DUE_KEY,
    DurableCheckpointIO,
    find_checkpoint,
    link_checkpoint,
)


def _save(path: Path, step: int, *, num_weights: int = 1000) -> None:
    content = {
        "global_step": step,
        VALIDATION_IS_DUE_KEY: False,
        "world_size": 1,
        "state_dict": {"weight": torch.arange(float(num_weights))},
    }
    DurableCheckpointIO().save_checkpoint(content, path)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "best.ckpt"
    checkpoint = {"state_dict": {"weight": torch.arange(5.0)}, "step": 3}
    DurableCheckpointIO().save_checkpoint(checkpoint, path)
    again = DurableCheckpointIO().load_checkpoint(path)
    assert torch.equal(again["state_dict"]["weight"], torch.arange(5.0))
    assert again["step"] == 3
    assert _names(path.parent) == ["best.ckpt"]


def test_the_last_one_becomes_the_previous_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path / LAST_FILE_NAME, step)
    io = DurableCheckpointIO()
    assert io.load_checkpoint(tmp_path / LAST_FILE_NAME)["global_step"] == 3
    assert io.load_checkpoint(tmp_path / PREVIOUS_FILE_NAME)["global_step"] == 2
    assert _names(tmp_path) == [LAST_FILE_NAME, PREVIOUS_FILE_NAME]


@contextmanager
def _full_disk(max_bytes: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond this, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("max_bytes", [0, 4096, 300_000], ids=["nothing", "little", "most"])
def test_a_full_disk_keeps_the_previous_one(max_bytes: int, tmp_path: Path) -> None:
    last = tmp_path / LAST_FILE_NAME
    _save(last, 1, num_weights=100_000)
    with (
        _full_disk(max_bytes),
        pytest.raises(MachineError, match=r"writing .*last\.ckpt failed.*--resume last"),
    ):
        _save(last, 2, num_weights=100_000)
    found, skipped = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.path, found.step, skipped) == (last, 1, {})
    assert _names(tmp_path) == [LAST_FILE_NAME]


def test_a_failed_flush_keeps_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / LAST_FILE_NAME
    _save(path, 1)
    error = OSError(5, "Input/output error")
    with mock.patch("os.fsync", side_effect=error), pytest.raises(MachineError, match="intact"):
        _save(path, 2)
    assert DurableCheckpointIO().load_checkpoint(path)["global_step"] == 1
    assert _names(tmp_path) == [LAST_FILE_NAME]


@pytest.mark.parametrize("can_link", [True, False])
def test_the_best_one_stays_when_the_last_one_is_replaced(can_link: bool, tmp_path: Path) -> None:
    last, best = tmp_path / LAST_FILE_NAME, tmp_path / BEST_FILE_NAME
    _save(last, 1)
    refused = mock.Mock(side_effect=OSError(1, "Operation not permitted"))
    with mock.patch.object(Path, "hardlink_to", Path.hardlink_to if can_link else refused):
        link_checkpoint(last, best)
        link_checkpoint(last, best)  # with links: two names of one file already
    _save(last, 2)
    assert DurableCheckpointIO().load_checkpoint(best)["global_step"] == 1
    assert _names(tmp_path) == [BEST_FILE_NAME, LAST_FILE_NAME, PREVIOUS_FILE_NAME]


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(torch.arange(1000.0).numpy().tobytes()[400:420])
    content[place] ^= 1
    path.write_bytes(content)


def _put_code_into(path: Path) -> None:
    torch.save({"global_step": 9, "a": _Hostile()}, path)


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("open('/tmp/never', 'w')",))


@pytest.mark.parametrize("damage", [_cut_short, _flip_a_bit, _put_code_into])
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    for step in (1, 2):
        _save(tmp_path / LAST_FILE_NAME, step)
    damage(tmp_path / LAST_FILE_NAME)
    found, skipped = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.path.name, found.step) == (PREVIOUS_FILE_NAME, 1)
    assert list(skipped) == [tmp_path / LAST_FILE_NAME]
    damage(tmp_path / PREVIOUS_FILE_NAME)
    with pytest.raises(TrainingError, match=r"no checkpoint in .* can be used \(last\.ckpt: "):
        find_checkpoint(tmp_path)


def test_where_there_is_none_nothing_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "absent") == (None, {})


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
