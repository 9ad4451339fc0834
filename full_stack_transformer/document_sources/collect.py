"""`fst collect_documents SOURCE`: write ready-made documents as train.txt and valid.txt.

    SOURCE ──> documents ──split by the name of their source──> train.txt, valid.txt

Knows the format of the files: each document is followed by a delimiter line. Knows nothing of where
documents come from.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from full_stack_transformer.arguments.data import CollectDocumentsArguments
from full_stack_transformer.document_sources.documents import Document
from full_stack_transformer.document_sources.nietzsche import nietzsche_documents
from full_stack_transformer.document_sources.python_docs import python_documents
from full_stack_transformer.document_sources.task_files import collect_task_rows
from full_stack_transformer.errors import MachineError, UsageError
from full_stack_transformer.storage import sync_directory, write_text

logger = logging.getLogger(__name__)

_SOURCES: dict[str, Callable[[], Iterable[Document]]] = {
    "python_docs": python_documents,
    "nietzsche": nietzsche_documents,
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
        return collect_task_rows(arguments, arguments.task)
    start = time.perf_counter()
    files = _Files(_check_delimiter(arguments.end_of_document))
    for document in _SOURCES[arguments.source]():
        files.add(document)
    directory = arguments.documents_root / arguments.source
    # In memory: a source has a few megabytes, and no file is changed until all of it is there.
    num_bytes = _write(directory, files)
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


def _write(directory: Path, files: _Files) -> int:
    """Replace both files when both are on the disk; the number of bytes written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as name:
            partial = Path(name)
            contents = {"train.txt": files.train, "valid.txt": files.valid}
            for file_name, lines in contents.items():
                write_text(partial / file_name, "".join(f"{line}\n" for line in lines))
            num_bytes = sum((partial / file_name).stat().st_size for file_name in contents)
            for file_name in contents:
                (partial / file_name).replace(directory / file_name)
        sync_directory(directory)
    except OSError as error:
        raise MachineError(
            f"writing to {directory} failed: {error.strerror or error}; free disk space, fix "
            "the permissions, or pass another --documents_root"
        ) from error
    return num_bytes


def _note_on_dropped_lines(files: _Files) -> str:
    if not files.num_dropped_lines:
        return ""
    return f"; dropped {files.num_dropped_lines:,} lines that equal the delimiter"
