"""The real bot process, seen by its users: every test has its own chat."""

import re
from typing import Any

import pytest

from full_stack_transformer.telegram import texts
from tests.fake_bot_api.process import FakeBotApi
from tests.telegram.bot_process import BotProcess
from tests.telegram.stand_in_service import MODEL, VERSION, StandInService

Json = dict[str, Any]

PICTURE: Json = {"file_id": "a", "file_unique_id": "b", "width": 1, "height": 1}

pytestmark = pytest.mark.usefixtures("bot")


def sent_texts(telegram: FakeBotApi, chat_id: int) -> list[str]:
    """Texts as the bot sent them, before Telegram cut white space from their ends."""
    sent = telegram.requests("sendMessage", chat_id)
    return [record["parameters"]["text"] for record in sent if record["status"] == 200]


def bold_part(message: Json) -> str:
    """What an entity marks as bold, by UTF-16 offsets."""
    (entity,) = message["entities"]
    assert entity["type"] == "bold"
    start, end = entity["offset"], entity["offset"] + entity["length"]
    units = str(message["text"]).encode("utf-16-le")
    return units[2 * start : 2 * end].decode("utf-16-le")


def messages_until_button(telegram: FakeBotApi, chat_id: int) -> list[Json]:
    """All pieces of an answer; the Repeat button tells the last one."""
    messages = telegram.bot_messages(chat_id, at_least=1)
    while "reply_markup" not in messages[-1]:
        messages = telegram.bot_messages(chat_id, at_least=len(messages) + 1)
    assert all("reply_markup" not in message for message in messages[:-1])
    return messages


def test_a_text_is_answered_with_its_continuation_below_it(
    telegram: FakeBotApi, chat_id: int
) -> None:
    prompt = telegram.write(chat_id, "Grüße 👨‍👩‍👧 <b>*or")
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert re.fullmatch(re.escape(prompt["text"]) + r" goes on, number \d+", answer["text"])
    assert bold_part(answer) == prompt["text"]
    assert answer["reply_to_message"]["message_id"] == prompt["message_id"]
    ((button,),) = answer["reply_markup"]["inline_keyboard"]
    assert button["text"] == texts.REPEAT_BUTTON
    (request,) = telegram.requests("sendMessage", chat_id)
    assert "parse_mode" not in request["parameters"]


