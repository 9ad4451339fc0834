"""JSON Lines: each line is an object, the document is the text of one of its fields.

A line is always read as a whole; blocks end at a line feed. A text that is null, empty or white space is an
empty document, which is counted; a row without the field, or with another type there, is an error. Parquet
has the same rules.
"""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from full_stack_transformer.documents.blocks import (
    BLOCK_BYTES,
    CONVERT_LINE_ENDS,
    MAX_WHOLE_BYTES,
    Block,
    DocumentCounts,
    Documents,
    LimitedReader,
    ReadingOptions,
    cuts_of_text,
    decode,
    open_decompressed,
    too_large,
)
from full_stack_transformer.errors import DocumentsError


class JsonLines:
    """JSON Lines; see the module."""

    def __init__(self, options: ReadingOptions) -> None:
        self._options = options

    def blocks(
        self, path: Path, *, start: int, continues: bool, stop: int | None = None
    ) -> Generator[Block, None, None]:
        """Blocks that end after a line."""
        held: list[bytes] = []  # a line that is longer than a block, in pieces
        num_held = 0
        with open_decompressed(path, start) as opened:
            file = LimitedReader(opened, start, stop)
            while data := file.read(BLOCK_BYTES):
                cut = data.rfind(b"\n") + 1
                if not cut:
                    held.append(data)
                    num_held += len(data)
                    if num_held > MAX_WHOLE_BYTES:
                        raise too_large(f"{path}: the line at byte {start:,}", MAX_WHOLE_BYTES)
                    continue
                content = b"".join([*held, data[:cut]])
                held = [data[cut:]]
                num_held = len(data) - cut
                end = start + len(content)
                yield Block(path, start, end, content)
                start, content = end, b""  # not kept while the next is read: a line may be large
        content = b"".join(held)
        if stop is None:
            yield Block(path, start, start + len(content), content, is_last=True)
        else:
            assert not content, "a part ends after a line"

    def cuts(self, path: Path, num_bytes: int) -> list[int]:
        """Everywhere, if it is not compressed."""
        return cuts_of_text(path, num_bytes)

    def border(self, path: Path, position: int, limit: int | None) -> int | None:
        """Where the first line begins between `position` and `limit`; the end is none."""
        with open_decompressed(path, position - 1) as file:
            here, is_inside_line = position - 1, True
            while is_inside_line and (limit is None or here < limit):
                line = file.readline(BLOCK_BYTES)
                if not line:
                    return None
                here += len(line)
                is_inside_line = not line.endswith(b"\n")
            is_border = not is_inside_line and (limit is None or here < limit)
            return here if is_border and file.read(1) else None

    def documents(self, block: Block) -> Documents:
        """The texts of the block's lines; blank lines are skipped."""
        counts = DocumentCounts(num_bytes=block.end - block.start)
        found = Documents([], counts)
        lines = decode(block, self._options.encoding_errors, counts).split("\n")
        lines.reverse()  # taken from the end, as a line may be large
        offset = block.start
        while lines:
            line = lines.pop()
            if line and not line.isspace():
                text = self._text_of(line, block.path, offset)
                if text and not text.isspace():
                    counts.num_documents += 1
                    found.texts.append(text)
                else:
                    counts.num_empty_documents += 1
            offset += (len(line) if line.isascii() else len(line.encode())) + 1
        return found

    def _text_of(self, line: str, path: Path, offset: int) -> str | None:
        field = self._options.text_field
        try:
            row: Any = json.loads(line.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            hint = ""
            if "\r" in line.strip():
                hint = f"; its lines end with a carriage return alone, {CONVERT_LINE_ENDS.format(path)}"
            if "\0" in line:
                hint = "; it holds null bytes, as UTF-16 does; convert it to UTF-8"
            raise DocumentsError(
                f"{path}: the line at byte {offset} should be a JSON object, but is not valid JSON: "
                f"{error}{hint}"
            ) from error
        if isinstance(row, dict) and row.get(field, "") is None:
            return None
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DocumentsError(
                f"{path}: the line at byte {offset} should be a JSON object with a text under {field!r} "
                f"(--text_field), found {_found(row, field)}"
            )
        if "\\u" in line:
            # JSON can contain lone surrogates, which are not valid text.
            return text.encode("utf-8", "replace").decode()
        return text


def _found(row: Any, field: str) -> str:
    if not isinstance(row, dict):
        return type(row).__name__
    if field in row:
        return f"{type(row[field]).__name__} there"
    return f"the fields {', '.join(list(map(repr, row))[:8]) or 'of an empty object'}"
