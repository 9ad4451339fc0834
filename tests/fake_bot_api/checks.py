"""Validation as in Telegram: texts, entities, keyboards, numbers, with Telegram's error descriptions."""

import json
from typing import Any

from tests.fake_bot_api.state import ApiError, Json

MAX_TEXT_CHARACTERS = 4096
MAX_CALLBACK_DATA_BYTES = 64

# https://core.telegram.org/bots/api#messageentity
ENTITY_TYPES = frozenset(
    [
        "mention",
        "hashtag",
        "cashtag",
        "bot_command",
        "url",
        "email",
        "phone_number",
        "bold",
        "italic",
        "underline",
        "strikethrough",
        "spoiler",
        "blockquote",
        "expandable_blockquote",
        "code",
        "pre",
        "text_link",
        "text_mention",
        "custom_emoji",
    ]
)
# https://core.telegram.org/bots/api#inlinekeyboardbutton, beside callback_data
_OTHER_BUTTON_ACTIONS = ("url", "web_app", "switch_inline_query", "copy_text", "pay")


def refuse(description: str) -> ApiError:
    """A response 400."""
    return ApiError(400, f"Bad Request: {description}")


def integer(parameters: Json, name: str, default: int | None = None) -> int:
    """A whole number; a parameter may arrive as text."""
    value = parameters.get(name, default)
    try:
        return int(str(value))
    except ValueError:
        raise refuse(f'field "{name}" must be a valid Number') from None


def from_json(parameters: Json, name: str, kind: type, default: Any) -> Any:
    """A nested value, which arrives as JSON text (or as it is, in a JSON body)."""
    value = parameters.get(name, default)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise refuse(f"can't parse {name} JSON object") from None
    if value is not default and not isinstance(value, kind):
        raise refuse(f'field "{name}" must be of type {kind.__name__}')
    return value


def units(text: str) -> int:
    """Length in UTF-16 units, which is how entities count."""
    return len(text.encode("utf-16-le")) // 2


def checked_text(parameters: Json) -> tuple[str, list[Json]]:
    """The text and entities of a message as Telegram keeps them: without white space at the ends."""
    sent = str(parameters.get("text", ""))
    if parameters.get("parse_mode"):
        raise refuse("unsupported parse_mode (this server takes entities only)")
    text = sent.strip()
    if not text:
        raise refuse("message text is empty")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise refuse("message is too long")
    entities = from_json(parameters, "entities", list, [])
    for entity in entities:
        _check_entity(entity, sent)
    return text, _clipped(entities, units(sent) - units(sent.lstrip()), units(text))


def _check_entity(entity: Any, text: str) -> None:
    if not isinstance(entity, dict) or entity.get("type") not in ENTITY_TYPES:
        raise refuse("can't parse MessageEntity: unsupported type")
    offset, length = entity.get("offset"), entity.get("length")
    if type(offset) is not int or type(length) is not int or offset < 0 or length <= 0:
        raise refuse("can't parse MessageEntity: offset or length is no valid number")
    if offset + length > units(text):
        raise refuse("ENTITY_BOUNDS_INVALID")
    encoded = text.encode("utf-16-le")
    for edge in (offset, offset + length):
        following = encoded[2 * edge : 2 * edge + 2]
        if following and 0xDC00 <= int.from_bytes(following, "little") <= 0xDFFF:
            raise refuse("entity begins or ends in a middle of a UTF-16 symbol")


def _clipped(entities: list[Json], shift: int, size: int) -> list[Json]:
    """Entities moved along when white space before them was cut off."""
    kept = []
    for entity in entities:
        start = max(0, entity["offset"] - shift)
        end = min(size, entity["offset"] + entity["length"] - shift)
        if end > start:
            kept.append({**entity, "offset": start, "length": end - start})
    return kept


def checked_keyboard(parameters: Json) -> Json | None:
    """An inline keyboard, the only kind of reply markup that is known here."""
    markup = from_json(parameters, "reply_markup", dict, None)
    if markup is None:
        return None
    rows = markup.get("inline_keyboard")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise refuse("object expected as reply markup")
    for button in (button for row in rows for button in row):
        _check_button(button)
    return {"inline_keyboard": rows}


def _check_button(button: Any) -> None:
    if not isinstance(button, dict) or not button.get("text"):
        raise refuse("can't parse inline keyboard button: text is empty")
    data = button.get("callback_data")
    if data is None:
        if not any(action in button for action in _OTHER_BUTTON_ACTIONS):
            raise refuse("can't parse inline keyboard button: Text buttons are unallowed in it")
    elif not 1 <= len(str(data).encode()) <= MAX_CALLBACK_DATA_BYTES:
        raise refuse("BUTTON_DATA_INVALID")
