"""What the buttons below messages carry, and nothing else: at most 64 bytes, made and read here.

Knows neither the database nor who may press; a press is checked against both by who handles it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from aiogram.types import InlineKeyboardButton, InlineKeyboardMarkup

from full_stack_transformer.telegram.state.settings import (
    MODES,
    NUMERIC_FIELDS,
    PRESETS,
    Settings,
    preset_of,
)
from full_stack_transformer.telegram.texts import Words

# The version of the format; buttons of an older one are answered as outdated.
_FORMAT = "2"
# repeat:REPLY, continue:REPLY, show:REPLY:VARIANT, stop:REPLY, panel:REPLY, forget:USER,
# set:USER:FIELD:CHANGE
_PATTERN = re.compile(_FORMAT + r"/([a-z]{3,8})/([0-9]{1,18})((?:/[a-z0-9_+-]{1,20}){0,2})")
_NUM_FIELDS = {
    "repeat": 0,
    "continue": 0,
    "show": 1,
    "stop": 0,
    "panel": 0,
    "forget": 0,
    "set": 2,
}


@dataclass(frozen=True)
class Press:
    """A button's meaning: an action on a reply, or one of a user."""

    action: str
    number: int
    """Of the reply; for `set` and `forget` the user whose button it is."""
    fields: tuple[str, ...] = ()

    def pack(self) -> str:
        """As callback data."""
        data = "/".join((_FORMAT, self.action, str(self.number), *self.fields))
        assert len(data.encode()) <= 64
        return data


def parse_press(data: str | None) -> Press | None:
    """The meaning of callback data; None where it is none of ours, or of another version."""
    match = _PATTERN.fullmatch(data or "")
    if match is None:
        return None
    action, number, rest = match.groups()
    fields = tuple(rest.split("/")[1:])
    if _NUM_FIELDS.get(action) != len(fields):
        return None
    return Press(action, int(number), fields)


def _button(text: str, action: str, number: int, *fields: str) -> InlineKeyboardButton:
    return InlineKeyboardButton(text=text, callback_data=Press(action, number, fields).pack())


def reply_keyboard(
    words: Words, reply_id: int, shown: int, num_variants: int
) -> InlineKeyboardMarkup:
    """Below a finished text."""
    rows = []
    if num_variants > 1:
        before, after = (shown - 1) % num_variants, (shown + 1) % num_variants
        rows.append(
            [
                _button("◀", "show", reply_id, str(before)),
                _button(f"{shown + 1}/{num_variants}", "show", reply_id, str(shown)),
                _button("▶", "show", reply_id, str(after)),
            ]
        )
    rows.append(
        [
            _button(words.repeat_button, "repeat", reply_id),
            _button(words.continue_button, "continue", reply_id),
            _button(words.settings_button, "panel", reply_id),
        ]
    )
    return InlineKeyboardMarkup(inline_keyboard=rows)


def stop_keyboard(words: Words, reply_id: int) -> InlineKeyboardMarkup:
    """Below a text that is being made, where drafts have no Stop of their own."""
    return InlineKeyboardMarkup(inline_keyboard=[[_button(words.stop_button, "stop", reply_id)]])


def forget_keyboard(words: Words, user_id: int) -> InlineKeyboardMarkup:
    """Below the question of /forget."""
    return InlineKeyboardMarkup(inline_keyboard=[[_button(words.forget_button, "forget", user_id)]])


def settings_keyboard(words: Words, user_id: int, settings: Settings) -> InlineKeyboardMarkup:
    """Below /settings: presets, one line for each number, seed and mode."""
    active = preset_of(settings)
    names = dict(zip(PRESETS, words.presets, strict=True))
    rows: list[list[InlineKeyboardButton]] = [
        [
            _button(("• " if name == active else "") + names[name], "set", user_id, "preset", name)
            for name in PRESETS
        ]
    ]
    for name in NUMERIC_FIELDS:
        label = f"{words.fields[name]}: {getattr(settings, name):g}"
        rows.append(
            [
                _button("−", "set", user_id, name, "-"),
                _button(label, "set", user_id, name, "0"),
                _button("+", "set", user_id, name, "+"),
            ]
        )
    seed = words.random_seed if settings.seed is None else str(settings.seed)
    rows.append([_button(f"{words.fields['seed']}: {seed}", "set", user_id, "seed", "0")])
    rows.append(_choices(words, user_id, settings))
    return InlineKeyboardMarkup(inline_keyboard=rows)


def _choices(words: Words, user_id: int, settings: Settings) -> list[InlineKeyboardButton]:
    names: Sequence[str] = words.modes
    return [
        _button(("• " if mode == settings.mode else "") + name, "set", user_id, "mode", mode)
        for mode, name in zip(MODES, names, strict=True)
    ]
