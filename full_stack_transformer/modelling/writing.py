"""Directories that are there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from full_stack_transformer.errors import MachineError
from full_stack_transformer.storage import replace_directory, why_not_written

CARD_FILE_NAME = "README.md"


@contextmanager
def written_whole(target: Path, what: str) -> Iterator[Path]:
    """A new directory, which takes the place of `target` at the end; after an error it is gone.

    Args:
        target: where the directory is to be; an existing one stays until the new one is complete.
        what: for the error: "the model directory".

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        replace_directory(partial, target)
    except (OSError, SafetensorError, MachineError) as error:
        kept = "; the previous one is intact" if target.exists() else ""
        raise MachineError(
            f"writing {what} {target} failed: {why_not_written(error)}{kept}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
