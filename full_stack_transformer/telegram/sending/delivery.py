"""Calls to Telegram: messages are retried until they are delivered, previews are tried once.

One case stays uncertain: Telegram may have accepted a message whose response we did not see (a broken
connection, a 5xx, kill -9 in that moment). Then the message is sent again, the ids between the last
one known before and the new one are searched for the lost message, and that is deleted. At most 30 ids
are searched; with more between, a duplicate stays.

Knows aiogram's session and errors, the record of sends and the rate limits; neither prompts nor the
service. No error quotes the token or a text.
"""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
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
    GetFile,
    Response,
    SendDocument,
    SendMessage,
    TelegramMethod,
)
from aiohttp import ClientError

from full_stack_transformer.telegram.state.store import Store

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 30.0
_RECORD_AGAIN_SECONDS = 1.0
# At the end of the process a message is tried for so long; Docker allows 10 s in all.
_MAX_ENDING_SECONDS = 5.0
# Responses that are neither a refusal nor a success, such as a 429 without a time, are retried so often.
_MAX_STRANGE_RESPONSES = 8
_MAX_PROBES = 30
# Variants of BadRequest differ only in their text.
_NOT_MODIFIED = "message is not modified"
_TOPIC_GONE = "thread not found"
_GONE = ("chat not found", "user is deactivated", "peer_id_invalid", "group is deactivated")
_MESSAGE_GONE = ("message to edit not found", "message can't be edited", "message_id_invalid")

# (capacity, tokens per second), a little below Telegram's limits: about one message a second in a
# private chat, 20 a minute in a group, 30 a second in all.
# https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this
_PRIVATE = (3.0, 1 / 1.05)
_GROUP = (16.0, 1 / 3.2)
_ALL = (28.0, 28.0)
# At the start it is unknown how much an earlier process has used.
_FIRST_SHARE = 0.7
# Previews leave this many tokens for messages, such as the end of a text.
_PRIVATE_RESERVE = 1.0
_GROUP_RESERVE = 4.0
_MAX_IDLE_BUCKETS = 10_000


class ChatGoneError(Exception):
    """The chat does not exist any more, or has blocked or removed the bot."""


class ChatMovedError(Exception):
    """The group has a new id; the database has been updated."""


class PostponedError(Exception):
    """The process ends before a job began or was delivered; the next process does it."""


class MessageGoneError(Exception):
    """The message to edit does not exist any more."""


class SafeSession(AiohttpSession):
    """aiogram's HTTP session, with errors that can be logged.

    aiogram's own errors quote the URL, which holds the token, or the body, which holds users' texts.
    """

    async def make_request(
        self, bot: Bot, method: TelegramMethod[_Result], timeout: int | None = None
    ) -> _Result:
        """Call Telegram; every broken connection is a TelegramNetworkError."""
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
        """Parse the response; one that is not Telegram's, such as a proxy's page, is a server error."""
        try:
            return super().check_response(bot, method, status_code, content)
        except ClientDecodeError:
            message = f"status {status_code}, {len(content)} characters, not a Bot API response"
        raise TelegramServerError(method=method, message=message)


def _name(cause: BaseException | None) -> str:
    reason = getattr(cause, "strerror", None)  # "Connect call failed ('127.0.0.1', 8081)"
    return f"{type(cause).__name__}: {reason}" if reason else type(cause).__name__


class _Bucket:
    def __init__(self, capacity: float, tokens_per_second: float, now: float) -> None:
        self.capacity = capacity
        self.tokens_per_second = tokens_per_second
        self.tokens = max(1.0, capacity * _FIRST_SHARE)
        self.filled_at = now

    def seconds_until(self, tokens: float, now: float) -> float:
        """Seconds until this number of tokens is available."""
        if now > self.filled_at:
            gained = (now - self.filled_at) * self.tokens_per_second
            self.tokens = min(self.capacity, self.tokens + gained)
            self.filled_at = now
        pause_seconds = max(0.0, self.filled_at - now)  # in a pause `filled_at` is in the future
        return pause_seconds + max(0.0, tokens - self.tokens) / self.tokens_per_second

    def pause(self, seconds: float, now: float) -> None:
        self.tokens = min(self.tokens, 1.0)
        self.filled_at = max(self.filled_at, now + seconds)


