"""Calls to Telegram: those that must arrive, and errors that carry neither token nor texts.

Knows aiogram's session and errors; neither prompts nor the service.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from aiogram import Bot
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.exceptions import (
    ClientDecodeError,
    TelegramAPIError,
    TelegramMigrateToChat,
    TelegramNetworkError,
    TelegramRetryAfter,
    TelegramServerError,
)
from aiogram.methods import Response, TelegramMethod

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Pauses of 0.5, 1, 2 … 30 s: half a minute of trouble on the way costs nobody an answer.
_MAX_ATTEMPTS = 8
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 30.0
# Longer bans are Telegram's answer to a flood; an answer that is this late helps nobody.
_MAX_RETRY_AFTER_SECONDS = 600
# A client shows "typing" for five seconds. https://core.telegram.org/bots/api#sendchataction
_TYPING_INTERVAL_SECONDS = 4.5


class DiscreetSession(AiohttpSession):
    """aiogram's HTTP session, with errors that can be logged.

    The original ones quote the address, which holds the token, or the body, which holds what
    users wrote; aiogram logs them as they are.
    """

    async def make_request(
        self, bot: Bot, method: TelegramMethod[_Result], timeout: int | None = None
    ) -> _Result:
        """Call Telegram; whatever breaks on the way is a TelegramNetworkError."""
        try:
            return await super().make_request(bot, method, timeout)
        except TelegramNetworkError as error:
            cause = error.__cause__
        except (OSError, UnicodeError) as error:  # aiogram translates aiohttp's own errors only
            cause = error
        raise TelegramNetworkError(method=method, message=_name(cause))

    def check_response(
        self, bot: Bot, method: TelegramMethod[_Result], status_code: int, content: str
    ) -> Response[_Result]:
        """Understand the answer; one that is not Telegram's, such as a proxy's page, is a server error."""
        try:
            return super().check_response(bot, method, status_code, content)
        except ClientDecodeError:
            message = f"status {status_code}, {len(content)} characters that are no Bot API answer"
        raise TelegramServerError(method=method, message=message)


def _name(cause: BaseException | None) -> str:
    reason = getattr(cause, "strerror", None)  # "Connect call failed ('127.0.0.1', 8081)"
    return f"{type(cause).__name__}: {reason}" if reason else type(cause).__name__


async def deliver(bot: Bot, method: TelegramMethod[_Result]) -> _Result:
    """Call `method` until Telegram took it.

    An attempt whose confirmation was lost is repeated: rather an answer twice than none.

    Raises:
        TelegramAPIError: Telegram refused it, or was away for all attempts.
    """
    pause_seconds = _FIRST_PAUSE_SECONDS
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        try:
            return await bot(method)
        except TelegramMigrateToChat as error:
            reason: TelegramAPIError = error
            method = method.model_copy(update={"chat_id": error.migrate_to_chat_id})
            wait_seconds = 0.0
        except TelegramRetryAfter as error:
            if error.retry_after > _MAX_RETRY_AFTER_SECONDS:
                raise
            reason, wait_seconds = error, float(error.retry_after)
        except (TelegramNetworkError, TelegramServerError) as error:
            reason, wait_seconds = error, pause_seconds
            pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)
        if attempt == _MAX_ATTEMPTS:
            break
        logger.warning(
            "%s failed (%s), attempt %d of %d; again in %.1f s",
            type(method).__name__,
            type(reason).__name__,
            attempt,
            _MAX_ATTEMPTS,
            wait_seconds,
        )
        await asyncio.sleep(wait_seconds)
    raise reason


@asynccontextmanager
async def typing(bot: Bot, chat_id: int, thread_id: int | None) -> AsyncIterator[None]:
    """Show "typing" in a chat while the block runs.

    Not aiogram's ChatActionSender: its end waits for a call in flight, which delays the answer, and
    one 429 ends it for good.
    """
    task = asyncio.create_task(_keep_typing(bot, chat_id, thread_id))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _keep_typing(bot: Bot, chat_id: int, thread_id: int | None) -> None:
    while True:
        pause_seconds = _TYPING_INTERVAL_SECONDS
        try:
            await bot.send_chat_action(chat_id, "typing", message_thread_id=thread_id)
        except TelegramRetryAfter as error:
            pause_seconds = max(pause_seconds, error.retry_after)
        except TelegramAPIError as error:  # an ornament: the answer itself tells what is wrong
            logger.debug("no typing in chat %d: %s", chat_id, type(error).__name__)
        await asyncio.sleep(pause_seconds)
