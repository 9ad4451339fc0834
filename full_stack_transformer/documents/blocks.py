"""Files as blocks: what formats take and hand over, opening a file from a position, decoding a block.

A file may be compressed (.gz, .zst); positions count its decompressed bytes.
"""

import contextlib
import gzip
import io
import logging
import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from full_stack_transformer.errors import DocumentsError, MissingExtraError, install_command

logger = logging.getLogger(__name__)

EncodingErrors = Literal["error", "replace"]

# Bytes of a block, many times those of the longest delimiter line. Splitting and stripping the lines of
# 100 MB takes 0.45 s in blocks of 1 MB and 0.91 s in blocks of 4 MB, whose lines do not fit the cache.
BLOCK_BYTES = 1 << 20
# The longest line of JSON Lines, and the largest document that a tokenizer wants whole. Each takes some
# five times its size in memory.
MAX_WHOLE_BYTES = 1 << 28
# The longest line where each is a text or a row of a table.
MAX_LINE_BYTES = 1 << 26
_COMPRESSIONS = (".gz", ".zst")
# Compressed bytes at a time: 4 of them can become a block of 128 KiB, so these become at most 16 MiB.
_ZSTD_BLOCK_BYTES = 1 << 9
# The longest frame header (RFC 8878, section 3.1.1.1).
_ZSTD_HEADER_BYTES = 18
# zstd --long=31, the largest window there is. Decompressing takes as much memory as the window, at most.
_ZSTD_MAX_WINDOW_BYTES = 1 << 31
# Larger than this the zstd program asks for --long.
_ZSTD_USUAL_WINDOW_BYTES = 1 << 27
_REPLACEMENT = "\ufffd"
# What to do about lines that end with a carriage return alone, as in files of the first Macintosh.
CONVERT_LINE_ENDS = r"convert them: perl -pe 's/\r\n?/\n/g' {} > NEW_FILE"
# How files begin that are no UTF-8 text, what they are, and what to do.
_CONVERT = "convert it: iconv -f {name} -t UTF-8 {path} > NEW_FILE"
_SIGNATURES = (
    (re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"), "UTF-32", _CONVERT),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "UTF-16", _CONVERT),
    (re.compile(rb"\x1f\x8b"), "gzip", "rename it so that it ends in .gz"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd", "rename it so that it ends in .zst"),
    (re.compile(rb"PAR1"), "Parquet", "rename it so that it ends in .parquet"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "bzip2", "decompress it"),
    (re.compile(rb"\xfd7zXZ\0"), "xz", "decompress it"),
    (re.compile(rb"PK\x03\x04"), "a ZIP archive (or .docx, .xlsx, .epub)", "extract its text"),
    (re.compile(rb"%PDF-\d\.\d"), "PDF", "extract its text"),
)


@dataclass(frozen=True)
class ReadingOptions:
    """How files are turned into documents."""

    end_of_document: str
    strip_lines: bool = True
    text_field: str = "text"
    encoding_errors: EncodingErrors = "error"
    can_cut: bool = False
    """Whether a document larger than a block may be cut between two words."""


@dataclass(frozen=True)
class Block:
    """A part of a file that ends where a document ends, unless that document is larger than a block."""

    path: Path
    start: int
    """Where it begins in the decompressed file: a byte, or a row of a Parquet file."""
    end: int
    """Where the next block begins."""
    content: bytes | Sequence[str | bytes | None]
    continues: bool = False
    """Its first document began in the block before."""
    unfinished: bool = False
    """Its last document continues in the next block."""
    is_last: bool = False
    """It is the last block of its file."""
    is_forced: bool = False
    """It was cut between two characters, as no border between words was found."""

    @property
    def num_held(self) -> int:
        """Its size in memory: bytes, or characters of rows."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return sum(len(text) for text in self.content if text)


@dataclass
class DocumentCounts:
    """What was read; adds up over blocks."""

    num_documents: int = 0
    num_empty_documents: int = 0
    num_duplicate_documents: int = 0
    num_unterminated_documents: int = 0
    num_replaced_characters: int = 0
    num_forced_cuts: int = 0
    num_files_without_documents: int = 0
    num_bytes: int = 0

    def add(self, other: "DocumentCounts") -> None:
        """Add the counts of another block."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Documents:
    """The documents of a block in their order; whole documents are never empty."""

    texts: list[str]
    counts: DocumentCounts = field(default_factory=DocumentCounts)
    has_head: bool = False
    """The first text belongs to the document that began in the block before."""
    head_ends: bool = False
    """That document ends in this block."""
    has_tail: bool = False
    """The last text belongs to a document that continues in the next block."""


class DocumentFormat(Protocol):
    """How documents are stored in a file."""

    def blocks(
        self, path: Path, *, start: int, continues: bool, stop: int | None = None
    ) -> Generator[Block, None, None]:
        """Blocks from `start`, to the border `stop` or else the end; cheap: called by the reader.

        `continues` as the block at `start` has it.
        """
        ...

    def cuts(self, path: Path, num_bytes: int) -> list[int]:
        """Positions near which a file can be cut into parts of about `num_bytes`; see `parts`."""
        ...

    def border(self, path: Path, position: int, limit: int | None) -> int | None:
        """The first place from `position` and before `limit` where a block could begin; else None."""
        ...

    def documents(self, block: Block) -> Documents:
        """The documents of a block. Called by workers, in any order."""
        ...


def ending(path: Path) -> str:
    """The ending of the file name that names the format, in lower case: the one before .gz and .zst."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSIONS else suffix


def cuts_of_text(path: Path, num_bytes: int) -> list[int]:
    """`DocumentFormat.cuts` of files that are read as bytes."""
    if path.suffix.lower() in _COMPRESSIONS:
        return []
    return list(range(num_bytes, path.stat().st_size, num_bytes))


class LimitedReader:
    """Reads the bytes from `start` to `stop`, or all that follow."""

    def __init__(self, file: BinaryIO, start: int, stop: int | None) -> None:
        self._file = file
        self._num_left = None if stop is None else stop - start

    def read(self, num_bytes: int) -> bytes:
        """As of a file."""
        if self._num_left is None:
            return self._file.read(num_bytes)
        content = self._file.read(min(num_bytes, self._num_left))
        self._num_left -= len(content)
        return content


@contextlib.contextmanager
def open_decompressed(path: Path, start: int) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed, from position `start`.

    Raises:
        DocumentsError: while opening or in the body, when the file cannot be read or is damaged.
        MissingExtraError: .zst needs a package that is not installed.
    """
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as file:
            if start == 0:
                _refuse_what_is_no_text(path, file)
            _skip_to(file, start)
            yield file
    except (OSError, EOFError, zlib.error, _zstd_error()) as error:
        reason = getattr(error, "strerror", None) or error
        raise DocumentsError(
            f"{path} should be a file of documents, but cannot be read: {reason}"
        ) from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, from 1; a line ends at a line feed.

    Raises:
        DocumentsError: as `open_decompressed`, or a line is longer than can be held in memory.
    """
    with open_decompressed(path, 0) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise too_large(f"{path}: line {number}", MAX_LINE_BYTES)
            yield number, line


def too_large(what: str, most: int) -> DocumentsError:
    """The error for a line or document that is larger than what is read as a whole."""
    return DocumentsError(
        f"{what} has more than {most >> 20} MiB, and is read as a whole; split it into "
        "documents of less"
    )


def _refuse_what_is_no_text(path: Path, file: BinaryIO) -> None:
    assert isinstance(file, io.BufferedReader)
    start = file.peek(16)[:16]
    for pattern, name, advice in _SIGNATURES:
        if pattern.match(start):
            advice = advice.format(name=name, path=path)
            raise DocumentsError(f"{path} is {name}, expected text in UTF-8; {advice}")


def _skip_to(file: BinaryIO, start: int) -> None:
    if start and file.seekable():
        file.seek(start)
        return
    while start:
        skipped = len(file.read(min(start, 1 << 20)))
        if not skipped:
            return
        start -= skipped


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if suffix == ".zst":
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{path} needs the package zstandard, which is not installed; "
                f"install it with: {install_command('data')}"
            ) from error
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
        return io.BufferedReader(_ZstdFile(path, raw, decompressor))
    return raw


class _ZstdFile(io.RawIOBase):
    """Reads all frames of a file; unlike zstandard's own reader it raises if the file is truncated."""

    def __init__(self, path: Path, raw: BinaryIO, decompressor: Any) -> None:
        self._path = path
        self._raw = raw
        self._decompressor = decompressor
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes.

        Raises:
            EOFError: the file ends within a frame.
        """
        while not self._content:
            if not self._compressed:
                self._compressed = self._raw.read(_ZSTD_BLOCK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends in the middle")
                return 0
            self._frame = self._frame or self._next_frame()
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        found, self._content = self._content[: len(buffer)], self._content[len(buffer) :]
        buffer[: len(found)] = found
        return len(found)

    def _next_frame(self) -> Any:
        """A decompressor for the frame that begins here; a window that takes much memory is logged."""
        import zstandard

        self._compressed += self._raw.read(max(0, _ZSTD_HEADER_BYTES - len(self._compressed)))
        with contextlib.suppress(zstandard.ZstdError):  # no frame: decompressing says so
            window_bytes = zstandard.get_frame_parameters(self._compressed).window_size
            if window_bytes > _ZSTD_USUAL_WINDOW_BYTES:
                _log_window(self._path, window_bytes >> 20)
        return self._decompressor.decompressobj()


@cache
def _log_window(path: Path, num_mebibytes: int) -> None:
    """Once for each file, which is read several times."""
    logger.info(
        "%s was compressed with a window of %s MiB (zstd --long); reading it takes up to as much memory",
        path,
        f"{num_mebibytes:,}",
    )


def _zstd_error() -> type[Exception]:
    try:
        import zstandard
    except ModuleNotFoundError:
        return EOFError
    error: type[Exception] = zstandard.ZstdError
    return error


def decode(block: Block, errors: EncodingErrors, counts: DocumentCounts) -> str:
    """The text of a block; adds the replaced characters to `counts`.

    Raises:
        DocumentsError: the block is not UTF-8 and nothing may be replaced.
    """
    assert isinstance(block.content, bytes)
    return decoded(block.content, str(block.path), block.start, errors, counts)


def decoded(
    content: bytes, place: str, start: int, errors: EncodingErrors, counts: DocumentCounts
) -> str:
    """As `decode`, of bytes that begin at `start` of the place that errors name."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if errors == "error":
            byte = content[error.start]
            raise DocumentsError(
                f"{place} is not UTF-8: byte {byte:#04x} at offset {start + error.start}; convert "
                "it, for instance with iconv, or pass --encoding_errors replace"
            ) from error
    text = content.decode("utf-8", "replace")
    counts.num_replaced_characters += text.count(_REPLACEMENT)
    counts.num_replaced_characters -= content.count(_REPLACEMENT.encode())
    return text
