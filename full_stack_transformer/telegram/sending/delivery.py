"""Calls to Telegram: what is owed arrives once, what adorns is tried once, errors carry no secrets.

The one window: Telegram may have taken a message whose answer we did not see (a broken connection, a
5xx, kill -9 in that moment). It is resolved on the side of "rather twice than never": the message is
sent again; then the numbers between what was known before and the new message are looked through for
the lost one, and that is deleted. Where numbers cannot tell (more than 30 strangers between), the
message stays twice.

Knows aiogram's session and errors, the database's intentions and the pace; neither prompts nor the
service.
"""

import asyncio
import logging
from collections import defaultdict
from typing import Any, TypeVar

from aiogram import Bot
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.exceptions import (
    ClientDecodeError,
    TelegramAPIError,
    TelegramBadRequest,
    TelegramEntityTooLarge,
    TelegramForbiddenError,
    TelegramMigrateToChat,
    TelegramNetworkError,
    TelegramRetryAfter,
    TelegramServerError,
    TelegramUnauthorizedError,
)
from aiogram.methods import (
    DeleteMessage,
    EditMessageReplyMarkup,
    Response,
    SendDocument,
    SendMessage,
    TelegramMethod,
)

from full_stack_transformer.telegram.sending.pace import Pace
from full_stack_transformer.telegram.state.store import Store

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 30.0
# Answers that say neither yes nor no, such as a 429 without a time: owed, but not for ever.
_MAX_STRANGE_ANSWERS = 8
_MAX_PROBES = 30
# BadRequest comes in variants that differ by text only.
_NOT_MODIFIED = "message is not modified"
_GONE = ("chat not found", "user is deactivated", "peer_id_invalid", "group is deactivated")
_MESSAGE_GONE = ("message to edit not found", "message can't be edited", "message_id_invalid")


class ChatGoneError(Exception):
    """The chat exists no more, or shut the bot out."""


class ChatMovedError(Exception):
    """The group has a new number; the database knows it already."""


class MessageGoneError(Exception):
    """The message that should be edited exists no more."""


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


