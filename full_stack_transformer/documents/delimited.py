"""Delimited text: a document ends before a line that, stripped, equals the delimiter.

Lines end at a line feed only; a carriage return before it belongs to the line end. A delimiter whose line
ends with a carriage return alone is an error. Text after the last delimiter is dropped, and counted.
"""

import re
from collections.abc import Generator
from pathlib import Path

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

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A border between two words: a byte-level BPE with GPT-2's pattern gives both sides the tokens that they have
# in the whole text, because one match ends after the letter and the next begins at the space.
_WORD_BORDER = re.compile(rb"[A-Za-z](?= [A-Za-z])")
_BORDER_WINDOW_BYTES = 1 << 16
# Bytes searched at a time for white space before a cut.
_WHITE_SPACE_BYTES = 64
# A longer line is never a delimiter.
_MAX_DELIMITER_LINE_BYTES = 1 << 15


class DelimitedText:
    """Delimited text; see the module."""

    def __init__(self, options: ReadingOptions) -> None:
        self._options = options
        self._delimiter = options.end_of_document.strip()
        self._delimiter_bytes = self._delimiter.encode()

    def blocks(
        self, path: Path, *, start: int, continues: bool, stop: int | None = None
    ) -> Generator[Block, None, None]:
        """Blocks that end after a delimiter line, or inside a document that is larger than a block."""
        held: list[bytes] = []  # a document that is larger than a block and must not be cut
        pending = b""
        is_inside_line = continues
        with open_decompressed(path, start) as opened:
            file = LimitedReader(opened, start, stop)
            # Always fill a block from where the last one ended: a resumed run cuts at the same places.
            while data := file.read(BLOCK_BYTES - len(pending)):
                buffer = pending + data
                if start == 0 and not held and buffer.startswith(_BYTE_ORDER_MARK):
                    buffer, start = buffer[len(_BYTE_ORDER_MARK) :], len(_BYTE_ORDER_MARK)
                cut, is_forced = self._after_last_delimiter(buffer, is_inside_line), False
                unfinished = False
                if not cut and self._options.can_cut and len(buffer) >= BLOCK_BYTES:
                    cut, is_forced = _inside_document(buffer)
                    unfinished = True
                if not cut:
                    num_held = _before_last_line(buffer)
                    is_inside_line = num_held > buffer.rfind(b"\n") + 1
                    held.append(buffer[:num_held])
                    pending = buffer[num_held:]
                    # Blocks grow by a block: compared with the number of them.
                    if len(held) * BLOCK_BYTES > MAX_WHOLE_BYTES:
                        raise too_large(
                            f"{path}: the document at byte {start:,} (up to a line {self._delimiter!r})",
                            MAX_WHOLE_BYTES,
                        )
                    continue
                content = b"".join([*held, buffer[:cut]])
                end = start + len(content)
                yield Block(path, start, end, content, continues, unfinished, is_forced=is_forced)
                held, pending, start = [], buffer[cut:], end
                continues = is_inside_line = unfinished
        content = b"".join([*held, pending])
        if stop is None:
            yield Block(path, start, start + len(content), content, continues, is_last=True)
        else:
            assert not content, "a part ends after a delimiter"

    def cuts(self, path: Path, num_bytes: int) -> list[int]:
        """Everywhere, if it is not compressed."""
        return cuts_of_text(path, num_bytes)

    def border(self, path: Path, position: int, limit: int | None) -> int | None:
        """After the first delimiter line that begins between `position` and `limit`; the end is none."""
        with open_decompressed(path, position - 1) as file:
            here, is_inside_line = position - 1, True
            while line := file.readline(_MAX_DELIMITER_LINE_BYTES + 1):
                if limit is not None and here >= limit and not is_inside_line:
                    return None
                here += len(line)
                if not is_inside_line and self._is_delimiter(line):
                    return here if file.read(1) else None
                is_inside_line = not line.endswith(b"\n")
        return None

    def _is_delimiter(self, line: bytes) -> bool:
        return (
            self._delimiter_bytes in line
            and line.endswith(b"\n")
            and line.decode("utf-8", "replace").strip() == self._delimiter
        )

    def documents(self, block: Block) -> Documents:
        """The documents of a block; lines are stripped unless the options keep them."""
        assert isinstance(block.content, bytes)
        counts = DocumentCounts(
            num_bytes=block.end - block.start, num_forced_cuts=int(block.is_forced)
        )
        lines = decode(block, self._options.encoding_errors, counts).split("\n")
        stripped = list(map(str.strip, lines))
        if b"\r" in block.content:
            self._refuse_lone_returns(block, lines, stripped)
        # The lines at a cut are parts of a line, never delimiters.
        first = 1 if block.continues else 0
        stop = len(lines) - 1 if block.unfinished else len(lines)
        borders = _positions(stripped, self._delimiter, first, stop)
        kept = self._kept_lines(block, lines, stripped)
        found = Documents([], counts, has_head=block.continues, has_tail=block.unfinished)
        start = 0
        for end in borders:
            _add(found, "\n".join(kept[start:end]), is_head=block.continues and start == 0)
            start = end + 1
        rest = "\n".join(kept[start:])
        if block.unfinished:
            found.texts.append(rest)
        elif (block.continues and start == 0) or (rest and not rest.isspace()):
            assert block.is_last, "only the last block ends without a delimiter"
            counts.num_unterminated_documents += 1
        return found

    def _refuse_lone_returns(self, block: Block, lines: list[str], stripped: list[str]) -> None:
        """Raise if a delimiter would be one if lines ended at lone carriage returns."""
        for index, line in enumerate(stripped):
            if "\r" not in line or self._delimiter not in line:
                continue
            parts = lines[index].split("\r")
            if any(part.strip() == self._delimiter for part in parts):
                offset = sum(len(other.encode()) + 1 for other in lines[:index])
                advice = CONVERT_LINE_ENDS.format(block.path)
                raise DocumentsError(
                    f"{block.path}: a line {self._delimiter!r} after byte {block.start + offset:,} ends with "
                    f"a carriage return alone (CR); lines should end with LF or CRLF, {advice}"
                )

    def _kept_lines(self, block: Block, lines: list[str], stripped: list[str]) -> list[str]:
        """The lines as documents keep them."""
        assert isinstance(block.content, bytes)
        if not self._options.strip_lines:
            has_returns = b"\r" in block.content
            return [line.removesuffix("\r") for line in lines] if has_returns else lines
        # White space at a cut is inside a line.
        if block.continues and block.unfinished and len(lines) == 1:
            return lines
        if block.continues:
            stripped[0] = lines[0].rstrip()
        if block.unfinished:
            stripped[-1] = lines[-1].lstrip()
        return stripped

    def _after_last_delimiter(self, buffer: bytes, is_inside_line: bool) -> int:
        """Position after the last line of `buffer` that is a delimiter, 0 if there is none."""
        before = len(buffer)
        while (found := buffer.rfind(self._delimiter_bytes, 0, before)) >= 0:
            line_start = buffer.rfind(b"\n", 0, found) + 1
            line_end = buffer.find(b"\n", found)
            if line_start == 0 and is_inside_line:
                return 0
            # A line without an end may continue in the next block.
            is_short = 0 <= line_end <= line_start + _MAX_DELIMITER_LINE_BYTES
            if is_short and self._is_delimiter(buffer[line_start : line_end + 1]):
                return line_end + 1
            before = line_start
        return 0


