"""What a user sees: finished texts, buttons, bold parts; shared by the tests of the bot."""

from typing import Any

from full_stack_transformer.telegram.texts import ENGLISH
from tests.fake_bot_api.process import FakeBotApi

Json = dict[str, Any]


def finals(telegram: FakeBotApi, chat_id: int, at_least: int = 1) -> list[Json]:
    """Finished texts of a chat, once there are `at_least` of them."""
    return telegram.bot_messages(chat_id, at_least, button=ENGLISH.repeat_button)


def words_of(telegram: FakeBotApi, chat_id: int, command: str, **more: Any) -> Json:
    """The bot's next message after a command."""
    num_before = len(telegram.bot_messages(chat_id))
    telegram.write(chat_id, command, **more)
    return telegram.bot_messages(chat_id, at_least=num_before + 1)[-1]


def bold_part(message: Json) -> str:
    """What an entity marks as bold, by UTF-16 offsets."""
    (entity,) = message["entities"]
    assert entity["type"] == "bold"
    start, end = entity["offset"], entity["offset"] + entity["length"]
    units = str(message["text"]).encode("utf-16-le")
    return units[2 * start : 2 * end].decode("utf-16-le")


def labels(message: Json) -> list[list[str]]:
    """Texts of the buttons, row by row."""
    return [[b["text"] for b in row] for row in message["reply_markup"]["inline_keyboard"]]
