"""What an interrupted preparation has finished, so that `--resume` continues after it.

    journal.jsonl   first line: the fingerprint of options and inputs
                    further lines: progress of a pass, written after the corpus files were flushed

The last complete line counts. The file is in the temporary directory and is removed before that is renamed.
"""

import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from full_stack_transformer.documents.blocks import DocumentCounts
from full_stack_transformer.preparation.encoding import OpenDocument, SampleCounts

JOURNAL_FILE_NAME = "journal.jsonl"
# A flush takes some milliseconds; a killed run loses at most this much work.
_SECONDS_BETWEEN_LINES = 5.0


@dataclass
class SplitState:
    """Counts of one split so far, and its open document."""

    documents: DocumentCounts = field(default_factory=DocumentCounts)
    samples: SampleCounts = field(default_factory=SampleCounts)
    open_document: OpenDocument | None = None


@dataclass
class Progress:
    """Position of one pass over input files."""

    pass_name: str
    file_number: int = 0
    position: int = 0
    """Where the next block begins in that file."""
    num_documents: int = 0
    """Documents of that file before the position."""
    num_digests: int = 0
    splits: dict[str, SplitState] = field(default_factory=dict)
    is_done: bool = False


class Journal:
    """The journal of one preparation; `last` is the newest progress of each pass."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self._path = directory / JOURNAL_FILE_NAME
        self.last: dict[str, Progress] = {}
        self._written = time.monotonic()
        if self._path.exists():
            self._read()
        else:
            self._append({"fingerprint": fingerprint})

    @staticmethod
    def fingerprint_of(directory: Path) -> str | None:
        """The fingerprint of an interrupted preparation; None if it has no journal yet."""
        try:
            with (directory / JOURNAL_FILE_NAME).open(encoding="utf-8") as file:
                return str(json.loads(file.readline())["fingerprint"])
        except (OSError, ValueError, KeyError):
            return None

    @property
    def is_due(self) -> bool:
        """Whether it is time to write a line."""
        return time.monotonic() - self._written >= _SECONDS_BETWEEN_LINES

    def write(self, progress: Progress) -> None:
        """Record progress; the corpus files must have been flushed up to it."""
        self._append(dataclasses.asdict(progress))
        self._written = time.monotonic()

    def _append(self, content: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed while writing the last line
            os.truncate(self._path, len(whole))
        for line in whole.decode().splitlines()[1:]:
            progress = _progress_of(json.loads(line))
            self.last[progress.pass_name] = progress


def fingerprint(content: dict[str, Any]) -> str:
    """A hash of everything that must be the same for a preparation to be resumed."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _progress_of(content: dict[str, Any]) -> Progress:
    splits = {
        name: SplitState(
            DocumentCounts(**state["documents"]),
            SampleCounts(**state["samples"]),
            _open_document_of(state["open_document"]),
        )
        for name, state in content["splits"].items()
    }
    return Progress(**{**content, "splits": splits})


def _open_document_of(content: dict[str, Any] | None) -> OpenDocument | None:
    if content is None:
        return None
    return OpenDocument(content["rest"], SampleCounts(**content["counts_before"]))
