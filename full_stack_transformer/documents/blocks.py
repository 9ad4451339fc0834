"""What formats take and hand over: options, blocks of bytes or rows, the documents in a block."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

EncodingErrors = Literal["error", "replace"]

# Bytes of a block, many times those of the longest delimiter line. Splitting and stripping the lines of
# 100 MB takes 0.45 s in blocks of 1 MB and 0.91 s in blocks of 4 MB, whose lines do not fit the cache.
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ReadingOptions:
    """How files are turned into documents."""

    end_of_document: str
    strip_lines: bool = True
    text_field: str = "text"
    encoding_errors: EncodingErrors = "error"
    can_cut: bool = False
    """A document larger than a block may be cut at a border between two words."""


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
    """Its last document goes on in the next block."""
    is_last: bool = False
    """Nothing comes after it in its file."""
    is_forced: bool = False
    """No border of words was found to cut at, only one of characters."""


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
    """The documents of a block, in their order; none of the whole ones is empty."""

    texts: list[str]
    counts: DocumentCounts = field(default_factory=DocumentCounts)
    has_head: bool = False
    """The first text belongs to the document that began in the block before."""
    head_ends: bool = False
    """That document ends in this block."""
    has_tail: bool = False
    """The last text is the beginning of a document that goes on, or a further piece of the head's."""


class DocumentFormat(Protocol):
    """How documents lie in a file."""

    def blocks(self, path: Path, *, start: int, continues: bool) -> Generator[Block, None, None]:
        """Blocks from `start`; `continues` as the block there has it. Cheap: called by the reader."""
        ...

    def documents(self, block: Block) -> Documents:
        """The documents of a block. Called by workers, in any order."""
        ...
