"""Files -> documents, streamed: only the document at hand is in memory.

A document is what stands before a line that, stripped, equals the delimiter. Lines end at a line
feed and nowhere else (a carriage return before it belongs to the line end). Knows nothing of tokens.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from full_stack_transformer.errors import DocumentsError

logger = logging.getLogger(__name__)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class DocumentCounts:
    """What a reader has seen so far."""

    num_documents: int = 0
    num_empty_documents: int = 0
    num_bytes: int = 0
    num_lines: int = field(default=0, repr=False)


class DocumentReader:
    """Iterates over the documents of one delimited text file; `counts` grows as it goes.

    Args:
        path: a UTF-8 text file.
        end_of_document: the delimiter; white space around it does not matter.
        strip_lines: strip white space at both ends of every line; otherwise only line ends go.

    Raises:
        DocumentsError: while iterating, when the file cannot be read, is not UTF-8, or never
            holds the delimiter.
    """

    def __init__(self, path: Path, *, end_of_document: str, strip_lines: bool = True) -> None:
        self.path = path
        self.counts = DocumentCounts()
        self._delimiter = end_of_document.strip()
        self._strip_lines = strip_lines

    def __iter__(self) -> Iterator[str]:
        lines: list[str] = []
        num_delimiters = 0
        for line in self._decoded_lines():
            if line.strip() != self._delimiter:
                lines.append(line.strip() if self._strip_lines else line)
                continue
            num_delimiters += 1
            document = "\n".join(lines)
            lines.clear()
            if document.strip():
                self.counts.num_documents += 1
                yield document
            else:
                self.counts.num_empty_documents += 1
        self._check_end(num_delimiters, lines)

    def _decoded_lines(self) -> Iterator[str]:
        try:
            with self.path.open("rb") as file:
                for line in file:
                    yield self._decode(line)
        except OSError as error:
            raise DocumentsError(
                f"{self.path} should be a text file of documents, but cannot be read: "
                f"{error.strerror or error}"
            ) from error

    def _decode(self, line: bytes) -> str:
        offset = self.counts.num_bytes
        self.counts.num_bytes += len(line)
        self.counts.num_lines += 1
        if offset == 0 and line.startswith(_BYTE_ORDER_MARK):
            line, offset = line[len(_BYTE_ORDER_MARK) :], len(_BYTE_ORDER_MARK)
        try:
            return line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DocumentsError(
                f"{self.path}: line {self.counts.num_lines} is not UTF-8 "
                f"(byte {line[error.start]:#04x} at offset {offset + error.start}); convert the file, "
                "for instance with iconv"
            ) from error

    def _check_end(self, num_delimiters: int, lines: list[str]) -> None:
        if num_delimiters == 0:
            raise DocumentsError(
                f"{self.path}: expected documents that end with a line {self._delimiter!r}, "
                f"found no such line in {self.counts.num_lines:,} lines; "
                "add one after each document, or pass --end_of_document"
            )
        if any(line.strip() for line in lines):
            logger.warning(
                "%s: the last document has no %s line after it (line %s) and is dropped; add one to keep it",
                self.path,
                self._delimiter,
                f"{self.counts.num_lines:,}",
            )
