"""A prompt and its continuation as Telegram messages: bold, split where they are too long, a button.

Knows Telegram's limits and formatting; neither the service nor how messages are sent.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from aiogram.filters.callback_data import CallbackData
from aiogram.methods import SendMessage
from aiogram.types import (
    InlineKeyboardButton,
    InlineKeyboardMarkup,
    LinkPreviewOptions,
    ReplyParameters,
)
from aiogram.utils.formatting import Bold, Text

from full_stack_transformer.telegram import texts

# Code points, although offsets of entities count UTF-16 units.
# https://core.telegram.org/bots/api#sendmessage
MAX_MESSAGE_CHARACTERS = 4096
_ZERO_WIDTH_JOINER = "\u200d"
# The longest emoji sequences in use (families, flags of regions) stay below this.
_MAX_CLUSTER_CHARACTERS = 32


class RepeatButton(CallbackData, prefix="repeat"):
    """Asks for another continuation; the prompt is the message that its message replies to.

    Nothing about the prompt is kept here or in the bot, so buttons outlive a restart.
    """


@dataclass(frozen=True)
class Place:
    """Where an answer belongs: its chat, the topic of a forum, the message that it replies to."""

    chat_id: int
    thread_id: int | None
    message_id: int


def sentence(place: Place, words: str) -> SendMessage:
    """A message of the bot's own words."""
    return _message(place, Text(words), None)


def continuation(place: Place, prompt: str, continued: str) -> list[SendMessage]:
    """The prompt in bold and its continuation, in as many messages as they need.

    Every message replies to the prompt and the last one carries the Repeat button. A piece of
    white space alone is left out: Telegram refuses it, and trims white space at a message's ends.
    """
    formatted: list[Text] = []
    num_bold = len(prompt)
    for piece in split_text(prompt + continued):
        bold, plain = piece[:num_bold], piece[num_bold:]
        num_bold -= len(bold)
        if piece.strip():
            formatted.append(Text(Bold(bold), plain) if bold else Text(plain))
    button = InlineKeyboardButton(text=texts.REPEAT_BUTTON, callback_data=RepeatButton().pack())
    keyboard = InlineKeyboardMarkup(inline_keyboard=[[button]])
    last = len(formatted) - 1
    return [
        _message(place, text, keyboard if index == last else None)
        for index, text in enumerate(formatted)
    ]


def _message(place: Place, text: Text, keyboard: InlineKeyboardMarkup | None) -> SendMessage:
    return SendMessage(
        chat_id=place.chat_id,
        message_thread_id=place.thread_id,
        reply_parameters=ReplyParameters(
            message_id=place.message_id,
            # Who deletes the prompt meanwhile gets the answer all the same.
            allow_sending_without_reply=True,
        ),
        reply_markup=keyboard,
        # An address that the model invents should not fetch a stranger's page.
        link_preview_options=LinkPreviewOptions(is_disabled=True),
        **text.as_kwargs(),  # clears the parse mode: a model's text may look like markup
    )


def split_text(text: str) -> list[str]:
    """Pieces of at most 4096 code points which, joined, are `text` again.

    Cuts after a line, else after a word, else between characters, but not inside an emoji that is
    made of several code points.
    """
    return list(_pieces(text))


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > MAX_MESSAGE_CHARACTERS:
        end = _cut(text, start)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, start: int) -> int:
    end = start + MAX_MESSAGE_CHARACTERS
    for separator in ("\n", " "):
        # Not in the first half: pieces should be few.
        position = text.rfind(separator, start + MAX_MESSAGE_CHARACTERS // 2, end)
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
