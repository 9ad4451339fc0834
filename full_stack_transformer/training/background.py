"""Checkpoints that are written while the training goes on.

    step ──> copy of this process's part ──> next steps …
                        └── a thread: write, flush, meet the others ──> the main process names it last.ckpt

The thread talks to those of the other processes through a process group of its own, as torch asks for with
`async_save`, which does the same but knows no step after the last byte: here a checkpoint has its name only
when all parts are on the disk. One is written at a time.
"""

import shutil
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

from full_stack_transformer.errors import MachineError
from full_stack_transformer.modelling.checkpoint_parts import (
    Parts,
    missing_parts,
    split,
    write_parts,
)
from full_stack_transformer.training.checkpoints import partial_of, publish, writing_failed


class BackgroundWriter:
    """Writes the checkpoints of a training; each process has one, all made at the same time."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread: threading.Thread | None = None
        self._failure: MachineError | None = None

    def start(self, content: dict[str, Any], target: Path, *, step: int) -> None:
        """Begin to write; the one before has been waited for.

        Args:
            content: of the checkpoint, with this process's parts of sharded tensors; copied.
            target: its name when it is complete.
            step: the same in all processes, and another one each time.
        """
        assert self._thread is None
        # A daemon: where another process is lost, this one must be able to end.
        self._thread = threading.Thread(
            target=self._write, args=(split(content), target, step), daemon=True
        )
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether the last one could not be written; `wait` tells why."""
        return self._failure is not None

    def wait(self, seconds: float | None = None) -> MachineError | None:
        """Wait until the checkpoint has its name, if one is being written.

        Returns:
            Why it could not be written, in one of the processes at least.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None
        failure, self._failure = self._failure, None
        return failure

    def _write(self, parts: Parts, target: Path, step: int) -> None:
        partial = partial_of(target, f"step-{step}")
        is_main = self._group is None or self._group.rank() == 0
        try:
            write_parts(parts, partial, self._group)
            if is_main:
                _check_complete(partial, target)
                publish(partial, target)
        except Exception as error:  # whatever it is, the training must hear of it
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)
            self._failure = writing_failed(target, error)


def _check_complete(partial: Path, target: Path) -> None:
    """Raise OSError if parts of a checkpoint are not here."""
    missing = missing_parts(partial)
    if missing:
        raise OSError(
            f"{len(missing)} parts of {target.name} are not on this machine ({missing[0]}): "
            "--experiments_root must be on a disk that all machines share, or pass --checkpoints single"
        )
