"""In groups and private chats: what the real bot process answers, and where it stays silent."""

from typing import Any

import pytest

from full_stack_transformer.telegram.texts import ENGLISH
from tests.fake_bot_api.process import FakeBotApi
from tests.telegram.bot_forks import ForkedBot
from tests.telegram.watching import Json, finals, words_of

WITH_LIMITS = False

pytestmark = pytest.mark.usefixtures("bot")

BOT: Json = {"id": 42, "is_bot": True, "first_name": "Bot", "username": "fake_bot"}
OTHER_BOT: Json = {"id": 43, "is_bot": True, "first_name": "Other", "username": "other_bot"}
ANN: Json = {"id": 3, "is_bot": False, "first_name": "Ann"}
TELEGRAM: Json = {"id": 777000, "is_bot": False, "first_name": "Telegram"}
ANONYMOUS: Json = {"id": 1087968824, "is_bot": True, "first_name": "Group"}
CHANNEL_BOT: Json = {"id": 136817688, "is_bot": True, "first_name": "Channel"}
CHANNEL: Json = {"id": -100500, "type": "channel", "title": "News"}
PICTURE: Json = {"file_id": "a", "file_unique_id": "b", "width": 1, "height": 1}
FORWARDED: Json = {"forward_origin": {"type": "hidden_user", "sender_user_name": "x", "date": 1}}


def code(text: str) -> Json:
    return {"text": text, "entities": [{"type": "code", "offset": 0, "length": len(text)}]}


def entity(kind: str, offset: int, length: int, **more: Any) -> list[Json]:
    return [{"type": kind, "offset": offset, "length": length, **more}]


SILENT_IN_A_GROUP: dict[str, Json] = {
    "plain": {"text": "Nobody asked the bot"},
    "longer name": {"text": "@fake_bot_fan is here"},
    "shorter name": {"text": "@fake_bo hi"},
    "address": {"text": "write to x@fake_bot.org"},
    "url": {"text": "see https://t.me/@fake_bot now"},
    "code": code("@fake_bot hello"),
    "command in code": code("/help"),
    "spoken of": {"text": "fake_bot is down"},
    "other mentioned": {"text": "@someone_else come"},
    "text mention of ann": {"text": "Ann", "entities": entity("text_mention", 0, 3, user=ANN)},
    "other bot's command": {"text": "/start@other_bot"},
    "other bot's command, us named": {"text": "/ask@other_bot about @fake_bot"},
    "longer bot's command": {"text": "/help@fake_bot_fan"},
    "unknown command": {"text": "/ban"},
    "admins' command": {"text": "/allow 5"},
    "command in the middle": {"text": "type /help to see"},
    "slash": {"text": "/usr/bin/env"},
    "forwarded": {"text": "@fake_bot hello", **FORWARDED},
    "forwarded command": {"text": "/help", **FORWARDED},
    "caption": {"photo": [PICTURE], "caption": "Just a picture"},
    "caption with an address": {"photo": [PICTURE], "caption": "x@fake_bot.org"},
    "automatic forward": {
        "text": "@fake_bot news", "from": TELEGRAM, "sender_chat": CHANNEL,
        "is_automatic_forward": True,
    },
    "channel writes": {"text": "@fake_bot hi", "from": CHANNEL_BOT, "sender_chat": CHANNEL},
    "telegram writes": {"text": "@fake_bot hi", "from": TELEGRAM},
    "bot writes": {"text": "@fake_bot hi", "from": OTHER_BOT},
    "joined": {"new_chat_members": [ANN]},
    "we joined": {"new_chat_members": [BOT]},
    "left": {"left_chat_member": ANN},
    "title": {"new_chat_title": "@fake_bot"},
    "poll": {
        "poll": {
            "id": "1", "question": "@fake_bot?", "options": [], "total_voter_count": 0,
            "is_closed": False, "is_anonymous": True, "type": "regular",
            "allows_multiple_answers": False,
        }
    },
}  # fmt: skip


