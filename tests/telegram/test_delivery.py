"""Deliveries through a session that fails as told; no network."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from aiogram import Bot
from aiogram.client.session.base import BaseSession
from aiogram.exceptions import (
    TelegramAPIError,
    TelegramForbiddenError,
    TelegramMigrateToChat,
    TelegramNetworkError,
    TelegramRetryAfter,
    TelegramServerError,
)
from aiogram.methods import SendMessage, TelegramMethod

from full_stack_transformer.telegram import delivery
from full_stack_transformer.telegram.delivery import DiscreetSession, deliver, typing

TOKEN = "42:very-secret"
METHOD = SendMessage(chat_id=1, text="words of a user")


class ScriptedSession(BaseSession):
    """Raises the errors of a script, one per call, then answers True."""

    def __init__(self, *script: TelegramAPIError) -> None:
        super().__init__()
        self.script = list(script)
        self.calls: list[TelegramMethod[Any]] = []

    async def make_request(
        self, bot: Bot, method: TelegramMethod[Any], timeout: int | None = None
    ) -> Any:
        self.calls.append(method)
        if self.script:
            raise self.script.pop(0)
        return True

    async def close(self) -> None:
        pass

    async def stream_content(self, *args: Any, **options: Any) -> AsyncGenerator[bytes, None]:
        yield b""


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_FIRST_PAUSE_SECONDS", 0)


def test_attempts_are_bounded() -> None:
    session = ScriptedSession(*[TelegramServerError(METHOD, "away")] * 100)
    with pytest.raises(TelegramServerError):
        asyncio.run(deliver(Bot(TOKEN, session), METHOD))
    assert len(session.calls) == 8


@pytest.mark.parametrize(
    "error",
    [TelegramForbiddenError(METHOD, "blocked"), TelegramRetryAfter(METHOD, "flood", 100_000)],
    ids=["403", "429-for-a-day"],
)
def test_what_waiting_cannot_mend_is_raised_at_once(error: TelegramAPIError) -> None:
    session = ScriptedSession(error)
    with pytest.raises(type(error)):
        asyncio.run(deliver(Bot(TOKEN, session), METHOD))
    assert len(session.calls) == 1


def test_an_answer_follows_its_chat_to_a_supergroup() -> None:
    session = ScriptedSession(TelegramMigrateToChat(METHOD, "moved", -100))
    assert asyncio.run(deliver(Bot(TOKEN, session), METHOD))
    assert [getattr(call, "chat_id", None) for call in session.calls] == [1, -100]


def test_typing_goes_on_after_trouble_and_does_not_hold_up_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "_TYPING_INTERVAL_SECONDS", 0)
    enough = asyncio.Event()

    class CountingSession(ScriptedSession):
        async def make_request(
            self, bot: Bot, method: TelegramMethod[Any], timeout: int | None = None
        ) -> Any:
            if len(self.calls) == 2:
                enough.set()
                await asyncio.Event().wait()  # a call in flight that never ends
            return await super().make_request(bot, method, timeout)

    async def scenario() -> None:
        errors = [TelegramNetworkError(METHOD, "reset"), TelegramForbiddenError(METHOD, "no")]
        bot = Bot(TOKEN, CountingSession(*errors))
        async with asyncio.timeout(10), typing(bot, 1, None):
            await enough.wait()

    asyncio.run(scenario())


def test_errors_quote_neither_address_nor_answer() -> None:
    async def errors() -> list[TelegramAPIError]:
        session = DiscreetSession()
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
