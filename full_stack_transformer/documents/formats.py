"""Which files hold documents, and in which format each of them is.

Documents are read more than once, so a stream (`-`, a pipe) is copied to a temporary file first.
"""

import json
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from full_stack_transformer.documents.blocks import (
    CONVERT_LINE_ENDS,
    DocumentFormat,
    ReadingOptions,
    ending,
    open_decompressed,
)
from full_stack_transformer.documents.delimited import DelimitedText
from full_stack_transformer.documents.json_lines import JsonLines
from full_stack_transformer.documents.parquet import Parquet
from full_stack_transformer.errors import DocumentsError, MachineError

logger = logging.getLogger(__name__)

JSON_LINES_ENDINGS = (".jsonl", ".ndjson")
PARQUET_ENDING = ".parquet"
# Taken from directories; a file that is named itself may have any ending.
_ENDINGS_IN_DIRECTORIES = (".txt", *JSON_LINES_ENDINGS, PARQUET_ENDING)
# Standard input, as - or by its device.
_INPUT = Path("-")
_STANDARD_INPUT = (str(_INPUT), "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_COPIED_BYTES = 1 << 20
# Looked at to find out what a stream, or a file without documents, holds.
_SAMPLE_BYTES = 1 << 16
# Names in a log line.
_MAX_NAMES = 5


class StreamCopies(ExitStack):
    """Temporary files with the content of streams; deleted at the end of the `with`."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: set[Path] = set()

    def copy(self, path: Path, flag: str) -> Path:
        """A file with what the stream holds, named for its format.

        Raises:
            DocumentsError: the stream is empty, or was read before.
            MachineError: the disk is full.
        """
        if path in self._copies:
            raise DocumentsError(f"{flag} {path} is a stream, which can be read only once")
        if path == _INPUT and sys.stdin is None:
            raise DocumentsError(f"{flag} {path}: standard input is closed")
        directory = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="fst-")))
        copied = directory / ("standard_input" if path == _INPUT else path.name)
        logger.info("%s %s is read more than once: copying it to %s first", flag, path, directory)
        try:
            with ExitStack() as stack:
                stream = (
                    sys.stdin.buffer if path == _INPUT else stack.enter_context(path.open("rb"))
                )
                num_bytes = _copy(stream, stack.enter_context(copied.open("wb")))
        except OSError as error:
            raise MachineError(
                f"copying {flag} {path} to {directory} failed: {error.strerror or error}; set TMPDIR to a "
                "directory with more space, or write it to a file and name that"
            ) from error
        if not num_bytes:
            raise DocumentsError(f"{flag} {path} is empty; expected documents")
        if not _is_readable(copied):
            copied = copied.rename(directory / f"{copied.name}{_ending_for(copied)}")
        self._copies.add(path)
        return copied


def find_document_files(paths: Sequence[Path], flag: str, copies: StreamCopies) -> list[Path]:
    """The files themselves, and the files of directories in the order of their names.

    Raises:
        DocumentsError: a path does not exist or is no file, or a directory holds no documents.
    """
    found: list[Path] = []
    for named in paths:
        path = named
        if str(path) in _STANDARD_INPUT or str(path).startswith("/dev/fd/"):
            # A file behind it (`< FILE`) has a name, and can be read as often as wanted.
            is_input = str(path) in _STANDARD_INPUT
            file = Path(os.path.realpath("/dev/stdin" if is_input else path))
            path = file if file.is_file() else _INPUT if is_input else path
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            found += _files_of_directory(path, flag)
        elif path == _INPUT or path.is_fifo():
            found.append(copies.copy(path, flag))
        else:
            raise DocumentsError(f"{flag} {path} {_what_it_is(path)}; expected a file of documents")
    return found


def format_of(path: Path, options: ReadingOptions) -> DocumentFormat:
    """The format of a file by its name: .jsonl and .parquet; everything else is delimited text."""
    if ending(path) in JSON_LINES_ENDINGS:
        return JsonLines(options)
    if ending(path) == PARQUET_ENDING:
        return Parquet(options)
    return DelimitedText(options)


def why_without_documents(path: Path, options: ReadingOptions) -> str:
    """What a file holds in which no document was found, and what to do."""
    line = options.end_of_document.strip()
    if isinstance(format_of(path, options), JsonLines | Parquet):
        return f"all texts under {options.text_field!r} (--text_field) are empty"
    with open_decompressed(path, 0) as file:
        sample = file.read(_SAMPLE_BYTES)
    if not sample.strip():
        return "it is empty"
    if b"\0" in sample:
        return "it holds null bytes: it is binary, or UTF-16 without a mark; convert it to UTF-8"
    if _is_json_lines(sample):
        return "its lines are JSON; rename it so that it ends in .jsonl"
    if ending(path) in (".csv", ".tsv", ".json", ".html", ".htm", ".xml"):
        return (
            f"{ending(path)} is not read; write its texts as .jsonl or .parquet, or as text in which a "
            f"line {line!r} ends each document"
        )
    hint = ""
    if b"\r" in sample and b"\n" not in sample:
        hint = f"; its lines end with a carriage return alone, {CONVERT_LINE_ENDS.format(path)}"
    if path.suffix.lower() == ending(path):  # not compressed
        hint += f"; to make it one document: echo '{line}' >> {path}"
    return (
        f"no line is {line!r}, which ends each document, also a single one (--end_of_document names "
        f"another){hint}"
    )


def shortened(names: Sequence[str]) -> str:
    """Names for a log line, the first few of many."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _files_of_directory(directory: Path, flag: str) -> list[Path]:
    """Its files in the order of their names, without hidden ones; what is passed over is logged."""
    found: list[Path] = []
    passed_over: list[str] = []
    for path in _visible_files(directory, passed_over):
        if not path.is_file():
            passed_over.append(f"{path} ({_what_it_is(path)})")
        elif _is_readable(path):
            found.append(path)
        else:
            passed_over.append(str(path))
    if not found:
        raise DocumentsError(
            f"{flag} {directory} holds no file ending in {', '.join(_ENDINGS_IN_DIRECTORIES)} "
            "(.gz and .zst of them too; hidden ones do not count)"
        )
    if passed_over:
        logger.info(
            "%s %s: %s files to read; passed over: %s",
            flag,
            directory,
            f"{len(found):,}",
            shortened(sorted(passed_over)),
        )
    return sorted(found)


def _visible_files(root: Path, passed_over: list[str]) -> Iterator[Path]:
    """What lies below a directory and is not hidden; each directory once, though links lead to it again."""

    def fail(error: OSError) -> None:
        raise DocumentsError(f"{error.filename} cannot be read: {error.strerror}") from error

    # Directories that contain this one are never entered, or a link to / would be everything.
    seen = {_identity(path) for path in root.resolve().parents}
    waiting: list[Path] = [root]
    links: list[Path] = []
    while waiting or links:
        # Real directories first: a link to one of them is not needed.
        start = waiting.pop() if waiting else links.pop(0)
        if _identity(start) in seen:
            passed_over.append(
                f"{start} (a link to a directory that is read already or contains it)"
            )
            continue
        for inside, folders, names in os.walk(start, onerror=fail):
            here = Path(inside)
            seen.add(_identity(here))
            hidden = [name for name in (*folders, *names) if name.startswith(".")]
            passed_over += [f"{here / name} (hidden)" for name in hidden]
            folders[:] = [name for name in folders if not name.startswith(".")]
            links += sorted(here / name for name in folders if (here / name).is_symlink())
            yield from (here / name for name in names if not name.startswith("."))


def _identity(directory: Path) -> tuple[int, int]:
    facts = directory.stat()
    return facts.st_dev, facts.st_ino


def _what_it_is(path: Path) -> str:
    """Why a path is no file, directory or stream."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            return f"is a link to {path.readlink()}, which cannot be followed: {error.strerror}"
        return "does not exist" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
    if stat.S_ISSOCK(mode):
        return "is a socket"
    return "is a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "is a pipe"


def _copy(stream: BinaryIO, target: BinaryIO) -> int:
    num_bytes = 0
    while data := stream.read(_COPIED_BYTES):
        num_bytes += target.write(data)
    target.flush()
    return num_bytes


def _ending_for(path: Path) -> str:
    """The ending that names the format of a file, from its content."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        return PARQUET_ENDING
    compression = {b"\x1f\x8b": ".gz", b"\x28\xb5": ".zst"}.get(start[:2], "")
    compressed = path.rename(path.with_name(f"{path.name}{compression}"))
    with open_decompressed(compressed, 0) as file:
        is_json = _is_json_lines(file.read(_SAMPLE_BYTES))
    compressed.rename(path)
    return f"{JSON_LINES_ENDINGS[0] if is_json else '.txt'}{compression}"


def _is_json_lines(sample: bytes) -> bool:
    """Whether the first line is a JSON object, as far as the sample shows."""
    line, end, _ = sample.lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return not end and line.startswith((b'{"', b'{ "'))


def _is_readable(path: Path) -> bool:
    return ending(path) in _ENDINGS_IN_DIRECTORIES
