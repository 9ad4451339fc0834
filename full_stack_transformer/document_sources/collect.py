"""`fst collect_documents SOURCE`: write ready-made documents, or with --task labelled rows.

    SOURCE ──> documents ──split by the name of their source──> SOURCE/train.txt, valid.txt
           ──> rows      ──split by their group───────────────> SOURCE_TASK/train.jsonl, …

All files are written or none. Knows the format of the files: each document is followed by a delimiter line.
Knows nothing of where documents and rows come from.
"""

import json
import logging
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from full_stack_transformer.arguments.data import CollectDocumentsArguments
from full_stack_transformer.document_sources.documents import Document
from full_stack_transformer.document_sources.nietzsche import nietzsche_documents
from full_stack_transformer.document_sources.package_descriptions import package_descriptions
from full_stack_transformer.document_sources.python_docs import python_documents
from full_stack_transformer.document_sources.python_questions import Side
from full_stack_transformer.document_sources.task_rows import TaskRow, task_rows
from full_stack_transformer.errors import MachineError, UsageError
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    file_facts,
    sync_directory,
    write_json,
    write_text,
)

logger = logging.getLogger(__name__)

_SIDES: tuple[Side, ...] = ("train", "valid", "test")
_SOURCES: dict[str, Callable[[], Iterable[Document]]] = {
    "python_docs": python_documents,
    "nietzsche": nietzsche_documents,
    "package_descriptions": package_descriptions,
}


@dataclass
class _Files:
    """The lines of the two files, and counts."""

    end_of_document: str
    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    num_train: int = 0
    num_valid: int = 0
    num_dropped_lines: int = 0

    def add(self, document: Document) -> None:
        """Append a document, without the lines that equal the delimiter."""
        # All of Unicode's line ends, so that no reader finds a delimiter inside.
        lines = document.text.splitlines()
        kept = [line for line in lines if line.strip() != self.end_of_document]
        self.num_dropped_lines += len(lines) - len(kept)
        if not any(line.strip() for line in kept):
            return
        target = self.valid if document.is_for_validation else self.train
        target.extend((*kept, self.end_of_document))
        self.num_valid += document.is_for_validation
        self.num_train += not document.is_for_validation


def main(arguments: CollectDocumentsArguments) -> Path:
    """Write the two files of a source, both or none, and return their directory.

    With --task, write labelled rows.

    Raises:
        UsageError: the delimiter is not a line.
        MachineError: the source cannot be reached, or the files cannot be written.
    """
    if arguments.task is not None:
        return _collect_rows(arguments, arguments.task)
    start = time.perf_counter()
    files = _Files(_check_delimiter(arguments.end_of_document))
    for document in _SOURCES[arguments.source]():
        files.add(document)
    directory = arguments.documents_root / arguments.source
    # In memory: a source has a few megabytes, and no file is changed until all of it is there.
    contents = {"train.txt": files.train, "valid.txt": files.valid}
    with _replacing(directory) as partial:
        for name, lines in contents.items():
            write_text(partial / name, "".join(f"{line}\n" for line in lines))
    num_bytes = sum((directory / name).stat().st_size for name in contents)
    logger.info(
        "collected %s train and %s validation documents, %.1f MB, in %.1f s: %s%s",
        f"{files.num_train:,}",
        f"{files.num_valid:,}",
        num_bytes / 1e6,
        time.perf_counter() - start,
        directory,
        _note_on_dropped_lines(files),
    )
    return directory


def _check_delimiter(end_of_document: str) -> str:
    stripped = end_of_document.strip()
    if len(stripped.splitlines()) != 1:
        raise UsageError(
            f"--end_of_document must be a single line that is not blank, found {end_of_document!r}"
        )
    return stripped


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A folder whose files take their places in `directory` together, at the end of the `with`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as name:
            yield Path(name)
            for file in sorted(Path(name).iterdir()):
                file.replace(directory / file.name)
        sync_directory(directory)
    except OSError as error:
        raise MachineError(
            f"writing to {directory} failed: {error.strerror or error}; free disk space, fix "
            "the permissions, or pass another --documents_root"
        ) from error


def _note_on_dropped_lines(files: _Files) -> str:
    if not files.num_dropped_lines:
        return ""
    return f"; dropped {files.num_dropped_lines:,} lines that equal the delimiter"


def _collect_rows(arguments: CollectDocumentsArguments, task: str) -> Path:
    started = time.perf_counter()
    rows = task_rows(task)
    directory = arguments.documents_root / f"{arguments.source}_{task}"
    with _replacing(directory) as partial:
        for side in _SIDES:
            lines = [json.dumps(row.fields, ensure_ascii=False) for row in rows if row.side == side]
            write_text(partial / f"{side}.jsonl", "".join(f"{line}\n" for line in lines))
        write_json(partial / DESCRIPTION_FILE_NAME, _description(partial, task, rows))
    counts = Counter(row.side for row in rows)
    logger.info(
        "collected %s train, %s validation and %s test rows in %.1f s: %s",
        *(f"{counts[side]:,}" for side in _SIDES),
        time.perf_counter() - started,
        directory,
    )
    return directory


def _description(partial: Path, task: str, rows: Sequence[TaskRow]) -> dict[str, Any]:
    counts = Counter(row.side for row in rows)
    description: dict[str, Any] = {
        "task": task,
        "source": f"docstrings and help topics of Python {platform.python_version()}",
        "fields": list(rows[0].fields),
        "number_of_rows": {side: counts[side] for side in _SIDES},
        "files": {f"{side}.jsonl": file_facts(partial / f"{side}.jsonl") for side in _SIDES},
    }
    if isinstance(rows[0].fields.get("label"), str):
        labels = Counter(str(row.fields["label"]) for row in rows)
        description["number_of_rows_by_label"] = dict(sorted(labels.items()))
    return description
