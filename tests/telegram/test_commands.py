"""Commands, settings and buttons of the real bot process: every test has its own chat."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.telegram.sending.markdown import reply_pieces
from full_stack_transformer.telegram.state.settings import Settings
from full_stack_transformer.telegram.state.store import Reply
from full_stack_transformer.telegram.texts import ENGLISH, RUSSIAN
from tests.fake_bot_api.process import FakeBotApi
from tests.telegram.bot_forks import ForkedBot
from tests.telegram.hostile_updates import NUM_HOSTILE, hostile_updates
from tests.telegram.stand_in_service import MODEL, StandInService
from tests.telegram.watching import Json, finals, labels, words_of

PICTURE: Json = {"file_id": "a", "file_unique_id": "b", "width": 1, "height": 1}

WITH_LIMITS = False

pytestmark = pytest.mark.usefixtures("bot")


def test_settings_are_of_one_chat_and_topic_and_change_in_place(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    panel = words_of(telegram, chat_id, "/settings")
    rows = labels(panel)
    assert rows[0] == ["Precise", "• Balanced", "Creative"]
    assert ["−", "Temperature: auto", "+"] in rows
    for button, expected in (("Creative", "• Creative"), ("Chat", "• Chat")):
        num_edits = len(telegram.requests("editMessageText", chat_id))
        telegram.press(chat_id, panel["message_id"], button=button)
        telegram.requests("editMessageText", chat_id, at_least=num_edits + 1)
        (panel,) = telegram.bot_messages(chat_id)
        assert expected in [label for row in labels(panel) for label in row]
    words_of(telegram, chat_id, "/settings mode continue")
    prompt = f"which settings {chat_id}"
    telegram.write(chat_id, prompt)
    finals(telegram, chat_id)
    group_id = -chat_id
    words_of(telegram, group_id, "/settings temperature 0.5", user_id=3, message_thread_id=1)
    for thread_id in (1, 2):
        text = f"@fake_bot {prompt} {thread_id}"
        telegram.write(group_id, text, user_id=3, message_thread_id=thread_id)
        finals(telegram, group_id, at_least=thread_id)
    temperatures = {
        request.prompt: request.temperature
        for request in service.requests
        if hasattr(request, "prompt") and request.prompt.startswith(prompt)
    }
    assert temperatures == {
        prompt: 1.1,
        f"{prompt} 1": 0.5,
        f"{prompt} 2": None,
    }  # the model decides


@pytest.mark.parametrize(
    "typed", ["temperature 9", "temperature nan", "length 1.5", "seed -1", "nothing 1", "mode x"]
)
def test_invalid_settings_are_answered_with_the_possible_values(
    telegram: FakeBotApi, chat_id: int, typed: str
) -> None:
    answer = words_of(telegram, chat_id, f"/settings {typed}")
    assert answer["text"].startswith(ENGLISH.setting_expected.partition("{")[0])


def test_chat_mode_remembers_the_conversation_until_reset(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    words_of(telegram, chat_id, "/settings mode chat")
    for number, text in enumerate(["Hello", "And you?"], start=1):
        telegram.write(chat_id, text)
        answer = finals(telegram, chat_id, at_least=number)[-1]
        assert answer["text"].startswith(f"You said {text!r}, turn {2 * number - 1}")
        assert "entities" not in answer
    assert words_of(telegram, chat_id, "/reset")["text"] == ENGLISH.reset
    telegram.write(chat_id, "Anew")
    assert "turn 1" in finals(telegram, chat_id, at_least=3)[-1]["text"]
    first = finals(telegram, chat_id)[0]
    telegram.write(chat_id, "Back", reply_to_message_id=first["message_id"])
    assert "turn 3" in finals(telegram, chat_id, at_least=4)[-1]["text"]


def test_why_gives_seed_settings_and_the_commands_that_generate_the_text_again(
    telegram: FakeBotApi, chat_id: int
) -> None:
    assert words_of(telegram, chat_id, "/why")["text"] == ENGLISH.why_nothing
    telegram.write(chat_id, 'It\'s -- "quoted"')
    (answer,) = finals(telegram, chat_id)
    seed = answer["text"].rpartition(" ")[2]
    # The bot remembers a text just after it has sent it, and nobody else answers as fast as a test.
    num_before = 2
    while True:
        telegram.write(chat_id, "/why", reply_to_message_id=answer["message_id"])
        messages = telegram.bot_messages(chat_id, at_least=num_before + 1)
        if messages[num_before]["text"] != ENGLISH.why_nothing:
            break
        num_before += 1
    why, generate, call = telegram.bot_messages(chat_id, at_least=num_before + 3)[num_before:]
    assert f"seed {seed}" in why["text"]
    assert MODEL in why["text"]
    line = shlex.split(generate["text"].split("\n", 1)[1])
    assert line[:4] == ["fst", "generate", MODEL, '--prompt=It\'s -- "quoted"']
    assert f"--seed={seed}" in line
    body = json.loads(shlex.split(call["text"].split("\n", 1)[1])[-1])
    assert (body["prompt"], body["seed"]) == ('It\'s -- "quoted"', int(seed))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("/start", "welcome"),
        ("/start deep-link", "welcome"),
        ("/help@Fake_Bot", "help"),
        ("/reset", "reset"),
        ("/stop", "nothing_to_stop"),
        ("/allow 5", "unknown_command"),
        ("/nonsense", "unknown_command"),
    ],
)
@pytest.mark.parametrize("language", ["ru", "pt-br"])
def test_commands_are_answered_in_the_users_language(
    telegram: FakeBotApi, chat_id: int, command: str, words: str, language: str
) -> None:
    answer = words_of(telegram, chat_id, command, language_code=language)
    assert answer["text"] == getattr(RUSSIAN if language == "ru" else ENGLISH, words)


def test_status_and_privacy(telegram: FakeBotApi, chat_id: int) -> None:
    assert f"The model {MODEL} is ready." in words_of(telegram, chat_id, "/status")["text"]
    assert "/forget" in words_of(telegram, chat_id, "/privacy")["text"]


def test_export_has_everything_and_forget_deletes_it(
    telegram: FakeBotApi, bot: ForkedBot, chat_id: int
) -> None:
    telegram.write(chat_id, "Remember this")
    (answer,) = finals(telegram, chat_id)
    exported = json.loads(words_of(telegram, chat_id, "/export")["document"]["content"])
    (reply,) = exported["replies"]
    assert reply["prompt"] + reply["texts"][0] == answer["text"]
    question = words_of(telegram, chat_id, "/forget")
    num_before = len(telegram.bot_messages(chat_id))
    telegram.press(chat_id, question["message_id"])
    assert telegram.bot_messages(chat_id, num_before + 1)[-1]["text"] == ENGLISH.forgotten
    database = Path(bot.words[bot.words.index("--database") + 1])
    for path in database.parent.iterdir():
        assert b"Remember this" not in path.read_bytes()
    query_id = telegram.press(chat_id, answer["message_id"])
    assert telegram.query_answer(query_id)["text"] == ENGLISH.alert_gone
    assert (
        json.loads(words_of(telegram, chat_id, "/export")["document"]["content"])["replies"] == []
    )


@pytest.mark.parametrize(
    "content",
    [
        {"photo": [PICTURE]},
        {"sticker": PICTURE | {"type": "regular", "is_animated": False, "is_video": False}},
        {"location": {"latitude": 1.0, "longitude": 2.0}},
    ],
    ids=["photo", "sticker", "location"],
)
def test_other_content_than_text_is_answered_in_private_and_ignored_in_groups(
    telegram: FakeBotApi, chat_id: int, content: Json
) -> None:
    telegram.write(-chat_id, content=content)
    telegram.write(chat_id, content=content)
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert answer["text"] == ENGLISH.not_a_text
    assert telegram.bot_messages(-chat_id) == []


@pytest.mark.parametrize(
    "data", ["repeat", "2/repeat/", "2/repeat/999999", "2/show/1/99", "2/set/1/x", "répéter", "::"]
)
def test_invalid_button_data_are_answered_with_an_alert(
    telegram: FakeBotApi, chat_id: int, data: str
) -> None:
    telegram.write(chat_id, "A button")
    (answer,) = finals(telegram, chat_id)
    alert = telegram.query_answer(telegram.press(chat_id, answer["message_id"], data=data))
    assert alert["show_alert"]
    assert alert["text"] in (ENGLISH.alert_outdated, ENGLISH.alert_gone)
    assert len(telegram.bot_messages(chat_id)) == 1


def test_the_log_names_the_model_and_no_secrets(
    telegram: FakeBotApi, bot: ForkedBot, chat_id: int
) -> None:
    telegram.fail("getUpdates", "bad_gateway")
    words_of(telegram, chat_id, "/settings seed 1")
    telegram.write(chat_id, "Confidential words")
    finals(telegram, chat_id)
    num_characters = len(" goes on, seed 1")
    bot.wait_for_log(f"wrote 1 texts of {num_characters} characters in chat {chat_id}")
    bot.wait_for_log("no updates (TelegramServerError)")
    telegram.write(chat_id, "More words")  # and polling goes on
    finals(telegram, chat_id, at_least=2)
    assert f"serves {MODEL}" in bot.log
    for secret in (telegram.token, "Confidential", "goes on", "Through failures", "refused "):
        assert secret not in bot.log
    assert "Traceback" not in bot.log


def test_the_bot_survives_hostile_updates_with_a_clean_log(
    telegram: FakeBotApi, bot: ForkedBot, chat_id: int
) -> None:
    for place in (5, -5):  # they speak of these, so that answers go somewhere
        telegram.write(place, "Hello", user_id=5)
    updates = list(hostile_updates(NUM_HOSTILE, seed=2))
    for start in range(0, len(updates), 100):
        telegram.send_raw_updates(updates[start : start + 100])
        telegram.state(idle=1)
    telegram.write(chat_id, "Still there?")
    finals(telegram, chat_id)
    for words in ("Traceback", "failed:", "Hostile", telegram.token):
        assert words not in bot.log


def test_the_menu_is_set_for_every_scope_and_language(telegram: FakeBotApi) -> None:
    telegram.requests("setMyCommands", at_least=8)

    def menu(language: str, **scope: Any) -> list[str]:
        body = {"language_code": language, "scope": scope or {"type": "default"}}
        answer = telegram.http.post(f"/bot{telegram.token}/getMyCommands", json=body).json()
        return [command["command"] for command in answer["result"]]

    for language, words in (("", ENGLISH), ("ru", RUSSIAN)):
        assert menu(language) == list(words.commands)
        assert "export" not in menu(language, type="all_group_chats")
        assert menu(language, type="chat", chat_id=99)[-2:] == ["allow", "deny"]


def test_both_languages_have_the_same_fields() -> None:
    def places(value: object) -> list[str]:
        return sorted(re.findall(r"\{\w+\}", str(value)))

    for field in fields(ENGLISH):
        english, russian = getattr(ENGLISH, field.name), getattr(RUSSIAN, field.name)
        assert english
        assert russian
        assert places(english) == places(russian) or isinstance(english, dict)
        if isinstance(english, dict):
            assert english.keys() == russian.keys()
        if field.name.startswith("alert_"):
            assert max(len(english), len(russian)) <= 200


def test_a_user_is_told_about_an_empty_text(chat_id: int) -> None:
    reply = Reply(1, chat_id, 0, 1, "en", "chat", "hello", 1, Settings(), 1, texts=["  "])
    assert reply_pieces(reply)[0].text == ENGLISH.empty