def test_options_reach_the_service(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    telegram.write(chat_id, "Which options?")
    telegram.bot_messages(chat_id, at_least=1)
    (request,) = [r for r in service.requests if r.seed_text == "Which options?"]
    assert (request.generation_max_len, request.temperature, request.top_p) == (80, 0.7, 0.95)
    assert (request.repetition_penalty, request.seed) == (1.1, None)


def test_repeat_sends_another_continuation_with_its_own_button(
    telegram: FakeBotApi, chat_id: int
) -> None:
    prompt = telegram.write(chat_id, "Once more")
    (first,) = telegram.bot_messages(chat_id, at_least=1)
    query_id = telegram.press(chat_id, first["message_id"])
    assert telegram.query_answer(query_id) == {"text": "", "show_alert": False}
    _, second = telegram.bot_messages(chat_id, at_least=2)
    assert second["text"].startswith("Once more goes on")
    assert second["text"] != first["text"]
    assert second["reply_to_message"]["message_id"] == prompt["message_id"]
    telegram.press(chat_id, second["message_id"])
    *_, third = telegram.bot_messages(chat_id, at_least=3)
    assert third["text"] not in (first["text"], second["text"])


@pytest.mark.parametrize("command", ["/start", "/help", "/start deep-link"])
def test_commands_are_answered_with_what_the_bot_does(
    telegram: FakeBotApi, chat_id: int, command: str
) -> None:
    telegram.write(chat_id, command)
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert answer["text"] == texts.WELCOME


@pytest.mark.parametrize(
    "content",
    [
        {"photo": [PICTURE], "caption": "Words below a photo"},
        {"sticker": PICTURE | {"type": "regular", "is_animated": False, "is_video": False}},
        {"location": {"latitude": 1.0, "longitude": 2.0}},
    ],
    ids=["photo", "sticker", "location"],
)
def test_what_is_no_text_is_answered_with_one_sentence(
    telegram: FakeBotApi, chat_id: int, content: Json
) -> None:
    telegram.write(chat_id, content=content)
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert answer["text"] == texts.NOT_A_TEXT


def test_photos_of_a_group_are_left_alone_and_its_texts_answered(
    telegram: FakeBotApi, chat_id: int
) -> None:
    group_id = -chat_id
    telegram.write(group_id, content={"group_chat_created": True})
    telegram.write(group_id, "Hello group", message_thread_id=7)
    (answer,) = telegram.bot_messages(group_id, at_least=1)
    assert answer["text"].startswith("Hello group goes on")
    assert answer["message_thread_id"] == 7
    telegram.press(group_id, answer["message_id"], user_id=5)
    _, second = telegram.bot_messages(group_id, at_least=2)
    assert second["message_thread_id"] == 7


@pytest.mark.parametrize(
    "continued",
    [" word" * 2000, "\n".join(["line" * 20] * 150), "👩🏽‍🚀🇩🇪é" * 2000, "." * 4096],
    ids=["words", "lines", "emoji", "one-block"],
)
def test_a_long_answer_is_split_and_nothing_is_lost(
    telegram: FakeBotApi, service: StandInService, chat_id: int, continued: str
) -> None:
    prompt = f"👩🏽‍🚀 prompt {chat_id}"
    service.continuations[prompt] = lambda: continued
    telegram.write(chat_id, prompt)
    messages = messages_until_button(telegram, chat_id)
    assert "".join(sent_texts(telegram, chat_id)) == prompt + continued
    assert bold_part(messages[0]) == prompt
    assert all("entities" not in message for message in messages[1:])
    assert all("reply_to_message" in message for message in messages)
    telegram.press(chat_id, messages[-1]["message_id"])
    telegram.bot_messages(chat_id, at_least=len(messages) + 1)


def test_white_space_alone_is_no_message(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    prompt = f"white space {chat_id}"
    service.continuations[prompt] = lambda: " " * 9000 + "end" + "\n" * 9000
    telegram.write(chat_id, prompt)
    messages = messages_until_button(telegram, chat_id)
    assert [message["text"] for message in messages] == [prompt, "end"]


@pytest.mark.parametrize(
    ("kind", "times", "more"),
    [
        ("retry_after", 1, {"retry_after": 1}),
        ("bad_gateway", 2, {}),
        ("reset", 1, {}),
        ("error", 1, {"status": 500, "description": "Internal Server Error"}),
    ],
    ids=["429", "502-html", "reset", "500"],
)
def test_an_answer_is_delivered_through_trouble(
    telegram: FakeBotApi, chat_id: int, kind: str, times: int, more: Json
) -> None:
    telegram.fail("sendMessage", kind, times, chat_id=chat_id, **more)
    telegram.fail("sendChatAction", kind, times, chat_id=chat_id, **more)
    telegram.write(chat_id, "Through trouble")
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert answer["text"].startswith("Through trouble goes on")
    assert len(telegram.requests("sendMessage", chat_id)) == times + 1


def test_an_answer_that_telegram_forbids_is_given_up(
    telegram: FakeBotApi, bot: BotProcess, chat_id: int
) -> None:
    telegram.fail("sendMessage", "error", chat_id=chat_id, status=403)
    telegram.write(chat_id, "Blocked")
    bot.wait_for_log(f"SendMessage in chat {chat_id} given up: TelegramForbiddenError")
    telegram.write(chat_id, "Unblocked")
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert answer["text"].startswith("Unblocked goes on")


@pytest.mark.parametrize(
    ("status", "words"),
    [(422, texts.REFUSED), (429, texts.SERVICE_AWAY), (500, texts.SERVICE_AWAY)],
    ids=str,
)
def test_a_service_without_an_answer_is_excused_in_one_sentence(
    telegram: FakeBotApi, service: StandInService, chat_id: int, status: int, words: str
) -> None:
    prompt = f"refused {chat_id}"
    service.refusals[prompt] = status
    telegram.write(chat_id, prompt)
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert answer["text"] == words


def test_an_outdated_button_is_answered(telegram: FakeBotApi, chat_id: int) -> None:
    telegram.write(chat_id, "A button")
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    for data in ("repeat:1", "like", "répéter", "::"):
        query_id = telegram.press(chat_id, answer["message_id"], data=data)
        alert = telegram.query_answer(query_id)
        assert alert == {"text": texts.OUTDATED_BUTTON, "show_alert": True}
    assert len(telegram.bot_messages(chat_id)) == 1


@pytest.mark.parametrize("how", ["deleted", "inaccessible"])
def test_repeat_without_its_prompt_says_so(telegram: FakeBotApi, chat_id: int, how: str) -> None:
    prompt = telegram.write(chat_id, "Soon gone")
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    if how == "deleted":
        telegram.delete(chat_id, prompt["message_id"])
    query_id = telegram.press(chat_id, answer["message_id"], inaccessible=how == "inaccessible")
    alert = telegram.query_answer(query_id)
    assert alert == {"text": texts.PROMPT_GONE, "show_alert": True}


def test_a_prompt_that_is_deleted_meanwhile_is_answered_all_the_same(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    prompt = f"deleted meanwhile {chat_id}"
    with service.holding(prompt) as arrived:
        written = telegram.write(chat_id, prompt)
        assert arrived.wait(10)
        telegram.delete(chat_id, written["message_id"])
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert answer["text"].startswith(prompt)


def test_one_chat_is_answered_in_order_while_others_go_on(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    slow, others = f"slow {chat_id}", range(chat_id * 100, chat_id * 100 + 5)
    with service.holding(slow) as arrived:
        telegram.write(chat_id, slow)
        telegram.write(chat_id, "second")
        telegram.write(chat_id, "/help")
        assert arrived.wait(10)
        telegram.requests("sendChatAction", chat_id, at_least=1)  # typing is shown
        for other in others:
            telegram.write(other, "fast")
        for other in others:
            telegram.bot_messages(other, at_least=1)
        assert telegram.bot_messages(chat_id) == []
    answers = [message["text"] for message in telegram.bot_messages(chat_id, at_least=3)]
    assert answers[0].startswith(slow)
    assert answers[1].startswith("second")
    assert answers[2] == texts.WELCOME


def test_who_floods_is_told_once(
    telegram: FakeBotApi, service: StandInService, bot: BotProcess, chat_id: int
) -> None:
    slow = f"flood {chat_id}"
    with service.holding(slow) as arrived:
        telegram.write(chat_id, slow)
        assert arrived.wait(10)
        for _ in range(53):
            telegram.write(chat_id, "/help")
        bot.wait_for_log(f"left a message of chat {chat_id} unanswered")
    answers = [message["text"] for message in telegram.bot_messages(chat_id, at_least=52)]
    assert answers.count(texts.WELCOME) == 50
    assert answers.count(texts.TOO_MANY) == 1


def test_the_log_names_the_model_and_no_secrets(
    telegram: FakeBotApi, bot: BotProcess, chat_id: int
) -> None:
    telegram.fail("getUpdates", "bad_gateway")
    telegram.write(chat_id, "Confidential words")
    telegram.bot_messages(chat_id, at_least=1)
    bot.wait_for_log(f"continued 18 characters in chat {chat_id}")
    bot.wait_for_log("Failed to fetch updates - TelegramServerError")
    telegram.write(chat_id, "More words")  # and polling goes on
    telegram.bot_messages(chat_id, at_least=2)
    assert f"serves {MODEL} with full_stack_transformer {VERSION}" in bot.log
    for secret in (telegram.token, "Confidential", "goes on", "Through trouble", "refused "):
        assert secret not in bot.log
    assert "Traceback" not in bot.log


def test_the_menu_lists_the_commands(telegram: FakeBotApi) -> None:
    answer = telegram.http.get(f"/bot{telegram.token}/getMyCommands").json()
    assert [command["command"] for command in answer["result"]] == ["start", "help"]
