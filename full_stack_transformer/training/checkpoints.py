"""Checkpoints, written so that a reader never finds half of one.

    checkpoints/last.ckpt       the newest
    checkpoints/previous.ckpt   the one before, in case the disk damages the newest
    checkpoints/best.ckpt       the one with the best validation result so far

Each is a file of one process, or a directory of parts (`checkpoint_parts`), in the place of either.

Lightning 2.6 stages a checkpoint in the system's temporary directory, without flushing it to the disk:
with that directory on another file system, kill -9 left an unloadable `last.ckpt` in 3 of 15 trials
(Lightning issue #21253). Here: a temporary file beside the target, fsync, rename.
"""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from full_stack_transformer.errors import MachineError, TrainingError
from full_stack_transformer.modelling.checkpoint_parts import check_parts, read_parts, read_values
from full_stack_transformer.modelling.pretrained import reason_of
from full_stack_transformer.storage import (
    make_directories,
    remove_path,
    replace_path,
    sync_directory,
    why_not_written,
)

LAST_FILE_NAME = "last.ckpt"
PREVIOUS_FILE_NAME = "previous.ckpt"
BEST_FILE_NAME = "best.ckpt"
# Key in a checkpoint: whether it was written before a validation that was due.
VALIDATION_IS_DUE_KEY = "validation_is_due"
# Key in a checkpoint: the id of its experiment; checkpoints from before there were ids have none.
EXPERIMENT_ID_KEY = "experiment_id"
# Key in a checkpoint: samples or rows of a batch over all processes.
ROWS_PER_BATCH_KEY = "rows_per_batch"


class DurableCheckpointIO(CheckpointIO):
    """Checkpoint files that are complete or absent; the old `last.ckpt` becomes `previous.ckpt`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint; the previous file of that name stays until the new one is complete.

        Raises:
            MachineError: the disk is full or cannot be written.
        """
        target = Path(path)
        with _partial(target) as partial:
            with partial.open("wb") as file:
                _write(checkpoint, file)
                os.fsync(file.fileno())
            publish(partial, target)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint; tensors and plain values only, never code."""
        if Path(path).is_dir():
            return read_parts(Path(path))
        content: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return content

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint that is no longer wanted."""
        remove_path(Path(path))


class _Witness:
    """A file that keeps the system's error, in whose place torch.save raises one that says nothing."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write, and keep an error."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Called by torch.save."""
        self._file.flush()


def _write(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    witness: Any = _Witness(file)
    try:
        torch.save(checkpoint, witness)
    except RuntimeError as error:
        raise witness.error or error from error
    file.flush()


def publish(partial: Path, target: Path) -> None:
    """Give a complete checkpoint its name; the old `last.ckpt` becomes `previous.ckpt`."""
    if target.name == LAST_FILE_NAME and target.exists():
        link_checkpoint(target, target.with_name(PREVIOUS_FILE_NAME))
    if partial.is_dir():
        sync_directory(partial)
    replace_path(partial, target)


def link_checkpoint(source: Path, target: Path) -> None:
    """Give a checkpoint a second name, replacing the one that has it; copies where links do not work.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    with _partial(target) as partial:
        if source.is_dir():
            remove_path(partial)
            partial.mkdir()
            for file in source.iterdir():
                _link(file, partial / file.name)
            sync_directory(partial)
        else:
            _link(source, partial)
        replace_path(partial, target)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def partial_of(target: Path, mark: str) -> Path:
    """Where a checkpoint is written until it is complete; the next run removes what is left there."""
    return target.with_name(f".{target.name}.partial-{mark}")


def remove_partial(directory: Path) -> None:
    """Remove what a killed run left unfinished."""
    for path in directory.glob(".*.partial-*"):
        remove_path(path)


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A temporary path beside the target; it is removed if the body fails."""
    partial = partial_of(target, str(os.getpid()))
    try:
        make_directories(target.parent)
        yield partial
    except (OSError, RuntimeError) as error:  # torch.save wraps some errors of the system
        with contextlib.suppress(OSError):
            remove_path(partial)
        raise writing_failed(target, error) from error


def writing_failed(target: Path, error: BaseException) -> MachineError:
    """The error for a checkpoint that could not be written."""
    if any(target.parent.glob("*.ckpt")):
        rest = (
            "earlier checkpoints are intact: free disk space or fix the permissions, and continue "
            "with --resume last"
        )
    else:
        rest = "nothing was saved: free disk space or fix the permissions, and start again"
    return MachineError(f"writing {target} failed: {why_not_written(error)}; {rest}")


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that is intact."""

    path: Path
    step: int
    """Optimizer steps before it."""
    validation_is_due: bool
    """Whether the validation of this step is still to be done."""
    world_size: int
    """Processes that trained together."""
    rows_per_batch: int | None
    """Samples or rows of a batch, over all of them; None in a checkpoint of an older version."""


def find_checkpoint(
    directory: Path, experiment_id: str | None = None
) -> tuple[FoundCheckpoint | None, dict[Path, str]]:
    """The newest intact checkpoint, and why newer ones were skipped.

    Args:
        directory: of the checkpoints.
        experiment_id: a checkpoint with another id belongs to another training; None for any id.

    Raises:
        TrainingError: there are checkpoints, but none can be read.
    """
    skipped: dict[Path, str] = {}
    for name in (LAST_FILE_NAME, PREVIOUS_FILE_NAME, BEST_FILE_NAME):
        path = directory / name
        if not path.exists():
            continue
        try:
            return _verified(path, experiment_id), skipped
        except Exception as error:  # a damaged file raises anything
            skipped[path] = reason_of(error)
    if skipped:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped.items())
        raise TrainingError(
            f"no checkpoint in {directory} can be used ({reasons}); start a new training without --resume"
        )
    return None, skipped


def _verified(path: Path, experiment_id: str | None) -> FoundCheckpoint:
    if path.is_dir():
        check_parts(path)
        content = read_values(path)
    else:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its part {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    found_id = content.get(EXPERIMENT_ID_KEY)
    if None not in (found_id, experiment_id) and found_id != experiment_id:
        raise ValueError("it is a checkpoint of another training")
    return FoundCheckpoint(
        path=path,
        step=content["global_step"],
        validation_is_due=content[VALIDATION_IS_DUE_KEY],
        world_size=content["world_size"],
        rows_per_batch=content.get(ROWS_PER_BATCH_KEY),
    )