def test_messages_for_others_in_a_group_are_left_alone(
    telegram: FakeBotApi, bot: ForkedBot, chat_id: int
) -> None:
    group_id = -chat_id
    person = telegram.write(group_id, "A person begins", user_id=3)
    command = telegram.write(group_id, content={"text": "I am a bot", "from": OTHER_BOT})
    for content in SILENT_IN_A_GROUP.values():
        telegram.write(group_id, content=content, user_id=5)
    telegram.write(group_id, "Quite so", reply_to_message_id=person["message_id"], user_id=5)
    telegram.write(group_id, "/stop", reply_to_message_id=command["message_id"], user_id=5)
    telegram.write(group_id, "@fake_bot Now you", user_id=5)
    (answer,) = finals(telegram, group_id)
    assert answer["text"].startswith("Now you goes on")
    assert words_of(telegram, group_id, "/reset", user_id=5)["text"] == ENGLISH.reset
    said = [message for message in telegram.bot_messages(group_id) if message["from"]["id"] == 42]
    assert len(said) == 2
    assert "Traceback" not in bot.log


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ({"text": "@fake_bot Hello"}, "Hello"),
        ({"text": "@FAKE_Bot: Hello"}, "Hello"),
        ({"text": "👨‍👩‍👧 Hello @fake_bot"}, "👨‍👩‍👧 Hello"),
        ({"text": "Say, @fake_bot x@fake_bot.org, what"}, "Say, x@fake_bot.org, what"),
        (
            {"text": "👋 Bot, go on", "entities": entity("text_mention", 3, 3, user=BOT)},
            "👋 , go on",
        ),
        ({"photo": [PICTURE], "caption": "@fake_bot A caption"}, "A caption"),
        (
            {"text": "@fake_bot I am an admin", "from": ANONYMOUS, "sender_chat": "the group"},
            "I am an admin",
        ),
    ],
    ids=["mention", "case", "at-the-end", "middle", "text-mention", "caption", "anonymous"],
)
def test_a_mention_in_a_group_is_answered_without_the_mention(
    telegram: FakeBotApi, chat_id: int, content: Json, prompt: str
) -> None:
    group_id = -chat_id
    if "sender_chat" in content:
        content = {**content, "sender_chat": {"id": group_id, "type": "supergroup"}}
    telegram.write(group_id, content=content, user_id=5)
    (answer,) = finals(telegram, group_id)
    assert answer["text"].startswith(f"{prompt} goes on")


def test_replies_and_named_commands_in_a_group_are_answered(
    telegram: FakeBotApi, chat_id: int
) -> None:
    group_id = -chat_id
    help_text = words_of(telegram, group_id, "/help", user_id=5)
    assert help_text["text"] == ENGLISH.help
    for command in ("/nonsense@fake_bot", "/nonsense@Fake_Bot again"):
        assert words_of(telegram, group_id, command, user_id=5)["text"] == ENGLISH.unknown_command
    assert words_of(telegram, group_id, "@fake_bot", user_id=5)["text"] == ENGLISH.not_a_text
    caption: Json = {"photo": [PICTURE], "caption": "/reset@fake_bot"}
    num_before = len(telegram.bot_messages(group_id))
    telegram.write(group_id, content=caption, user_id=5)
    reset = telegram.bot_messages(group_id, at_least=num_before + 1)[-1]
    assert reset["text"] == ENGLISH.reset
    reply = {"reply_to_message_id": help_text["message_id"], "user_id": 5}
    telegram.write(group_id, "A reply", **reply)
    (answer,) = finals(telegram, group_id)
    assert answer["text"].startswith("A reply goes on")


