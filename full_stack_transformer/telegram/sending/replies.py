"""A text as Telegram messages: the prompt in bold, split where it is too long, nothing lost.

Knows Telegram's limits and formatting; neither the database nor how messages are sent.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from aiogram.types import LinkPreviewOptions, MessageEntity, ReplyParameters
from aiogram.utils.formatting import Bold, Pre, Text

from full_stack_transformer.telegram.state.records import Reply
from full_stack_transformer.telegram.texts import LANGUAGES

# Code points, although offsets of entities count UTF-16 units.
# https://core.telegram.org/bots/api#sendmessage
MAX_MESSAGE_CHARACTERS = 4096
_ZERO_WIDTH_JOINER = "\u200d"
# The longest emoji sequences in use (families, flags of regions) stay below this.
_MAX_CLUSTER_CHARACTERS = 32

# An address that the model invents should not fetch a stranger's page.
NO_PREVIEW = LinkPreviewOptions(is_disabled=True)


@dataclass(frozen=True)
class Piece:
    """One message: text and entities, never a parse mode, because a model's text may look like markup."""

    text: str
    entities: list[MessageEntity]


def reply_pieces(reply: Reply) -> list[Piece]:
    """A finished reply, or an unfinished one with the text so far in `texts`; never empty."""
    words = LANGUAGES[reply.language]
    if reply.finish in ("refused", "failed"):
        return [Piece(getattr(words, reply.finish), [])]
    if reply.finish == "stopped" and not reply.text.strip():
        return [Piece(words.stopped, [])]
    bold = reply.prompt if reply.mode == "continue" else ""
    return text_pieces(bold, reply.text) or [Piece(words.empty, [])]


def text_pieces(bold: str, plain: str) -> list[Piece]:
    """A bold text and a plain one after it, in as many messages as they need.

    Joined, the pieces are the text again, but for pieces of white space alone: Telegram refuses
    those, and trims white space at a message's ends.
    """
    pieces = []
    num_bold = len(bold)
    for text in split_text(bold + plain):
        first, second = text[:num_bold], text[num_bold:]
        num_bold -= len(first)
        if text.strip():
            formatted = Text(Bold(first), second) if first else Text(second)
            pieces.append(Piece(*formatted.render()))
    return pieces


def explained_pieces(explanation: str, codes: list[tuple[str, str]]) -> list[Piece]:
    """Own words, then titled blocks to copy; a long block is split like any text."""
    pieces = [Piece(explanation, [])]
    for title, code in codes:
        for index, part in enumerate(split_text(code, MAX_MESSAGE_CHARACTERS - len(title) - 1)):
            formatted = Text(f"{title}\n", Pre(part)) if index == 0 else Text(Pre(part))
            pieces.append(Piece(*formatted.render()))
    return pieces


def answers_to(message_id: int) -> ReplyParameters:
    """The message that a message answers; who deletes it meanwhile gets the answer all the same."""
    return ReplyParameters(message_id=message_id, allow_sending_without_reply=True)


def split_text(text: str, size: int = MAX_MESSAGE_CHARACTERS) -> list[str]:
    """Pieces of at most `size` code points which, joined, are `text` again.

    Cuts after a line, else after a word, else between characters, but not inside an emoji that is
    made of several code points.
    """
    return list(_pieces(text, size))


def _pieces(text: str, size: int) -> Iterator[str]:
    start = 0
    while len(text) - start > size:
        end = _cut(text, start, size)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, start: int, size: int) -> int:
    end = start + size
    for separator in ("\n", " "):
        # Not in the first half: pieces should be few.
        position = text.rfind(separator, start + size // 2, end)
        if position != -1:
            return position + 1
    for position in range(end, end - _MAX_CLUSTER_CHARACTERS, -1):
        if not _is_inside_cluster(text, position):
            return position
    return end


def _is_inside_cluster(text: str, position: int) -> bool:
    """Whether a reader sees `text[position - 1]` and `text[position]` as one character.

    The part of Unicode's rules (UAX #29) that emoji and accents need.
    """
    before, after = text[position - 1], text[position]
    if _is_regional_indicator(before) and _is_regional_indicator(after):
        run = position
        while run > 0 and _is_regional_indicator(text[run - 1]):
            run -= 1
        return (position - run) % 2 == 1  # flags are pairs
    return (
        _ZERO_WIDTH_JOINER in (before, after)
        or unicodedata.category(after) in ("Mn", "Mc", "Me")
        or "\U0001f3fb" <= after <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= after <= "\U000e007f"  # tags of a region's flag
    )


def _is_regional_indicator(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"
