"""Lightning's checkpoint files, written so that a reader never finds half of one.

Lightning 2.6 stages a checkpoint in the system's temporary directory, without flushing it to the disk:
with that directory on another file system, a kill left an unloadable `last.ckpt` in 3 of 15 trials
(Lightning issue #21253). Here: a temporary file beside the target, fsync, rename.
"""

import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from full_stack_transformer.errors import MachineError
from full_stack_transformer.storage import sync_directory


class DurableCheckpointIO(CheckpointIO):
    """Checkpoint files that are complete or absent."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint; the previous file of that name stays until the new one is complete.

        Raises:
            MachineError: the disk is full or cannot be written.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            sync_directory(target.parent)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise MachineError(
                f"writing {target} failed: {error}; the previous one is intact"
            ) from error

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
