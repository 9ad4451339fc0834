"""Texts and buttons as Telegram messages: bold prompts, long texts split, callback data.

Knows Telegram's limits and formatting; neither the database nor how messages are sent.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from aiogram.filters.callback_data import CallbackData
from aiogram.methods import EditMessageText, SendMessage
from aiogram.types import (
    InlineKeyboardButton,
    InlineKeyboardMarkup,
    LinkPreviewOptions,
    MessageEntity,
    ReplyParameters,
)
from aiogram.utils.formatting import Bold, Pre, Text
from pydantic import Field

from full_stack_transformer.telegram.state.settings import (
    MODES,
    NUMERIC_FIELDS,
    PRESETS,
    Settings,
    preset_of,
)
from full_stack_transformer.telegram.texts import Words

# Code points, although offsets of entities count UTF-16 units.
# https://core.telegram.org/bots/api#sendmessage
MAX_MESSAGE_CHARACTERS = 4096
_ZERO_WIDTH_JOINER = "\u200d"
# The longest emoji sequences in use (families, flags of regions) are shorter.
_MAX_CLUSTER_CHARACTERS = 32

# Telegram takes a hundred buttons at most.
_MAX_MODELS = 20
# A URL that the model invents must not fetch a stranger's page.
_NO_PREVIEW = LinkPreviewOptions(is_disabled=True)


@dataclass(frozen=True)
class Piece:
    """The text of one message, with entities: never a parse mode, as generated text may look like markup."""

    text: str
    entities: list[MessageEntity]


# Messages


def new_message(
    chat_id: int,
    thread_id: int | None,
    piece: Piece,
    reply_to: int | None = None,
    keyboard: InlineKeyboardMarkup | None = None,
) -> SendMessage:
    """A message, sent also if the one that it replies to was deleted."""
    return SendMessage(
        chat_id=chat_id,
        message_thread_id=thread_id or None,
        text=piece.text,
        entities=piece.entities,
        parse_mode=None,
        link_preview_options=_NO_PREVIEW,
        reply_parameters=ReplyParameters(message_id=reply_to, allow_sending_without_reply=True)
        if reply_to
        else None,
        reply_markup=keyboard,
    )


def edited_message(
    chat_id: int, message_id: int, piece: Piece, keyboard: InlineKeyboardMarkup | None
) -> EditMessageText:
    """A message with another text."""
    return EditMessageText(
        chat_id=chat_id,
        message_id=message_id,
        text=piece.text,
        entities=piece.entities,
        parse_mode=None,
        link_preview_options=_NO_PREVIEW,
        reply_markup=keyboard,
    )


# Texts


def text_pieces(bold: str, plain: str) -> list[Piece]:
    """A bold text and a plain one after it, in as many messages as they need.

    Joined, the pieces are the whole text, except for pieces of white space alone: Telegram refuses
    those, and trims white space at both ends of a message.
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
    """An explanation, then titled code blocks to copy; a long block is split like any text."""
    pieces = [Piece(explanation, [])]
    for title, code in codes:
        for index, part in enumerate(split_text(code, MAX_MESSAGE_CHARACTERS - len(title) - 1)):
            formatted = Text(f"{title}\n", Pre(part)) if index == 0 else Text(Pre(part))
            pieces.append(Piece(*formatted.render()))
    return pieces


def split_text(text: str, size: int = MAX_MESSAGE_CHARACTERS) -> list[str]:
    """Pieces of at most `size` code points which, joined, are `text` again.

    Splits after a line, else after a word, else between characters, but not inside an emoji that
    consists of several code points.
    """
    return list(_pieces(text, size))


def _pieces(text: str, size: int) -> Iterator[str]:
    start = 0
    while len(text) - start > size:
        end = _split_position(text, start, size)
        yield text[start:end]
        start = end
    yield text[start:]


def _split_position(text: str, start: int, size: int) -> int:
    end = start + size
    for separator in ("\n", " "):
        # Not in the first half, to keep the number of pieces low.
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


# Buttons. Their callback data is untrusted input: whoever handles a press checks it against the database.

# The version of the format. "/" separates, as it did before aiogram's CallbackData was used, so that the
# buttons of old messages still work; the first field tells the classes apart.
_FORMAT = "2"
_Id = Annotated[int, Field(ge=0, lt=10**18)]  # what SQLite holds


