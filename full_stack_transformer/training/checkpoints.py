"""Checkpoint files, written so that a reader never finds half of one.

    checkpoints/last.ckpt       the newest
    checkpoints/previous.ckpt   the one before, in case the disk damages the newest
    checkpoints/best.ckpt       the one with the best validation result so far

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
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from full_stack_transformer.errors import MachineError, TrainingError
from full_stack_transformer.modelling.backbones import reason_of
from full_stack_transformer.storage import make_directories, sync_directory

LAST_FILE_NAME = "last.ckpt"
PREVIOUS_FILE_NAME = "previous.ckpt"
BEST_FILE_NAME = "best.ckpt"
# Key in a checkpoint: whether it was written before a validation that was due.
VALIDATION_IS_DUE_KEY = "validation_is_due"


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
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if target.name == LAST_FILE_NAME and target.exists():
                link_checkpoint(target, target.with_name(PREVIOUS_FILE_NAME))
            partial.replace(target)
            sync_directory(target.parent)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint; tensors and plain values only, never code."""
        content: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return content

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint that is no longer wanted."""
        Path(path).unlink(missing_ok=True)


def link_checkpoint(source: Path, target: Path) -> None:
    """Give a checkpoint a second name, replacing the file that has it; copies where links do not work.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    with _partial(target) as partial:
        try:
            partial.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(target)
        # If both are links to the same file, rename(2) leaves both in place.
        partial.unlink(missing_ok=True)
        sync_directory(target.parent)


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A temporary path beside the target; the file is removed if the body fails."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        make_directories(target.parent)
        yield partial
    except (OSError, RuntimeError) as error:  # torch.save wraps some errors of the system
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise MachineError(
            f"writing {target} failed: {error}; earlier checkpoints are intact: free disk space or fix "
            "the permissions, and continue with --resume last"
        ) from error


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


def find_checkpoint(directory: Path) -> tuple[FoundCheckpoint | None, dict[Path, str]]:
    """The newest intact checkpoint, and why newer ones were skipped.

    Args:
        directory: of the checkpoints.

    Raises:
        TrainingError: there are checkpoints, but none can be read.
    """
    skipped: dict[Path, str] = {}
    for name in (LAST_FILE_NAME, PREVIOUS_FILE_NAME, BEST_FILE_NAME):
        path = directory / name
        if not path.exists():
            continue
        try:
            return _verified(path), skipped
        except Exception as error:  # a damaged file raises anything
            skipped[path] = reason_of(error)
    if skipped:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped.items())
        raise TrainingError(
            f"no checkpoint in {directory} can be read ({reasons}); start a new training without --resume"
        )
    return None, skipped


def _verified(path: Path) -> FoundCheckpoint:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its part {damaged} is wrong")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return FoundCheckpoint(
        path=path,
        step=content["global_step"],
        validation_is_due=content[VALIDATION_IS_DUE_KEY],
        world_size=content["world_size"],
    )