class RateLimiter:
    """Token buckets of all chats, and one over all of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._chats: dict[int, _Bucket] = {}
        self._all = _Bucket(*_ALL, clock())

    async def acquire(
        self, chat_id: int, wait: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """Wait until a message may be sent."""
        while (seconds := self._seconds_until(chat_id, 1.0)) > 0:
            await wait(seconds)
        self._spend(chat_id)

    def try_acquire(self, chat_id: int) -> bool:
        """Whether a preview may be sent now, with the reserve left for messages."""
        reserve = _GROUP_RESERVE if chat_id < 0 else _PRIVATE_RESERVE
        if self._seconds_until(chat_id, 1.0 + reserve) > 0:
            return False
        self._spend(chat_id)
        return True

    def pause(self, chat_id: int, seconds: float) -> None:
        """Send nothing to a chat for a while, as Telegram asked."""
        self._bucket(chat_id).pause(seconds, self._clock())

    def _seconds_until(self, chat_id: int, tokens: float) -> float:
        bucket = self._bucket(chat_id)
        now = self._clock()
        return max(bucket.seconds_until(tokens, now), self._all.seconds_until(1.0, now))

    def _spend(self, chat_id: int) -> None:
        self._bucket(chat_id).tokens -= 1
        self._all.tokens -= 1

    def _bucket(self, chat_id: int) -> _Bucket:
        if chat_id not in self._chats:
            if len(self._chats) >= _MAX_IDLE_BUCKETS:
                self._drop_full_ones()
            self._chats[chat_id] = _Bucket(*(_GROUP if chat_id < 0 else _PRIVATE), self._clock())
        return self._chats[chat_id]

    def _drop_full_ones(self) -> None:
        now = self._clock()
        self._chats = {
            chat_id: bucket
            for chat_id, bucket in self._chats.items()
            if bucket.seconds_until(bucket.capacity, now) > 0
        }


class Courier:
    """Sends messages and makes calls, for all chats.

    Args:
        bot: makes the calls.
        store: the record of sends.
        limiter: when a chat may be written to.
        ending: once it is set, what Telegram does not take soon is left for the next process.
    """

    def __init__(
        self, bot: Bot, store: Store, limiter: RateLimiter, ending: asyncio.Event | None = None
    ) -> None:
        self._bot = bot
        self._store = store
        self._limiter = limiter
        self._ending = ending or asyncio.Event()
        # One message at a time in a chat, so that a lost one lies between two known ids.
        self._locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        # The event loop keeps weak references to tasks: without the set one could vanish while it runs.
        self._background: set[asyncio.Task[bool]] = set()
        self.unauthorized = asyncio.Event()
        """Set when Telegram rejects the token."""

    async def send(
        self,
        key: str,
        method: SendMessage | SendDocument,
        reply_id: int | None = None,
        position: int = 0,
    ) -> int:
        """Send a message and return its id; a second call with the same key sends nothing.

        A message for a topic that was deleted goes to the chat itself.

        Args:
            key: JOB:PART, the same after a restart.
            method: the message.
            reply_id: the reply that it shows.
            position: the part of the reply that it shows.

        Raises:
            ChatGoneError, ChatMovedError: the chat cannot be written to.
            TelegramBadRequest: Telegram refused the message.
            PostponedError: the process ends, and Telegram does not take the message soon.
        """
        try:
            return await self._send(key, method, reply_id, position)
        except TelegramBadRequest as error:
            if _TOPIC_GONE not in error.message:
                raise
            method = method.model_copy(update={"message_thread_id": None})
            return await self._send(key, method, reply_id, position)

    async def _send(
        self, key: str, method: SendMessage | SendDocument, reply_id: int | None, position: int
    ) -> int:
        chat_id = int(method.chat_id)
        async with self._locks[chat_id]:
            is_uncertain, floor, message_id = self._store.begin_send(chat_id, key)
            if message_id is None:
                try:
                    message, was_uncertain = await self._until_accepted(chat_id, method)
                except (ChatGoneError, TelegramBadRequest):
                    self._store.cancel_send(chat_id, key)
                    raise
                message_id = message.message_id
                await self._record(chat_id, key, message_id, reply_id, position)
                is_uncertain |= was_uncertain
            if is_uncertain:
                await self._delete_lost(chat_id, floor, message_id)
            return message_id

    async def _record(
        self, chat_id: int, key: str, message_id: int, reply_id: int | None, position: int
    ) -> None:
        """Record that a message was sent, however long a full disk takes: else it is sent again."""
        while True:
            try:
                return self._store.end_send(chat_id, key, message_id, reply_id, position)
            except sqlite3.OperationalError as error:
                self._store.report(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), _RECORD_AGAIN_SECONDS)
                raise PostponedError

    async def call(self, method: TelegramMethod[Any]) -> None:
        """Call an idempotent method until Telegram accepts it.

        Raises:
            MessageGoneError: the message to edit does not exist any more.
            ChatGoneError, ChatMovedError, TelegramBadRequest, PostponedError: as `send`.
        """
        try:
            await self._until_accepted(int(getattr(method, "chat_id", 0)), method)
        except TelegramBadRequest as error:
            if _NOT_MODIFIED in error.message:
                return
            if any(words in error.message.lower() for words in _MESSAGE_GONE):
                raise MessageGoneError from None
            raise

    async def download(self, chat_id: int, file_id: str, max_bytes: int) -> bytes | None:
        """The content of a user's file; None if it is larger, or gone.

        Raises:
            PostponedError: the process ends, and Telegram does not answer soon.
        """
        method = GetFile(file_id=file_id)
        try:
            file, _ = await self._until_accepted(chat_id, method)
            if file.file_path is None or (file.file_size or 0) > max_bytes:
                return None
            content = await self._bot.download_file(file.file_path)
        except (TelegramAPIError, ChatGoneError, ClientError, TimeoutError) as error:
            logger.warning("a file of chat %d was not read: %s", chat_id, type(error).__name__)
            return None
        return None if content is None else content.read(max_bytes)

    async def attempt(self, method: TelegramMethod[Any]) -> bool:
        """Try a call once, if the chat's rate limit allows it; whether Telegram accepted it."""
        chat_id = int(getattr(method, "chat_id", 0) or 0)
        if chat_id and not self._limiter.try_acquire(chat_id):
            return False
        return await self.attempt_now(method)

    async def attempt_now(self, method: TelegramMethod[Any]) -> bool:
        """As `attempt`, for calls that do not count against a chat's limit, such as answers to presses."""
        try:
            await self._bot(method)
        except TelegramRetryAfter as error:
            self._limiter.pause(int(getattr(method, "chat_id", 0) or 0), error.retry_after)
        except TelegramUnauthorizedError:
            self.unauthorized.set()
        except TelegramBadRequest as error:
            return _NOT_MODIFIED in error.message
        except TelegramAPIError as error:
            logger.debug("%s failed: %s", type(method).__name__, type(error).__name__)
        else:
            return True
        return False

    def attempt_soon(self, method: TelegramMethod[Any]) -> None:
        """As `attempt_now`, in the background."""
        task = asyncio.create_task(self.attempt_now(method))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def finish(self, max_seconds: float) -> None:
        """Wait for the calls in the background, but not longer."""
        if self._background:
            await asyncio.wait(self._background, timeout=max_seconds)

    async def _until_accepted(
        self, chat_id: int, method: TelegramMethod[_Result]
    ) -> tuple[_Result, bool]:
        """The result, and whether an earlier attempt may have succeeded without a response."""
        pause_seconds, is_uncertain, num_strange = _FIRST_PAUSE_SECONDS, False, 0
        until: float | None = None
        while True:
            await self._limiter.acquire(chat_id, self._wait)
            called_at = time.monotonic()
            try:
                return await self._called(method), is_uncertain
            except TelegramRetryAfter as error:
                self._limiter.pause(chat_id, error.retry_after)
                cause, wait_seconds = type(error).__name__, float(error.retry_after)
            except TelegramEntityTooLarge:  # aiogram derives it from TelegramNetworkError
                raise
            except (TelegramNetworkError, TelegramServerError) as error:
                is_uncertain = True
                cause, wait_seconds = type(error).__name__, pause_seconds
            except TelegramAPIError as error:
                num_strange += 1
                self._raise_refusal(chat_id, error, is_last=num_strange == _MAX_STRANGE_RESPONSES)
                cause, wait_seconds = type(error).__name__, pause_seconds
            name = type(method).__name__
            logger.warning(
                "%s in chat %d failed (%s); retrying in %.1f s", name, chat_id, cause, wait_seconds
            )
            if self._ending.is_set():
                until = until or called_at + _MAX_ENDING_SECONDS
                if time.monotonic() + wait_seconds > until:
                    raise PostponedError
            await self._wait(wait_seconds)
            pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)

    async def _called(self, method: TelegramMethod[_Result]) -> _Result:
        """The result of one call; PostponedError if the process ends and Telegram does not respond."""
        call = asyncio.create_task(self._bot(method))
        ending = asyncio.create_task(self._ending.wait())
        try:
            await asyncio.wait({call, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                await asyncio.wait({call}, timeout=_MAX_ENDING_SECONDS)
            if not call.done():
                raise PostponedError  # recorded as sent or not; the next process finds out
            return call.result()
        finally:
            ending.cancel()
            call.cancel()

    async def _wait(self, seconds: float) -> None:
        """Wait; raises PostponedError if the process ends and much of it is left then."""
        until = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), seconds)
        left_seconds = until - time.monotonic()
        if left_seconds > _MAX_ENDING_SECONDS:
            raise PostponedError
        if left_seconds > 0:
            await asyncio.sleep(left_seconds)

    def _raise_refusal(self, chat_id: int, error: TelegramAPIError, *, is_last: bool) -> None:
        """Raise an error that retrying cannot solve; return for others."""
        if isinstance(error, TelegramMigrateToChat):
            self._store.move_chat(chat_id, error.migrate_to_chat_id)
            raise ChatMovedError from None
        if isinstance(error, TelegramUnauthorizedError):
            self.unauthorized.set()  # the process ends; jobs stay pending
            return
        if isinstance(error, TelegramForbiddenError) or (
            isinstance(error, TelegramBadRequest)
            and any(words in error.message.lower() for words in _GONE)
        ):
            raise ChatGoneError from None
        if isinstance(error, TelegramBadRequest) or is_last:
            raise error

    async def _delete_lost(self, chat_id: int, floor: int, message_id: int) -> None:
        """Delete the message that Telegram accepted without our seeing it, if there is one."""
        for candidate in range(floor + 1, min(message_id, floor + 1 + _MAX_PROBES)):
            if self._store.is_own_message(chat_id, candidate):
                continue
            try:
                # Succeeds only on the bot's own messages, so it finds the lost one.
                await self.call(EditMessageReplyMarkup(chat_id=chat_id, message_id=candidate))
                await self.call(DeleteMessage(chat_id=chat_id, message_id=candidate))
            except (MessageGoneError, TelegramBadRequest):
                continue
            logger.info("deleted a duplicate message of chat %d", chat_id)