class ReplyButton(CallbackData, prefix=_FORMAT, sep="/"):
    """An action on a reply; `panel` opens the settings."""

    action: Literal["repeat", "continue", "panel", "stop"]
    reply_id: _Id


class VariantButton(CallbackData, prefix=_FORMAT, sep="/"):
    """Shows another variant of a reply."""

    action: Literal["show"] = "show"
    reply_id: _Id
    variant: _Id


class SettingButton(CallbackData, prefix=_FORMAT, sep="/"):
    """Changes a setting; for the user whose button it is."""

    action: Literal["set"] = "set"
    user_id: _Id
    name: str
    change: str


class ForgetButton(CallbackData, prefix=_FORMAT, sep="/"):
    """Confirms /forget; for the user whose button it is."""

    action: Literal["forget"] = "forget"
    user_id: _Id


Button = ReplyButton | VariantButton | SettingButton | ForgetButton


def parse_button(data: str | None) -> Button | None:
    """The button that callback data belongs to; None for invalid data or those of another version."""
    for kind in (ReplyButton, VariantButton, SettingButton, ForgetButton):
        try:
            return kind.unpack(data or "")
        except (TypeError, ValueError):  # the number of fields, or a value
            continue
    return None


def _button(text: str, button: Button) -> InlineKeyboardButton:
    return InlineKeyboardButton(text=text, callback_data=button.pack())


def reply_keyboard(
    words: Words, reply_id: int, shown: int, num_variants: int
) -> InlineKeyboardMarkup:
    """The buttons below a finished text."""
    rows = []
    if num_variants > 1:
        labels = ("◀", f"{shown + 1}/{num_variants}", "▶")
        rows.append(
            [
                _button(label, VariantButton(reply_id=reply_id, variant=variant % num_variants))
                for label, variant in zip(labels, (shown - 1, shown, shown + 1), strict=True)
            ]
        )
    rows.append(
        [
            _button(words.repeat_button, ReplyButton(action="repeat", reply_id=reply_id)),
            _button(words.continue_button, ReplyButton(action="continue", reply_id=reply_id)),
            _button(words.settings_button, ReplyButton(action="panel", reply_id=reply_id)),
        ]
    )
    return InlineKeyboardMarkup(inline_keyboard=rows)


def stop_keyboard(words: Words, reply_id: int) -> InlineKeyboardMarkup:
    """The button below a text that is being written, where drafts have no Stop of their own."""
    button = _button(words.stop_button, ReplyButton(action="stop", reply_id=reply_id))
    return InlineKeyboardMarkup(inline_keyboard=[[button]])


def forget_keyboard(words: Words, user_id: int) -> InlineKeyboardMarkup:
    """The button below the question of /forget."""
    button = _button(words.forget_button, ForgetButton(user_id=user_id))
    return InlineKeyboardMarkup(inline_keyboard=[[button]])


def key_of_model(name: str) -> str:
    """What stands for a model in callback data, which has no room for long names."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def settings_keyboard(
    words: Words, user_id: int, settings: Settings, models: Sequence[str] = ()
) -> InlineKeyboardMarkup:
    """The buttons of /settings: presets, a line for each number, seed, mode; a line for each of several
    models."""

    def button(
        text: str, name: str, change: str, *, is_chosen: bool = False
    ) -> InlineKeyboardButton:
        mark = "• " if is_chosen else ""
        return _button(mark + text, SettingButton(user_id=user_id, name=name, change=change))

    preset = preset_of(settings)
    rows = [
        [
            button(text, "preset", name, is_chosen=name == preset)
            for name, text in zip(PRESETS, words.presets, strict=True)
        ]
    ]
    for name in NUMERIC_FIELDS:
        label = f"{words.fields[name]}: {words.number(getattr(settings, name))}"
        rows.append([button("−", name, "-"), button(label, name, "0"), button("+", name, "+")])
    seed = words.random_seed if settings.seed is None else str(settings.seed)
    rows.append([button(f"{words.fields['seed']}: {seed}", "seed", "0")])
    rows.append(
        [
            button(text, "mode", mode, is_chosen=mode == settings.mode)
            for mode, text in zip(MODES, words.modes, strict=True)
        ]
    )
    if len(models) > 1:
        chosen = settings.model if settings.model in models else models[0]
        rows += [
            [button(name[:60], "model", key_of_model(name), is_chosen=name == chosen)]
            for name in models[:_MAX_MODELS]
        ]
    return InlineKeyboardMarkup(inline_keyboard=rows)
