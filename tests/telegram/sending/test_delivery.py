"""Deliveries through a session with scripted failures; no network."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiogram import Bot
from aiogram.client.session.base import BaseSession
from aiogram.exceptions import (
    TelegramAPIError,
    TelegramBadRequest,
    TelegramEntityTooLarge,
    TelegramForbiddenError,
    TelegramMigrateToChat,
    TelegramNetworkError,
    TelegramRetryAfter,
    TelegramServerError,
)
from aiogram.methods import DeleteMessage, EditMessageReplyMarkup, SendMessage, TelegramMethod
from aiogram.types import Chat, Message

from full_stack_transformer.telegram.sending import delivery
from full_stack_transformer.telegram.sending.delivery import (
    ChatGoneError,
    ChatMovedError,
    Courier,
    RateLimiter,
    SafeSession,
)
from full_stack_transformer.telegram.state.store import Store

TOKEN = "42:very-secret"
METHOD = SendMessage(chat_id=1, text="words of a user")


class FakeChat(BaseSession):
    """A chat of numbered messages; `script` says what goes wrong with the next sends."""

    def __init__(self, *script: TelegramAPIError | str) -> None:
        super().__init__()
        self.script = list(script)
        self.messages: dict[int, str] = {}
        self.foreign: set[int] = set()
        self.calls: list[TelegramMethod[Any]] = []

    def add(self, text: str) -> int:
        number = 1 + max([*self.messages, *self.foreign, 0])
        self.messages[number] = text
        return number

    async def make_request(
        self, bot: Bot, method: TelegramMethod[Any], timeout: int | None = None
    ) -> Any:
        self.calls.append(method)
        if isinstance(method, SendMessage):
            failure = self.script.pop(0) if self.script else None
            if failure == "accepted, no response":
                self.add(method.text)
                raise TelegramNetworkError(method, "reset")
            if isinstance(failure, TelegramAPIError):
                raise failure
            message_id = self.add(method.text)
            chat = Chat(id=int(method.chat_id), type="private")
            return Message(message_id=message_id, date=datetime.now(UTC), chat=chat)
        if isinstance(method, EditMessageReplyMarkup):
            if method.message_id in self.messages:
                raise TelegramBadRequest(method, "Bad Request: message is not modified")
            raise TelegramBadRequest(method, "Bad Request: message can't be edited")
        if isinstance(method, DeleteMessage):
            del self.messages[method.message_id]
        return True

    async def close(self) -> None:
        pass

    async def stream_content(self, *args: Any, **options: Any) -> AsyncGenerator[bytes, None]:
        yield b""


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_FIRST_PAUSE_SECONDS", 0)


@pytest.fixture
def store(quick_path: Path) -> Iterator[Store]:
    opened = Store(quick_path / "bot.sqlite3", 42)
    yield opened
    opened.close()


def send(store: Store, chat: FakeChat, key: str = "1:0", text: str = "text") -> int:
    """Send one message as a new process would."""

    async def sending() -> int:
        quick = RateLimiter(itertools.count(0.0, 100.0).__next__)
        courier = Courier(Bot(TOKEN, chat), store, quick)
        return await courier.send(key, SendMessage(chat_id=1, text=text))

    return asyncio.run(sending())


@pytest.mark.parametrize(
    "failure",
    [
        TelegramServerError(METHOD, "502"),
        TelegramNetworkError(METHOD, "reset"),
        "accepted, no response",
    ],
    ids=["502", "reset", "accepted"],
)
def test_a_message_arrives_once_whatever_was_seen_of_it(
    store: Store, failure: TelegramAPIError | str
) -> None:
    chat = FakeChat(failure)
    number = send(store, chat)
    assert chat.messages == {number: "text"}
    assert send(store, chat) == number  # the same key again: nothing is sent
    assert chat.messages == {number: "text"}


def test_after_a_kill_during_a_send_the_lost_message_is_found_and_deleted(
    store: Store,
) -> None:
    chat = FakeChat()
    store.saw_message(1, chat.add("of the user"))
    store.begin_send(1, "1:0")
    chat.add("text")  # accepted, and then the process was killed
    number = send(store, chat)
    assert sorted(chat.messages) == [1, number]
    assert chat.messages[1] == "of the user"


def test_messages_of_others_between_are_left_alone(store: Store) -> None:
    chat = FakeChat("accepted, no response")
    store.saw_message(1, 1)
    chat.foreign = {2, 3}
    number = send(store, chat)
    assert chat.messages == {number: "text"}
    deleted = [call.message_id for call in chat.calls if isinstance(call, DeleteMessage)]
    assert deleted == [number - 1]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (TelegramForbiddenError(METHOD, "Forbidden: bot was blocked by the user"), ChatGoneError),
        (TelegramBadRequest(METHOD, "Bad Request: chat not found"), ChatGoneError),
        (TelegramMigrateToChat(METHOD, "moved", -100), ChatMovedError),
        (TelegramBadRequest(METHOD, "Bad Request: message is too long"), TelegramBadRequest),
        (TelegramEntityTooLarge(METHOD, "too large"), TelegramEntityTooLarge),
    ],
    ids=["403", "unknown", "moved", "400", "413"],
)
def test_errors_that_retrying_cannot_solve_are_raised_at_once(
    store: Store, error: TelegramAPIError, raised: type[Exception]
) -> None:
    chat = FakeChat(error)
    with pytest.raises(raised):
        send(store, chat)
    assert len(chat.calls) == 1


def test_unknown_errors_are_not_retried_for_ever(store: Store) -> None:
    chat = FakeChat(*[TelegramAPIError(METHOD, "429 without a time")] * 100)
    with pytest.raises(TelegramAPIError):
        send(store, chat)
    assert len(chat.calls) == 8


def test_a_429_is_waited_for(store: Store) -> None:
    chat = FakeChat(TelegramRetryAfter(METHOD, "flood", 1))
    started = time.monotonic()
    send(store, chat)
    assert time.monotonic() - started >= 1
    assert len(chat.calls) == 2


def test_previews_leave_a_reserve_for_messages() -> None:
    now = 0.0
    limiter = RateLimiter(lambda: now)

    def burst(chat_id: int) -> int:
        count = 0
        while limiter.try_acquire(chat_id):
            count += 1
        return count

    for chat_id, per_minute in ((-1, 20), (1, 60)):
        burst(chat_id)
        before = now
        count = 0
        while now - before < 600:
            now += 0.1
            count += burst(chat_id)
        assert 0.9 * per_minute < count / 10 <= per_minute
    asyncio.run(limiter.acquire(-1))  # at once, from the reserve


def test_errors_quote_neither_address_nor_answer() -> None:
    async def errors() -> list[TelegramAPIError]:
        session = SafeSession()
        session.api = session.api.from_base("http://127.0.0.1:9")
        bot, found = Bot(TOKEN, session), []
        try:
            await bot(METHOD)
        except TelegramAPIError as error:
            found.append(error)
        try:
            session.check_response(bot, METHOD, 200, '{"ok": true, "result": "words of a user"}')
        except TelegramAPIError as error:
            found.append(error)
        await session.close()
        return found

    network, server = asyncio.run(errors())
    assert isinstance(network, TelegramNetworkError)
    assert isinstance(server, TelegramServerError)
    for error in (network, server):
        assert error.__suppress_context__ or error.__context__ is None
        assert "very-secret" not in str(error)
        assert "words" not in str(error)
