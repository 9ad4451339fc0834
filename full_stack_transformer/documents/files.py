"""Which files hold documents, and how they are opened."""

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from full_stack_transformer.errors import DocumentsError, MissingExtraError

_COMPRESSIONS = (".gz", ".zst")
_ZSTD_BLOCK_BYTES = 1 << 14
JSON_LINES_ENDINGS = (".jsonl", ".ndjson")
PARQUET_ENDING = ".parquet"
# What a directory is searched for; a file that is named is taken whatever its ending.
_ENDINGS_IN_DIRECTORIES = (".txt", *JSON_LINES_ENDINGS, PARQUET_ENDING)


def find_document_files(paths: Sequence[Path], flag: str) -> list[Path]:
    """The files themselves, and the files of directories in the order of their names.

    Raises:
        DocumentsError: a path does not exist, or a directory holds no documents.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            inside = sorted(one for one in path.rglob("*") if one.is_file() and _is_readable(one))
            if not inside:
                raise DocumentsError(
                    f"{flag} {path} holds no file ending in {', '.join(_ENDINGS_IN_DIRECTORIES)} "
                    "(.gz and .zst of them too)"
                )
            found += inside
        else:
            raise DocumentsError(f"{flag} {path} does not exist; expected a file of documents")
    return found


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
                "install it with: pip install -c constraints.txt -e '.[data]'"
            ) from error
        return io.BufferedReader(_ZstdFile(raw, zstandard.ZstdDecompressor()))
    return raw


class _ZstdFile(io.RawIOBase):
    """All frames of a file; zstandard's own reader takes a file that was cut off for its end."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self._raw = raw
        self._decompressor = decompressor
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        """It is."""
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


def ending(path: Path) -> str:
    """What the name says of the content: its ending before .gz and .zst."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix


def _is_readable(path: Path) -> bool:
    return ending(path) in _ENDINGS_IN_DIRECTORIES and not path.name.startswith(".")