def _positions(lines: list[str], wanted: str, first: int, stop: int) -> list[int]:
    """Where `wanted` stands in `lines[first:stop]`."""
    positions: list[int] = []
    try:
        while True:
            positions.append(lines.index(wanted, first, stop))
            first = positions[-1] + 1
    except ValueError:
        return positions


def _add(found: Documents, text: str, *, is_head: bool) -> None:
    if is_head:
        found.head_ends = True
    elif not text or text.isspace():
        found.counts.num_empty_documents += 1
        return
    found.counts.num_documents += 1
    found.texts.append(text)


def _before_last_line(buffer: bytes) -> int:
    """Where the last line begins, which may become a delimiter; the end, if it is too long for one."""
    line_start = buffer.rfind(b"\n") + 1
    return line_start if len(buffer) - line_start <= _MAX_DELIMITER_LINE_BYTES else len(buffer)


def _inside_document(buffer: bytes) -> tuple[int, bool]:
    """Where to cut a document that is larger than a block, and whether only a border of characters was found.

    The last border of two words before the last line, else a border of two characters.
    """
    limit = _before_last_line(buffer)
    window = buffer[max(0, limit - _BORDER_WINDOW_BYTES) : limit]
    borders = [match.end() for match in _WORD_BORDER.finditer(window)]
    if borders:
        return limit - len(window) + borders[-1], False
    cut = limit - 1
    # Neither inside a character nor inside a line end.
    while cut > 1 and (buffer[cut] & 0xC0 == 0x80 or buffer[cut - 1] in b"\r\n"):
        cut -= 1
    return _before_white_space(buffer, cut), True


def _before_white_space(buffer: bytes, cut: int) -> int:
    """The cut, or where the white space before it begins.

    White space at the end of a line belongs to no document, and only the next block shows whether the line
    ends there.
    """
    moved = cut
    while moved > 0:
        text = buffer[max(0, moved - _WHITE_SPACE_BYTES) : moved].decode("utf-8", "ignore")
        num_bytes = len(text[len(text.rstrip()) :].encode())
        if not num_bytes:
            return moved
        moved -= num_bytes
    return cut