class Courier:
    """Brings things to chats; one for all chats."""

    def __init__(self, bot: Bot, store: Store, pace: Pace) -> None:
        self.bot = bot
        self._store = store
        self._pace = pace
        # One message at a time in a chat: what lies between two numbers is then easy to tell.
        self._locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.unauthorized = asyncio.Event()
        """Set when Telegram does not know the token any more."""

    async def send(
        self,
        key: str,
        method: SendMessage | SendDocument,
        reply_id: int | None = None,
        position: int = 0,
    ) -> int:
        """Send a message and return its number; called again with the same key, sends nothing more.

        Args:
            key: JOB:PART, the same after a restart.
            method: the message.
            reply_id: whose text it shows, and
            position: which part of it.

        Raises:
            ChatGoneError, ChatMovedError: it cannot be sent there.
            TelegramBadRequest: Telegram refused this very message.
        """
        chat_id = int(method.chat_id)
        async with self._locks[chat_id]:
            is_uncertain, floor, message_id = self._store.intend_send(chat_id, key)
            if message_id is None:
                try:
                    message, lost_sight = await self._until_taken(chat_id, method)
                except (ChatGoneError, TelegramBadRequest):
                    self._store.withdraw_send(chat_id, key)
                    raise
                message_id = message.message_id
                self._store.sent(chat_id, key, message_id, reply_id, position)
                is_uncertain |= lost_sight
            if is_uncertain:
                await self._delete_lost(chat_id, floor, message_id)
            return message_id

    async def call(self, method: TelegramMethod[Any]) -> None:
        """Call a method that does no harm when it is called twice, until Telegram took it.

        Raises:
            MessageGoneError: there is nothing to edit.
            ChatGoneError, ChatMovedError, TelegramBadRequest: as `send`.
        """
        try:
            await self._until_taken(int(getattr(method, "chat_id", 0)), method)
        except TelegramBadRequest as error:
            if _NOT_MODIFIED in error.message:
                return
            if any(words in error.message.lower() for words in _MESSAGE_GONE):
                raise MessageGoneError from None
            raise

    async def attempt(self, method: TelegramMethod[Any]) -> bool:
        """Try something that nobody would miss, once; whether Telegram took it."""
        chat_id = int(getattr(method, "chat_id", 0) or 0)
        if chat_id and not self._pace.try_take(chat_id):
            return False
        return await self.attempt_now(method)

    async def attempt_now(self, method: TelegramMethod[Any]) -> bool:
        """As `attempt`, for calls that no limit of a chat counts, such as answers to buttons."""
        try:
            await self.bot(method)
        except TelegramRetryAfter as error:
            self._pace.pause(int(getattr(method, "chat_id", 0) or 0), error.retry_after)
        except TelegramUnauthorizedError:
            self.unauthorized.set()
        except TelegramBadRequest as error:
            return _NOT_MODIFIED in error.message
        except TelegramAPIError as error:
            logger.debug("%s was not taken: %s", type(method).__name__, type(error).__name__)
        else:
            return True
        return False

    async def _until_taken(
        self, chat_id: int, method: TelegramMethod[_Result]
    ) -> tuple[_Result, bool]:
        """The result, and whether an earlier attempt may have succeeded unseen."""
        pause_seconds, lost_sight, num_strange = _FIRST_PAUSE_SECONDS, False, 0
        while True:
            await self._pace.take(chat_id)
            try:
                return await self.bot(method), lost_sight
            except TelegramRetryAfter as error:
                self._pace.pause(chat_id, error.retry_after)
                reason, wait_seconds = error, float(error.retry_after)
            except TelegramEntityTooLarge:  # aiogram derives it from TelegramNetworkError
                raise
            except (TelegramNetworkError, TelegramServerError) as error:
                lost_sight = True
                reason, wait_seconds = error, pause_seconds  # type: ignore[assignment]
            except TelegramAPIError as error:
                num_strange += 1
                self._raise_refusal(chat_id, error, is_last=num_strange == _MAX_STRANGE_ANSWERS)
                reason, wait_seconds = error, pause_seconds  # type: ignore[assignment]
            name, cause = type(method).__name__, type(reason).__name__
            logger.warning("%s in chat %d: %s; again in %.1f s", name, chat_id, cause, wait_seconds)
            await asyncio.sleep(wait_seconds)
            pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)

    def _raise_refusal(self, chat_id: int, error: TelegramAPIError, *, is_last: bool) -> None:
        """Turn what waiting cannot mend into an exception; return where it may."""
        if isinstance(error, TelegramMigrateToChat):
            self._store.move_chat(chat_id, error.migrate_to_chat_id)
            raise ChatMovedError from None
        if isinstance(error, TelegramUnauthorizedError):
            self.unauthorized.set()  # the process ends; what is owed stays owed
            return
        if isinstance(error, TelegramForbiddenError) or (
            isinstance(error, TelegramBadRequest)
            and any(words in error.message.lower() for words in _GONE)
        ):
            raise ChatGoneError from None
        if isinstance(error, TelegramBadRequest) or is_last:
            raise error

    async def _delete_lost(self, chat_id: int, floor: int, message_id: int) -> None:
        """Delete the message that Telegram took unseen, if it did."""
        for candidate in range(floor + 1, min(message_id, floor + 1 + _MAX_PROBES)):
            if self._store.is_own_message(chat_id, candidate):
                continue
            try:
                # Changes nothing that stays: a message of somebody else cannot be edited.
                await self.call(EditMessageReplyMarkup(chat_id=chat_id, message_id=candidate))
                await self.call(DeleteMessage(chat_id=chat_id, message_id=candidate))
            except (MessageGoneError, TelegramBadRequest):
                continue
            logger.info("deleted a message of chat %d that had arrived unseen", chat_id)
