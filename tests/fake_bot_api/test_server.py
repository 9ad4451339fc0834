"""The fake rejects what Telegram rejects: otherwise a bot's tests prove nothing."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.fake_bot_api.process import FakeBotApi, running_fake_bot_api

pytest_plugins = ["tests.fake_bot_api.fixtures"]

CHAT = 5


@pytest.fixture(scope="module")
def telegram() -> Iterator[FakeBotApi]:
    """A server with one open chat."""
    with running_fake_bot_api(with_limits=False) as fake:
        fake.write(CHAT, "Hello")
        yield fake


def call(telegram: FakeBotApi, method: str, **parameters: Any) -> tuple[int, Any]:
    """Status, and result or description."""
    response = telegram.http.post(f"/bot{telegram.token}/{method}", json=parameters)
    body = response.json()
    assert body["ok"] == (response.status_code == 200)
    return response.status_code, body["result"] if body["ok"] else body["description"]


def keyboard(**button: str) -> str:
    return json.dumps({"inline_keyboard": [[button]]})


def bold(offset: int, length: int) -> str:
    return json.dumps([{"type": "bold", "offset": offset, "length": length}])


@pytest.mark.parametrize(
    ("parameters", "description"),
    [
        ({"chat_id": 99, "text": "a"}, "chat not found"),
        ({"chat_id": CHAT, "text": " \n"}, "text is empty"),
        ({"chat_id": CHAT, "text": "a" * 4097}, "too long"),
        ({"chat_id": CHAT, "text": "a", "parse_mode": "HTML"}, "parse_mode"),
        ({"chat_id": CHAT, "text": "a", "entities": bold(0, 2)}, "BOUNDS"),
        ({"chat_id": CHAT, "text": "a", "entities": bold(0, 0)}, "no valid number"),
        ({"chat_id": CHAT, "text": "👋", "entities": bold(0, 1)}, "UTF-16"),
        ({"chat_id": CHAT, "text": "a", "entities": "[{"}, "can't parse"),
        (
            {
                "chat_id": CHAT,
                "text": "a",
                "reply_markup": keyboard(text="b", callback_data="é" * 33),
            },
            "BUTTON_DATA_INVALID",
        ),
        ({"chat_id": CHAT, "text": "a", "reply_markup": keyboard(text="b")}, "unallowed"),
        ({"chat_id": CHAT, "text": "a", "reply_parameters": '{"message_id": 99}'}, "not found"),
        ({"chat_id": CHAT, "text": "a", "message_thread_id": 3}, "thread not found"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_messages_are_refused(
    telegram: FakeBotApi, parameters: dict[str, Any], description: str
) -> None:
    status, found = call(telegram, "sendMessage", **parameters)
    assert status == 400
    assert description in found


def test_a_message_of_4096_emoji_fits_and_white_space_is_cut_off(telegram: FakeBotApi) -> None:
    text = " \n" + "👋" * 4096 + "\n"
    status, message = call(telegram, "SENDMESSAGE", chat_id=CHAT, text=text, entities=bold(2, 8192))
    assert status == 200
    assert message["text"] == text.strip()
    assert message["entities"] == [{"type": "bold", "offset": 0, "length": 8192}]


def test_wrong_token_and_unknown_method(telegram: FakeBotApi) -> None:
    assert telegram.http.post("/bot42:other/getMe").status_code == 401
    assert call(telegram, "getMoney") == (404, "Not Found")


def test_an_edit_without_a_change_and_of_others_messages_is_refused(telegram: FakeBotApi) -> None:
    _, message = call(telegram, "sendMessage", chat_id=CHAT, text="one")
    place = {"chat_id": CHAT, "message_id": message["message_id"]}
    assert call(telegram, "editMessageText", text="two", **place)[1]["text"] == "two"
    assert "not modified" in call(telegram, "editMessageText", text="two", **place)[1]
    others = {"chat_id": CHAT, "message_id": 1}
    assert "can't be edited" in call(telegram, "editMessageText", text="two", **others)[1]
    assert call(telegram, "deleteMessage", **place) == (200, True)
    assert "not found" in call(telegram, "deleteMessage", **place)[1]


def test_a_button_press_is_answered_once(telegram: FakeBotApi) -> None:
    markup = keyboard(text="b", callback_data="data")
    _, message = call(telegram, "sendMessage", chat_id=CHAT, text="a", reply_markup=markup)
    query_id = telegram.press(CHAT, message["message_id"])
    too_long = call(telegram, "answerCallbackQuery", callback_query_id=query_id, text="a" * 201)
    assert too_long[0] == 400
    assert call(telegram, "answerCallbackQuery", callback_query_id=query_id) == (200, True)
    again = call(telegram, "answerCallbackQuery", callback_query_id=query_id)
    assert "query is too old" in again[1]


def test_updates_stay_until_they_are_confirmed_and_only_wanted_kinds_come() -> None:
    with running_fake_bot_api() as telegram:
        telegram.write(CHAT, "one")
        (first,) = call(telegram, "getUpdates", allowed_updates='["callback_query"]')[1]
        assert call(telegram, "getUpdates")[1] == [first]
        telegram.write(CHAT, "two")  # not wanted any more
        assert call(telegram, "getUpdates", offset=first["update_id"] + 1)[1] == []
        assert call(telegram, "getUpdates")[1] == []
        call(telegram, "setWebhook", url="https://example.org")
        assert call(telegram, "getUpdates")[0] == 409
        assert call(telegram, "getWebhookInfo")[1]["url"] == "https://example.org"


def test_a_second_poll_ends_the_first_with_409() -> None:
    answers: list[tuple[int, Any]] = []
    with running_fake_bot_api() as telegram:
        first = threading.Thread(
            target=lambda: answers.append(call(telegram, "getUpdates", timeout=20))
        )
        first.start()
        telegram.requests("getUpdates", at_least=1, answered=False)
        assert call(telegram, "getUpdates") == (200, [])
        first.join()
    assert answers[0][0] == 409


def test_faults_strike_as_often_as_told(telegram: FakeBotApi) -> None:
    telegram.fail("getMe", "retry_after", retry_after=7)
    telegram.fail("getMe", "bad_gateway")
    telegram.fail("getMe", "reset")
    url = f"/bot{telegram.token}/getMe"
    assert telegram.http.get(url).json()["parameters"] == {"retry_after": 7}
    page = telegram.http.get(url)
    assert (page.status_code, page.headers["content-type"][:9]) == (502, "text/html")
    with pytest.raises(httpx.RemoteProtocolError):
        telegram.http.get(url)
    assert telegram.http.get(url).status_code == 200
    telegram.fail("sendMessage", "reset", after=True)
    num_before = len(telegram.bot_messages(CHAT))
    with pytest.raises(httpx.RemoteProtocolError):
        call(telegram, "sendMessage", chat_id=CHAT, text="Lost answer")
    assert len(telegram.bot_messages(CHAT)) == num_before + 1
    assert telegram.http.get("/user/faults").json() == []


def test_a_draft_streams_into_private_chats_and_a_message_takes_its_place(
    telegram: FakeBotApi,
) -> None:
    draft = {"chat_id": CHAT, "draft_id": 3, "text": "grow", "can_stop": True}
    assert call(telegram, "sendMessageDraft", **draft) == (200, True)
    assert telegram.draft(CHAT, "grow")["can_stop"]
    telegram.stop(CHAT)
    assert "DRAFT_ID_INVALID" in call(telegram, "sendMessageDraft", **{**draft, "draft_id": 0})[1]
    telegram.write(-CHAT, "a group")
    refused = call(telegram, "sendMessageDraft", **{**draft, "chat_id": -CHAT})
    assert "private chats only" in refused[1]
    call(telegram, "sendMessage", chat_id=CHAT, text="whole")
    assert not telegram.has_draft(CHAT)
    with pytest.raises(httpx.HTTPStatusError):
        telegram.stop(CHAT)


def test_chats_take_only_so_many_messages() -> None:
    with running_fake_bot_api() as telegram:
        for chat_id, capacity, per_second in ((CHAT, 5, 1.0), (-CHAT, 20, 1 / 3)):
            telegram.write(chat_id, "Hello")
            num_taken, started = 0, time.monotonic()
            while call(telegram, "sendMessage", chat_id=chat_id, text="a")[0] == 200:
                num_taken += 1
            gained = (time.monotonic() - started) * per_second
            assert capacity <= num_taken <= capacity + gained + 1
        assert telegram.state()["num_limited"] == 2


def test_a_blocked_and_a_moved_chat_take_nothing_and_say_why(telegram: FakeBotApi) -> None:
    telegram.write(6, "Hello")
    telegram.block(6)
    status, description = call(telegram, "sendMessage", chat_id=6, text="a")
    assert (status, "blocked" in description) == (403, True)
    telegram.block(6, is_blocked=False)
    assert call(telegram, "sendMessage", chat_id=6, text="a")[0] == 200
    telegram.write(-6, "Hello")
    telegram.migrate(-6, -600)
    answer = telegram.http.post(
        f"/bot{telegram.token}/sendMessage", json={"chat_id": -6, "text": "a"}
    )
    assert answer.status_code == 400
    assert answer.json()["parameters"] == {"migrate_to_chat_id": -600}
    assert call(telegram, "sendMessage", chat_id=-600, text="a")[0] == 200


def test_an_edited_message_and_a_strange_update_are_delivered(fake_bot_api: FakeBotApi) -> None:
    telegram = fake_bot_api
    message = telegram.write(CHAT, "one")
    telegram.edit(CHAT, message["message_id"], "two")
    telegram.send_raw_updates([{"nothing": 1}, 5])
    _, edited, strange, number = call(telegram, "getUpdates")[1]
    assert edited["edited_message"]["text"] == "two"
    assert strange["nothing"] == 1
    assert number == 5


def test_menus_are_kept_by_scope_and_language(telegram: FakeBotApi) -> None:
    menu = [{"command": "go", "description": "Go"}]
    place = {"scope": {"type": "all_private_chats"}, "language_code": "ru"}
    assert call(telegram, "setMyCommands", commands=menu, **place) == (200, True)
    assert call(telegram, "getMyCommands", **place) == (200, menu)
    assert call(telegram, "getMyCommands") == (200, [])
    assert call(telegram, "setMyCommands", commands=menu, scope={"type": "x"})[0] == 400
    assert call(telegram, "setMyCommands", commands=menu, language_code="russian")[0] == 400


def test_a_document_is_kept_with_its_content(telegram: FakeBotApi) -> None:
    answer = telegram.http.post(
        f"/bot{telegram.token}/sendDocument",
        data={"chat_id": str(CHAT), "caption": "A file"},
        files={"document": ("a.json", b"{}")},
    )
    document = answer.json()["result"]["document"]
    assert (document["file_name"], document["file_size"], document["content"]) == (
        "a.json",
        2,
        "{}",
    )
    assert call(telegram, "sendDocument", chat_id=CHAT)[0] == 400


def test_a_call_may_hang_and_holds_up_no_other(telegram: FakeBotApi) -> None:
    answers: list[int] = []
    url = f"/bot{telegram.token}/getMe"
    telegram.fail("getMe", "hang")
    num_before = len(telegram.requests("getMe", answered=False))
    hanging = threading.Thread(target=lambda: answers.append(telegram.http.get(url).status_code))
    hanging.start()
    telegram.requests("getMe", at_least=num_before + 1, answered=False)
    assert telegram.http.get(url).status_code == 200
    assert not answers
    telegram.clear_faults()
    hanging.join()
    assert answers == [504]
