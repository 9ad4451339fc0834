"""Files as blocks: what formats take and hand over, opening a file from a position, decoding a block.

A file may be compressed (.gz, .zst); positions count its decompressed bytes.
"""

import gzip
import io
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from full_stack_transformer.errors import DocumentsError, MissingExtraError, install_command

EncodingErrors = Literal["error", "replace"]

# Bytes of a block, many times those of the longest delimiter line. Splitting and stripping the lines of
# 100 MB takes 0.45 s in blocks of 1 MB and 0.91 s in blocks of 4 MB, whose lines do not fit the cache.
BLOCK_BYTES = 1 << 20
_COMPRESSIONS = (".gz", ".zst")
_ZSTD_BLOCK_BYTES = 1 << 14
_REPLACEMENT = "\ufffd"


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
    content: bytes | Sequence[str]
    continues: bool = False
    """Its first document began in the block before."""
    unfinished: bool = False
    """Its last document continues in the next block."""
    is_last: bool = False
    """It is the last block of its file."""
    is_forced: bool = False
    """It was cut between two characters, as no border between words was found."""


@dataclass
class DocumentCounts:
    """What was read; adds up over blocks."""

    num_documents: int = 0
    num_empty_documents: int = 0
    num_duplicate_documents: int = 0
    num_unterminated_documents: int = 0
    num_replaced_characters: int = 0
    num_forced_cuts: int = 0
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

    def blocks(self, path: Path, *, start: int, continues: bool) -> Generator[Block, None, None]:
        """Blocks from `start`; `continues` as the block there has it. Cheap: called by the reader."""
        ...

    def documents(self, block: Block) -> Documents:
        """The documents of a block. Called by workers, in any order."""
        ...


def ending(path: Path) -> str:
    """The ending of the file name that names the format: the one before .gz and .zst."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix


@contextmanager
def open_decompressed(path: Path, start: int) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed, from position `start`.

    Raises:
        DocumentsError: while opening or in the body, when the file cannot be read or is damaged.
        MissingExtraError: .zst needs a package that is not installed.
    """
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as file:
            _skip_to(file, start)
            yield file
    except (OSError, EOFError, zlib.error, _zstd_error()) as error:
        reason = getattr(error, "strerror", None) or error
        raise DocumentsError(
            f"{path} should be a file of documents, but cannot be read: {reason}"
        ) from error


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
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{path} needs the package zstandard, which is not installed; "
                f"install it with: {install_command('data')}"
            ) from error
        return io.BufferedReader(_ZstdFile(raw, zstandard.ZstdDecompressor()))
    return raw


class _ZstdFile(io.RawIOBase):
    """Reads all frames of a file; unlike zstandard's own reader it raises if the file is truncated."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
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
            self._frame = self._frame or self._decompressor.decompressobj()
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        found, self._content = self._content[: len(buffer)], self._content[len(buffer) :]
        buffer[: len(found)] = found
        return len(found)


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
    try:
        return block.content.decode("utf-8")
    except UnicodeDecodeError as error:
        if errors == "error":
            byte = block.content[error.start]
            raise DocumentsError(
                f"{block.path} is not UTF-8: byte {byte:#04x} at offset {block.start + error.start}; convert "
                "it, for instance with iconv, or pass --encoding_errors replace"
            ) from error
    text = block.content.decode("utf-8", "replace")
    counts.num_replaced_characters += text.count(_REPLACEMENT)
    counts.num_replaced_characters -= block.content.count(_REPLACEMENT.encode())
    return text
