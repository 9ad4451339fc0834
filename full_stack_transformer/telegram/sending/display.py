"""A reply on a user's screen: while it is written, when it is finished, when another variant is shown.

A private chat sees the growing text as a draft, a group as edits of one message. Both follow a clock,
not the number of characters, and take only what the chat's rate limit leaves over.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from aiogram.exceptions import TelegramAPIError, TelegramBadRequest
from aiogram.methods import DeleteMessage, SendChatAction, SendMessageDraft
from aiogram.types import InlineKeyboardMarkup

from full_stack_transformer.telegram.sending.delivery import Courier, MessageGoneError
from full_stack_transformer.telegram.sending.formatting import (
    Piece,
    edited_message,
    new_message,
    reply_keyboard,
    stop_keyboard,
)
from full_stack_transformer.telegram.sending.markdown import (
    FAILURES,
    growing_pieces,
    reply_pieces,
)
from full_stack_transformer.telegram.state.store import Reply, Store
from full_stack_transformer.telegram.texts import LANGUAGES

logger = logging.getLogger(__name__)

_PRIVATE_SECONDS = 1.1
_GROUP_SECONDS = 3.2
_AGAIN_SECONDS = 0.3
# A text that is finished so soon (in a group, in a private chat) is sent without a preview.
_GRACE_SECONDS = (0.4, 0.1)
# Telegram shows a draft for 30 s, "typing" for 5 s.
_MAX_DRAFT_SECONDS = 20.0
_TYPING_SECONDS = 4.5
# How long a call under way is awaited: a draft that arrives after its message would stay in the chat.
_MAX_CLOSING_SECONDS = 5.0


class Display:
    """Shows finished replies."""

    def __init__(self, store: Store, courier: Courier) -> None:
        self._store = store
        self._courier = courier

    async def show(self, reply: Reply, key: str) -> None:
        """Send a finished reply, or edit its messages; delete those that it does not need any more."""
        words = LANGUAGES[reply.language]
        pieces = reply_pieces(reply)
        messages = self._store.messages_of_reply(reply.id)
        keyboard = None
        if reply.finish not in FAILURES:
            keyboard = reply_keyboard(words, reply.id, reply.shown, len(reply.texts))
        for position, piece in enumerate(pieces):
            below = keyboard if position == len(pieces) - 1 else None
            if position < len(messages):
                message_id = messages[position]
                try:
                    await self._courier.call(
                        edited_message(reply.chat_id, message_id, piece, below)
                    )
                    continue
                except MessageGoneError:  # deleted by a user
                    self._store.forget_message(reply.chat_id, message_id)
                    self._store.cancel_send(reply.chat_id, f"{key}:{position}")
            method = new_message(
                reply.chat_id, reply.thread_id, piece, reply.prompt_message_id, below
            )
            await self._courier.send(f"{key}:{position}", method, reply.id, position)
        for message_id in messages[len(pieces) :]:
            await self.delete(reply.chat_id, message_id)

    async def delete(self, chat_id: int, message_id: int) -> None:
        """Delete a message of the bot, if Telegram lets it."""
        try:
            await self._courier.call(DeleteMessage(chat_id=chat_id, message_id=message_id))
        except (TelegramAPIError, MessageGoneError):
            logger.debug("a message of chat %d could not be deleted", chat_id)
        self._store.forget_message(chat_id, message_id)


class Preview:
    """Shows the growing text of one reply; use it with `async with`, call `changed` when it grew.

    Its calls are tried once: the finished text is delivered by `Display`.
    """

    def __init__(
        self, courier: Courier, store: Store, reply: Reply, key: str, text: Callable[[], str]
    ) -> None:
        self._courier = courier
        self._store = store
        self._reply = reply
        self._key = key
        self._text = text
        self._is_private = reply.chat_id > 0
        self._thread_id = reply.thread_id or None
        self._grown = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Preview":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Wait for the call under way, but not long."""
        assert self._task is not None
        self._closing.set()
        self._grown.set()
        _done, late = await asyncio.wait({self._task}, timeout=_MAX_CLOSING_SECONDS)
        if late:
            self._task.cancel()
            await asyncio.wait({self._task})
        with contextlib.suppress(asyncio.CancelledError):
            if error := self._task.exception():
                # A chat that is gone is noticed when the finished text is delivered.
                logger.debug("the preview ended early: %s", type(error).__name__)

    def changed(self) -> None:
        """There is more text."""
        self._grown.set()

    async def _run(self) -> None:
        shown: str | None = None
        await self._type()
        while not self._closing.is_set():
            patience = _TYPING_SECONDS if shown is None else _MAX_DRAFT_SECONDS
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._grown.wait(), patience)
            if self._closing.is_set():
                return
            is_new = self._grown.is_set()
            self._grown.clear()
            newest = self._newest_piece()
            if newest is None:
                if not is_new:
                    await self._type()
                continue
            if shown is None:
                if await self._wait(_GRACE_SECONDS[self._is_private]):
                    return
                newest = self._newest_piece() or newest
            was_shown = True
            # A draft is sent again before it vanishes, also when the text does not grow.
            if newest.text != shown or (not is_new and self._is_private):
                was_shown = await self._show(newest)
            if was_shown:
                shown = newest.text
            else:
                self._grown.set()
            clock = _PRIVATE_SECONDS if self._is_private else _GROUP_SECONDS
            await self._wait(clock if was_shown else _AGAIN_SECONDS)

    async def _wait(self, seconds: float) -> bool:
        """Wait; true if the text was finished meanwhile."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)
        return self._closing.is_set()

    async def _type(self) -> None:
        await self._courier.attempt_now(
            SendChatAction(
                chat_id=self._reply.chat_id, message_thread_id=self._thread_id, action="typing"
            )
        )

    def _newest_piece(self) -> Piece | None:
        text = self._text()
        if not text.strip():
            return None
        return growing_pieces(self._reply, text)[-1]

    async def _show(self, piece: Piece) -> bool:
        reply = self._reply
        if self._is_private:
            return await self._courier.attempt(
                SendMessageDraft(
                    chat_id=reply.chat_id,
                    draft_id=reply.id,
                    message_thread_id=self._thread_id,
                    text=piece.text,
                    entities=piece.entities,
                    parse_mode=None,
                    can_stop=True,
                    keep_on_stop=True,
                )
            )
        keyboard = stop_keyboard(LANGUAGES[reply.language], reply.id)
        messages = self._store.messages_of_reply(reply.id)
        if messages:
            return await self._courier.attempt(
                edited_message(reply.chat_id, messages[0], piece, keyboard)
            )
        await self._begin(piece, keyboard)
        return True

    async def _begin(self, piece: Piece, keyboard: InlineKeyboardMarkup) -> None:
        """Send the message that edits let grow, and that will show the finished text."""
        reply = self._reply
        method = new_message(
            reply.chat_id, reply.thread_id, piece, reply.prompt_message_id, keyboard
        )
        with contextlib.suppress(TelegramBadRequest):
            await self._courier.send(self._key, method, reply.id)
