"""Texts of the real bot process, seen by its users: every test has its own chat."""

import json
import re

import pytest

from full_stack_transformer.telegram.texts import ENGLISH
from tests.fake_bot_api.process import FakeBotApi
from tests.telegram.bot_forks import ForkedBot
from tests.telegram.stand_in_service import StandInService
from tests.telegram.watching import Json, bold_part, finals, labels, words_of

# test_life has the limits; without them these take seconds, not minutes.
WITH_LIMITS = False

pytestmark = pytest.mark.usefixtures("bot")


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
    with service.holding(prompt, after_pieces=10):
        telegram.write(chat_id, prompt)
        draft = telegram.draft(chat_id, prompt)
        assert draft["can_stop"] is True
    (answer,) = finals(telegram, chat_id)
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
    service.continuations[prompt] = lambda: " word" * 400
    with service.holding(prompt, after_pieces=10):
        telegram.write(chat_id, prompt)
        telegram.draft(chat_id, prompt + " word")
        telegram.stop(chat_id)
        (answer,) = finals(telegram, chat_id)
        assert service.wait_until_left(prompt) <= 2
        assert words_of(telegram, chat_id, "/stop")["text"] == ENGLISH.nothing_to_stop
    assert answer["text"].startswith(f"{prompt} word")
    assert len(answer["text"]) < 200


def test_a_group_sees_edits_and_a_stop_button_for_the_one_who_asked(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    group_id, prompt = -chat_id, f"group {chat_id}"
    service.continuations[prompt] = lambda: " word" * 400
    with service.holding(prompt, after_pieces=10):
        telegram.write(group_id, f"@fake_bot {prompt}", user_id=chat_id, message_thread_id=7)
        (growing,) = telegram.bot_messages(group_id, at_least=1)
        assert labels(growing) == [["Stop"]]
        assert growing["message_thread_id"] == 7
        foreign = telegram.press(group_id, growing["message_id"], user_id=5)
        assert telegram.query_answer(foreign)["text"] == ENGLISH.alert_foreign
        telegram.press(group_id, growing["message_id"], user_id=chat_id)
        (answer,) = finals(telegram, group_id)
        assert service.wait_until_left(prompt) <= 2
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


def test_a_reply_to_a_text_whose_sending_is_not_confirmed_branches_from_it(
    telegram: FakeBotApi, chat_id: int
) -> None:
    telegram.fail("sendMessage", "hang", chat_id=chat_id, after=True)
    telegram.write(chat_id, "The root")
    (first,) = finals(telegram, chat_id)
    telegram.write(chat_id, "and then", reply_to_message_id=first["message_id"])
    telegram.state(idle=1)
    telegram.clear_faults()
    second = telegram.bot_messages(chat_id, at_least=1, words="and then")[0]
    assert bold_part(second) == first["text"] + " and then"
    again, last = finals(telegram, chat_id)
    assert (again["text"], last) == (first["text"], second)
    assert again["message_id"] != first["message_id"]


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
    assert ["reply_markup" in message for message in messages] == [False] * (len(messages) - 1) + [
        True
    ]
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
    ids=["429", "502-html", "502-but-accepted", "reset", "reset-but-accepted", "500"],
)
def test_an_answer_is_delivered_once_through_failures(
    telegram: FakeBotApi, chat_id: int, kind: str, times: int, more: Json
) -> None:
    telegram.fail("sendMessage", kind, times, chat_id=chat_id, **more)
    telegram.fail("sendChatAction", kind, times, chat_id=chat_id, **more)
    telegram.write(chat_id, "Through failures")
    telegram.requests("sendMessage", chat_id, at_least=times + 1)
    if more.get("after"):
        telegram.requests("deleteMessage", chat_id, at_least=1)
    assert words_of(telegram, chat_id, "/reset")["text"] == ENGLISH.reset
    (answer,) = finals(telegram, chat_id)
    assert answer["text"].startswith("Through failures goes on")


def test_blocking_the_bot_deletes_the_data_of_the_chat(
    telegram: FakeBotApi, bot: ForkedBot, chat_id: int
) -> None:
    telegram.write(chat_id, "Before")
    finals(telegram, chat_id)
    telegram.block(chat_id, tell=False)
    telegram.write(chat_id, "Blocked")
    bot.wait_for_log(f"chat {chat_id} is gone or has blocked the bot")
    telegram.block(chat_id, is_blocked=False)
    telegram.write(chat_id, "/export")
    exported = telegram.bot_messages(chat_id, at_least=2)[-1]["document"]["content"]
    assert json.loads(exported)["replies"] == []
    telegram.block(chat_id)
    bot.wait_for_log(f"chat {chat_id} blocked or removed the bot")


@pytest.mark.parametrize("tell", [True, False], ids=["told", "found-out"])
def test_settings_and_answers_follow_a_group_that_moves(
    telegram: FakeBotApi, service: StandInService, chat_id: int, tell: bool
) -> None:
    old_id, new_id, prompt = -chat_id, -chat_id - 100_000, f"moving {chat_id}"
    words_of(telegram, old_id, "/settings length 33", user_id=4)
    with service.holding(prompt) as hold:
        telegram.write(old_id, f"@fake_bot {prompt}", user_id=4)
        hold.wait()
        telegram.migrate(old_id, new_id, tell=tell)
    (answer,) = finals(telegram, new_id)
    assert answer["text"].startswith(prompt)
    assert {r.max_tokens for r in service.requests if getattr(r, "prompt", "") == prompt} == {33}


def test_a_user_is_told_when_the_service_refuses_a_text(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    prompt = f"refused {chat_id}"
    service.refusals[prompt] = 422
    telegram.write(chat_id, prompt)
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert answer["text"] == ENGLISH.refused


@pytest.mark.parametrize("failure", ["unavailable", "broken", "error", "foreign"])
def test_a_user_is_told_once_that_the_service_fails_and_the_text_comes(
    telegram: FakeBotApi, service: StandInService, chat_id: int, failure: str
) -> None:
    prompt = f"The service fails {chat_id}"
    service.failures += [failure, failure]
    with service.holding(prompt):
        telegram.write(chat_id, prompt)
        (excuse,) = telegram.bot_messages(chat_id, at_least=1)
        assert excuse["text"] == ENGLISH.service_away
    (answer,) = finals(telegram, chat_id)
    assert answer["text"].startswith(f"{prompt} goes on")
    telegram.requests("deleteMessage", chat_id, at_least=1)
    assert telegram.bot_messages(chat_id) == [answer]


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


def test_one_chat_is_answered_in_order_while_others_go_on(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    slow, others = f"slow {chat_id}", range(chat_id * 100, chat_id * 100 + 5)
    with service.holding(slow) as hold:
        telegram.write(chat_id, slow)
        hold.wait()
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