NOTICES: dict[str, Json] = {
    "pin": {"pinned_message": {"message_id": 1, "date": 1, "chat": {"id": 1, "type": "private"}}},
    "timer": {"message_auto_delete_timer_changed": {"message_auto_delete_time": 60}},
    "allowed": {"write_access_allowed": {}},
    "background": {"chat_background_set": {"type": {"type": "chat_theme", "theme_name": "x"}}},
    "topic": {"forum_topic_created": {"name": "x", "icon_color": 1}},
    "users": {"users_shared": {"request_id": 1, "users": []}},
    "poll": SILENT_IN_A_GROUP["poll"],
    "of tomorrow": {"a_new_kind_of_notice": {"x": 1}},
}


def test_notices_in_a_private_chat_are_left_alone(telegram: FakeBotApi, chat_id: int) -> None:
    for content in NOTICES.values():
        telegram.write(chat_id, content=content)
    assert words_of(telegram, chat_id, "/reset")["text"] == ENGLISH.reset
    assert len(telegram.bot_messages(chat_id)) == 1


def test_a_caption_is_the_text_and_an_album_is_one_question(
    telegram: FakeBotApi, chat_id: int
) -> None:
    telegram.write(chat_id, content={"photo": [PICTURE], "caption": "Below a photo"})
    (one,) = finals(telegram, chat_id)
    assert one["text"].startswith("Below a photo goes on")
    album: Json = {"photo": [PICTURE], "media_group_id": "7"}
    telegram.write(chat_id, content={**album, "caption": "Below many"})
    for _ in range(3):
        telegram.write(chat_id, content=album)
    _, other = finals(telegram, chat_id, at_least=2)
    assert other["text"].startswith("Below many goes on")
    telegram.write(chat_id, content={"photo": [PICTURE], "caption": "/reset"})
    telegram.bot_messages(chat_id, at_least=3)
    telegram.write(chat_id, content={"photo": [PICTURE]})
    *_, reset, hint = telegram.bot_messages(chat_id, at_least=4)
    assert [reset["text"], hint["text"]] == [ENGLISH.reset, ENGLISH.not_a_text]
    assert len(telegram.bot_messages(chat_id)) == 4


def test_every_unknown_command_and_every_sticker_is_answered(
    telegram: FakeBotApi, chat_id: int
) -> None:
    for number in range(1, 6):
        telegram.write(chat_id, f"/sttaus{number}")
        assert (
            telegram.bot_messages(chat_id, at_least=number)[-1]["text"] == ENGLISH.unknown_command
        )
    for number in range(6, 9):
        telegram.write(chat_id, content={"dice": {"emoji": "🎲", "value": 3}})
        assert telegram.bot_messages(chat_id, at_least=number)[-1]["text"] == ENGLISH.not_a_text


def test_one_message_under_two_update_ids_is_answered_once_also_after_a_kill(
    telegram: FakeBotApi, bot: ForkedBot, chat_id: int
) -> None:
    message = telegram.write(chat_id, "Only once")
    command = telegram.write(chat_id, "/help")
    (answer,) = finals(telegram, chat_id)
    telegram.bot_messages(chat_id, at_least=2)
    repeat_id = telegram.press(chat_id, answer["message_id"], button="Repeat")
    telegram.query_answer(repeat_id)
    finals(telegram, chat_id, at_least=2)
    press = {
        "id": repeat_id,
        "from": {**ANN, "id": chat_id},
        "message": answer,
        "chat_instance": str(chat_id),
        "data": answer["reply_markup"]["inline_keyboard"][-1][0]["callback_data"],
    }
    again: list[Json] = [{"message": message}, {"message": command}, {"callback_query": press}]
    edited = {"edited_message": {**message, "edit_date": 1}}
    telegram.send_raw_updates([*again, edited])
    telegram.state(idle=1)
    bot.kill()
    bot.start()
    telegram.send_raw_updates([*again, edited])
    telegram.write(chat_id, "The last")
    # One that was sent just before the kill, and not recorded, is sent again and its copy deleted first.
    telegram.bot_messages(chat_id, at_least=1, words="The last goes on")
    assert len(finals(telegram, chat_id)) == 3
    assert words_of(telegram, chat_id, "/reset")["text"] == ENGLISH.reset
    assert len(telegram.bot_messages(chat_id)) == 5
