"""The progress line of a preparation: how much is read, how fast, how long to go. On a terminal only."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# Positions in these count decompressed bytes or rows: of how many is not known before the end.
_UNKNOWN_LENGTHS = (".gz", ".zst", ".parquet")


class ProgressLine:
    """Shows the bytes that were read of all input files."""

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        is_known = not any(path.suffix in _UNKNOWN_LENGTHS for path in files)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        total = sum(path.stat().st_size for path in files) if is_known else None
        self._task = self._progress.add_task(name, total=total)
        self._position = 0

    def begin_file(self, path: Path, position: int) -> None:
        """The next positions are of this file; what lies before `position` was read by an earlier run."""
        self._progress.update(self._task, description=path.name)
        self._progress.advance(self._task, position)
        self._position = position

    def advance_to(self, position: int) -> None:
        """The file has been read up to `position`."""
        self._progress.advance(self._task, position - self._position)
        self._position = position

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
