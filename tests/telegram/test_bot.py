"""The real bot process, seen by its users: every test has its own chat."""

import json
import re
import shlex
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.telegram.replies import reply_pieces
from full_stack_transformer.telegram.store import Reply
from full_stack_transformer.telegram.texts import ENGLISH, RUSSIAN
from tests.fake_bot_api.process import FakeBotApi
from tests.telegram.bot_forks import ForkedBot
from tests.telegram.stand_in_service import MODEL, StandInService

Json = dict[str, Any]

PICTURE: Json = {"file_id": "a", "file_unique_id": "b", "width": 1, "height": 1}

# test_life has the limits; without them these take seconds, not minutes.
WITH_LIMITS = False

pytestmark = pytest.mark.usefixtures("bot")


def is_final(message: Json) -> bool:
    """Whether the keyboard is that of a finished text."""
    rows = message.get("reply_markup", {}).get("inline_keyboard", [])
    return any(button["text"] == ENGLISH.repeat_button for row in rows for button in row)


def finals(telegram: FakeBotApi, chat_id: int, at_least: int = 1) -> list[Json]:
    """Finished texts of a chat, once there are so many."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = [message for message in telegram.bot_messages(chat_id) if is_final(message)]
        if len(found) >= at_least:
            return found
        time.sleep(0.02)
    raise AssertionError(f"in time there was only: {telegram.bot_messages(chat_id)}")


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


def test_a_text_is_answered_with_its_continuation_below_it(
    telegram: FakeBotApi, chat_id: int
) -> None:
    prompt = telegram.write(chat_id, "Grüße 👨‍👩‍👧 <b>*or")
    (answer,) = finals(telegram, chat_id)
    assert re.fullmatch(re.escape(prompt["text"]) + r" goes on, seed \d+", answer["text"])
    assert bold_part(answer) == prompt["text"]
    assert answer["reply_to_message"]["message_id"] == prompt["message_id"]
    assert labels(answer) == [["Repeat", "Continue", "Settings"]]
    (request,) = telegram.requests("sendMessage", chat_id)
    assert "parse_mode" not in request["parameters"]


def test_a_private_text_streams_as_a_draft_that_the_answer_replaces(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    prompt = f"streams {chat_id}"
    service.continuations[prompt] = lambda: " word" * 40
    service.seconds_between_pieces = 0.05
    try:
        telegram.write(chat_id, prompt)
        draft = telegram.draft(chat_id, prompt)
        assert draft["can_stop"] is True
        (answer,) = finals(telegram, chat_id)
    finally:
        service.seconds_between_pieces = 0
    assert prompt + " word" * 40 == answer["text"]
    assert answer["text"].startswith(draft["text"].strip())
    assert not telegram.has_draft(chat_id)
    drafts = telegram.requests("sendMessageDraft", chat_id)
    assert {record["status"] for record in drafts} == {200}
    texts = [record["parameters"]["text"] for record in drafts]
    assert texts == sorted(texts, key=len)


def test_the_native_stop_keeps_what_there_is_and_frees_the_service(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    prompt = f"stopped {chat_id}"
    service.continuations[prompt] = lambda: " word" * 2000
    service.seconds_between_pieces = 0.02
    num_broken = service.num_broken
    try:
        telegram.write(chat_id, prompt)
        telegram.draft(chat_id, prompt + " word")
        telegram.stop(chat_id)
        (answer,) = finals(telegram, chat_id)
        assert words_of(telegram, chat_id, "/stop")["text"] == ENGLISH.nothing_to_stop
    finally:
        service.seconds_between_pieces = 0
    assert answer["text"].startswith(f"{prompt} word")
    assert len(answer["text"]) < 2000
    assert service.num_broken == num_broken + 1
    assert service.num_pieces_after_close <= 2


def test_a_group_sees_edits_and_a_stop_button_for_the_one_who_asked(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    group_id, prompt = -chat_id, f"group {chat_id}"
    service.continuations[prompt] = lambda: " word" * 2000
    service.seconds_between_pieces = 0.02
    try:
        telegram.write(group_id, prompt, user_id=chat_id, message_thread_id=7)
        (growing,) = telegram.bot_messages(group_id, at_least=1)
        assert labels(growing) == [["Stop"]]
        assert growing["message_thread_id"] == 7
        foreign = telegram.press(group_id, growing["message_id"], user_id=5)
        assert telegram.query_answer(foreign)["text"] == ENGLISH.alert_foreign
        telegram.press(group_id, growing["message_id"], user_id=chat_id)
        (answer,) = finals(telegram, group_id)
    finally:
        service.seconds_between_pieces = 0
    assert answer["message_id"] == growing["message_id"]
    assert answer["text"].startswith(growing["text"])
    foreign = telegram.press(group_id, answer["message_id"], user_id=5)
    assert telegram.query_answer(foreign)["text"] == ENGLISH.alert_foreign


def test_repeat_gives_another_sample_and_continue_goes_on_from_the_end(
    telegram: FakeBotApi, chat_id: int
) -> None:
    prompt = telegram.write(chat_id, "Once more")
    (first,) = finals(telegram, chat_id)
    query_id = telegram.press(chat_id, first["message_id"], button="Repeat")
    assert telegram.query_answer(query_id) == {"text": "", "show_alert": False}
    _, second = finals(telegram, chat_id, at_least=2)
    assert second["text"].startswith("Once more goes on")
    assert second["text"] != first["text"]
    assert second["reply_to_message"]["message_id"] == prompt["message_id"]
    telegram.press(chat_id, first["message_id"], button="Continue")
    *_, third = finals(telegram, chat_id, at_least=3)
    assert bold_part(third) == first["text"]
    assert third["text"].startswith(first["text"] + " goes on")


def test_a_reply_to_a_text_branches_from_it(telegram: FakeBotApi, chat_id: int) -> None:
    telegram.write(chat_id, "The root")
    (first,) = finals(telegram, chat_id)
    telegram.write(chat_id, "and then", reply_to_message_id=first["message_id"])
    _, second = finals(telegram, chat_id, at_least=2)
    assert bold_part(second) == first["text"] + " and then"


def test_variants_are_turned_in_place(telegram: FakeBotApi, chat_id: int) -> None:
    assert words_of(telegram, chat_id, "/settings variants 3")["text"] == ENGLISH.setting_set
    words_of(telegram, chat_id, "/settings seed 11")
    telegram.write(chat_id, "Three of them")
    (answer,) = finals(telegram, chat_id)
    assert answer["text"] == "Three of them goes on, seed 11"
    for button, seed, label in (
        ("▶", 12, "2/3"),
        ("▶", 13, "3/3"),
        ("▶", 11, "1/3"),
        ("◀", 13, "3/3"),
    ):
        num_edits = len(telegram.requests("editMessageText", chat_id))
        telegram.press(chat_id, answer["message_id"], button=button)
        telegram.requests("editMessageText", chat_id, at_least=num_edits + 1)
        (answer,) = finals(telegram, chat_id)
        assert answer["text"] == f"Three of them goes on, seed {seed}"
        assert labels(answer)[0][1] == label


def test_settings_are_of_one_chat_and_topic_and_change_in_place(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    panel = words_of(telegram, chat_id, "/settings")
    rows = labels(panel)
    assert rows[0] == ["Precise", "• Balanced", "Creative"]
    assert ["−", "Temperature: 0.7", "+"] in rows
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
        telegram.write(group_id, f"{prompt} {thread_id}", user_id=3, message_thread_id=thread_id)
        finals(telegram, group_id, at_least=thread_id)
    temperatures = {
        request.prompt: request.temperature
        for request in service.requests
        if hasattr(request, "prompt") and request.prompt.startswith(prompt)
    }
    assert temperatures == {prompt: 1.1, f"{prompt} 1": 0.5, f"{prompt} 2": 0.7}


@pytest.mark.parametrize(
    "typed", ["temperature 9", "temperature nan", "length 1.5", "seed -1", "nothing 1", "mode x"]
)
def test_impossible_settings_are_answered_with_what_is_possible(
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


def test_why_gives_seed_settings_and_the_lines_that_do_it_again(
    telegram: FakeBotApi, chat_id: int
) -> None:
    assert words_of(telegram, chat_id, "/why")["text"] == ENGLISH.why_nothing
    telegram.write(chat_id, 'It\'s -- "quoted"')
    (answer,) = finals(telegram, chat_id)
    seed = answer["text"].rpartition(" ")[2]
    telegram.write(chat_id, "/why", reply_to_message_id=answer["message_id"])
    _, _, why, generate, call = telegram.bot_messages(chat_id, at_least=5)
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


def test_status_and_privacy_tell_what_is_so(telegram: FakeBotApi, chat_id: int) -> None:
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
        {"photo": [PICTURE], "caption": "Words below a photo"},
        {"sticker": PICTURE | {"type": "regular", "is_animated": False, "is_video": False}},
        {"location": {"latitude": 1.0, "longitude": 2.0}},
    ],
    ids=["photo", "sticker", "location"],
)
def test_what_is_no_text_is_answered_in_private_and_left_alone_in_groups(
    telegram: FakeBotApi, chat_id: int, content: Json
) -> None:
    telegram.write(-chat_id, content=content)
    telegram.write(chat_id, content=content)
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert answer["text"] == ENGLISH.not_a_text
    assert telegram.bot_messages(-chat_id) == []


@pytest.mark.parametrize(
    "continued",
    ["\n".join(["line" * 20] * 70), "👩🏽‍🚀🇩🇪é" * 800, "." * 4096 + " " * 5000 + "end"],
    ids=["lines", "emoji", "white-space"],
)
def test_a_long_answer_is_split_and_nothing_is_lost(
    telegram: FakeBotApi, service: StandInService, chat_id: int, continued: str
) -> None:
    prompt = f"👩🏽‍🚀 prompt {chat_id}"
    service.continuations[prompt] = lambda: continued
    telegram.write(chat_id, prompt)
    finals(telegram, chat_id)
    messages = telegram.bot_messages(chat_id)
    sent = [
        record["parameters"]["text"]
        for record in telegram.requests("sendMessage", chat_id)
        if record["status"] == 200
    ]
    assert re.sub(r"\s+", " ", "".join(sent)) == re.sub(r"\s+", " ", prompt + continued)
    assert len(sent) == len(messages) >= 2
    assert bold_part(messages[0]) == prompt
    assert [is_final(message) for message in messages] == [False] * (len(messages) - 1) + [True]
    assert all("reply_to_message" in message for message in messages)


@pytest.mark.parametrize(
    ("kind", "times", "more"),
    [
        ("retry_after", 1, {"retry_after": 1}),
        ("bad_gateway", 2, {}),
        ("bad_gateway", 1, {"after": True}),
        ("reset", 1, {}),
        ("reset", 1, {"after": True}),
        ("error", 1, {"status": 500, "description": "Internal Server Error"}),
    ],
    ids=["429", "502-html", "502-and-taken", "reset", "reset-and-taken", "500"],
)
def test_an_answer_is_delivered_once_through_trouble(
    telegram: FakeBotApi, chat_id: int, kind: str, times: int, more: Json
) -> None:
    telegram.fail("sendMessage", kind, times, chat_id=chat_id, **more)
    telegram.fail("sendChatAction", kind, times, chat_id=chat_id, **more)
    telegram.write(chat_id, "Through trouble")
    telegram.requests("sendMessage", chat_id, at_least=times + 1)
    if more.get("after"):
        telegram.requests("deleteMessage", chat_id, at_least=1)
    assert words_of(telegram, chat_id, "/reset")["text"] == ENGLISH.reset
    (answer,) = finals(telegram, chat_id)
    assert answer["text"].startswith("Through trouble goes on")


def test_a_chat_that_shuts_the_bot_out_is_forgotten(
    telegram: FakeBotApi, bot: ForkedBot, chat_id: int
) -> None:
    telegram.write(chat_id, "Before")
    finals(telegram, chat_id)
    telegram.block(chat_id, tell=False)
    telegram.write(chat_id, "Blocked")
    bot.wait_for_log(f"chat {chat_id} is gone or shut the bot out")
    telegram.block(chat_id, is_blocked=False)
    telegram.write(chat_id, "/export")
    exported = telegram.bot_messages(chat_id, at_least=2)[-1]["document"]["content"]
    assert json.loads(exported)["replies"] == []
    telegram.block(chat_id)
    bot.wait_for_log(f"chat {chat_id} shut the bot out")


@pytest.mark.parametrize("tell", [True, False], ids=["told", "found-out"])
def test_settings_and_answers_follow_a_group_that_moves(
    telegram: FakeBotApi, service: StandInService, chat_id: int, tell: bool
) -> None:
    old_id, new_id, prompt = -chat_id, -chat_id - 100_000, f"moving {chat_id}"
    words_of(telegram, old_id, "/settings length 33", user_id=4)
    with service.holding(prompt) as arrived:
        telegram.write(old_id, prompt, user_id=4)
        assert arrived.wait(10)
        telegram.migrate(old_id, new_id, tell=tell)
    (answer,) = finals(telegram, new_id)
    assert answer["text"].startswith(prompt)
    assert {r.max_tokens for r in service.requests if getattr(r, "prompt", "") == prompt} == {33}


def test_a_text_that_the_service_refuses_is_excused_in_one_sentence(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    prompt = f"refused {chat_id}"
    service.refusals[prompt] = 422
    telegram.write(chat_id, prompt)
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert answer["text"] == ENGLISH.refused


@pytest.mark.parametrize("failure", ["unavailable", "broken", "error", "foreign"])
def test_a_service_in_trouble_is_excused_once_and_the_text_comes(
    telegram: FakeBotApi, service: StandInService, chat_id: int, failure: str
) -> None:
    service.failures += [failure, failure]
    telegram.write(chat_id, "In trouble")
    (answer,) = finals(telegram, chat_id)
    assert answer["text"].startswith("In trouble goes on")
    telegram.requests("deleteMessage", chat_id, at_least=1)
    assert words_of(telegram, chat_id, "/reset")["text"] == ENGLISH.reset
    assert len(telegram.bot_messages(chat_id)) == 2  # the excuse is gone


def test_a_conversation_is_cut_to_the_context_by_the_services_own_count(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    words_of(telegram, chat_id, "/settings mode chat")
    service.context = 400
    try:
        for number in range(1, 5):
            telegram.write(chat_id, f"{number} " + "x" * 80)
            answer = finals(telegram, chat_id, at_least=number)[-1]
            assert f"'{number} x" in answer["text"]
        telegram.write(chat_id, "/settings mode continue")
        telegram.write(chat_id, "y" * 300 + " the end")
        answer = finals(telegram, chat_id, at_least=5)[-1]
    finally:
        service.context = 1_000_000
    request = service.requests[-1]
    assert getattr(request, "prompt", "").endswith("the end")
    assert answer["text"].startswith("y" * 300 + " the end goes on")


@pytest.mark.parametrize(
    "data", ["repeat", "2/repeat/", "2/repeat/999999", "2/show/1/99", "2/set/1/x", "répéter", "::"]
)
def test_button_data_are_not_believed(telegram: FakeBotApi, chat_id: int, data: str) -> None:
    telegram.write(chat_id, "A button")
    (answer,) = finals(telegram, chat_id)
    alert = telegram.query_answer(telegram.press(chat_id, answer["message_id"], data=data))
    assert alert["show_alert"]
    assert alert["text"] in (ENGLISH.alert_outdated, ENGLISH.alert_gone)
    assert len(telegram.bot_messages(chat_id)) == 1


def test_one_chat_is_answered_in_order_while_others_go_on(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    slow, others = f"slow {chat_id}", range(chat_id * 100, chat_id * 100 + 5)
    with service.holding(slow) as arrived:
        telegram.write(chat_id, slow)
        assert arrived.wait(10)
        telegram.write(chat_id, "second")
        (notice,) = telegram.bot_messages(chat_id, at_least=1)
        assert notice["text"] == ENGLISH.queued.format(position=2)
        assert words_of(telegram, chat_id, "/help")["text"] == ENGLISH.help
        for other in others:
            telegram.write(other, "fast")
        for other in others:
            finals(telegram, other)
        assert telegram.requests("sendChatAction", chat_id)
    texts = [message["text"] for message in finals(telegram, chat_id, at_least=2)]
    assert texts[0].startswith(slow)
    assert texts[1].startswith("second")
    telegram.requests("deleteMessage", chat_id, at_least=1)  # the notice


def test_who_floods_is_told_once(
    telegram: FakeBotApi, service: StandInService, bot: ForkedBot, chat_id: int
) -> None:
    slow = f"flood {chat_id}"
    with service.holding(slow) as arrived:
        telegram.write(chat_id, slow)
        assert arrived.wait(10)
        for number in range(14):
            telegram.write(chat_id, f"more {number}")
        bot.wait_for_log(f"left a message of chat {chat_id} unanswered")
        telegram.write(chat_id, "/stop")  # ends what waits, too
        telegram.press(chat_id, 1, data="::")
    sent = telegram.requests("sendMessage", chat_id, at_least=1)
    assert sum(ENGLISH.too_many == r["parameters"]["text"] for r in sent) <= 1


def test_the_log_names_the_model_and_no_secrets(
    telegram: FakeBotApi, bot: ForkedBot, chat_id: int
) -> None:
    telegram.fail("getUpdates", "bad_gateway")
    telegram.write(chat_id, "Confidential words")
    finals(telegram, chat_id)
    bot.wait_for_log(f"wrote 1 texts of 25 characters in chat {chat_id}")
    bot.wait_for_log("no updates (TelegramServerError)")
    telegram.write(chat_id, "More words")  # and polling goes on
    finals(telegram, chat_id, at_least=2)
    assert f"serves {MODEL}" in bot.log
    for secret in (telegram.token, "Confidential", "goes on", "Through trouble", "refused "):
        assert secret not in bot.log
    assert "Traceback" not in bot.log


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


def test_both_languages_fill_in_the_same_places() -> None:
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


def test_an_empty_text_is_a_sentence(chat_id: int) -> None:
    from full_stack_transformer.telegram.settings import Settings

    reply = Reply(1, chat_id, 0, 1, "en", "chat", "hello", 1, Settings(), 1, texts=["  "])
    assert reply_pieces(reply)[0].text == ENGLISH.empty
