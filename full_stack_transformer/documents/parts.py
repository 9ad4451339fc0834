"""Parts of a file for different workers: one after the other they give the documents of the whole file.

    file of bytes   |----------|----------|----------|   proposed starts, known without reading
    its documents   |-----|-------|--|------------|--|
    the parts       |-------------|---------------|      each moved to the next border; the second is empty

A border is where a block could begin whatever was read before: after a delimiter line, after a line of JSON
Lines, before any row of Parquet. It depends on the bytes that follow alone, so that two workers agree on it
without having seen each other. Compressed files have no parts.
"""

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from full_stack_transformer.documents.blocks import Block, ReadingOptions
from full_stack_transformer.documents.formats import format_of


@dataclass(frozen=True)
class FilePart:
    """What one worker reads of a file."""

    path: Path
    start: int = 0
    """Position from which it is read; where it is proposed, the part begins at the next border."""
    stop: int | None = None
    """The part ends at the next border from here on; None: it ends with the file."""
    is_proposed: bool = False
    """Whether `start` is no border yet."""
    continues: bool = False
    """A document began before `start`, which is where an earlier run stopped."""


def parts_of(
    path: Path, options: ReadingOptions, *, start: int, continues: bool, num_bytes: int | None
) -> Iterator[FilePart]:
    """Parts of about `num_bytes` from `start` on; without `num_bytes`, or where nothing can be cut, one.

    Args:
        path: the file.
        options: how it is read.
        start: a border, or where a block ended.
        continues: as the block at `start` has it.
        num_bytes: of a part.
    """
    cuts = [] if num_bytes is None else format_of(path, options).cuts(path, num_bytes)
    cuts = [cut for cut in cuts if cut > start]
    for first, stop in zip([start, *cuts], [*cuts, None], strict=True):
        yield FilePart(path, first, stop, first != start, continues and first == start)


def blocks_of(part: FilePart, options: ReadingOptions) -> Generator[Block, None, None]:
    """The blocks of a part; none if no document begins in it."""
    document_format = format_of(part.path, options)
    start, stop = part.start, part.stop
    if part.is_proposed:
        border = document_format.border(part.path, start, stop)
        if border is None:
            return
        start = border
    if stop is not None:
        stop = document_format.border(part.path, stop, None)
    blocks = document_format.blocks(part.path, start=start, continues=part.continues, stop=stop)
    with contextlib.closing(blocks):
        yield from blocks
