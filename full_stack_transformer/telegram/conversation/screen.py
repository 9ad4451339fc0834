"""A text on a person's screen while it is made: drafts in private chats, edits of a message in groups.

On a clock, never by the number of characters, and only with what the chat's pace leaves over; what is
shown is always the newest text. Nothing here is owed: the finished text is delivered elsewhere.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from aiogram.exceptions import TelegramBadRequest
from aiogram.methods import EditMessageText, SendChatAction, SendMessage, SendMessageDraft
from aiogram.types import InlineKeyboardMarkup

from full_stack_transformer.telegram.sending.buttons import stop_keyboard
from full_stack_transformer.telegram.sending.delivery import Courier
from full_stack_transformer.telegram.sending.replies import (
    NO_PREVIEW,
    Piece,
    answers_to,
    text_pieces,
)
from full_stack_transformer.telegram.state.records import Reply
from full_stack_transformer.telegram.state.store import Store
from full_stack_transformer.telegram.texts import LANGUAGES

logger = logging.getLogger(__name__)

_PRIVATE_SECONDS = 1.1
_GROUP_SECONDS = 3.2
_AGAIN_SECONDS = 0.3
# A text that is ready so soon (in a group, in a private chat) is sent at once, without a preview.
_GRACE_SECONDS = (0.4, 0.1)
# Telegram shows a draft for 30 s, "typing" for 5 s.
_MAX_DRAFT_SECONDS = 20.0
_TYPING_SECONDS = 4.5
# What is under way is awaited so long: a draft that arrives after its message would haunt the chat.
_MAX_CLOSING_SECONDS = 5.0


class Screen:
    """Shows one reply; use it with `async with`, call `changed` when the text grew."""

    def __init__(
        self, courier: Courier, store: Store, reply: Reply, key: str, text: Callable[[], str]
    ) -> None:
        self._courier = courier
        self._store = store
        self._reply = reply
        self._key = key
        self._text = text
        self._words = LANGUAGES[reply.language]
        self._grown = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread_id = reply.thread_id or None

    async def __aenter__(self) -> "Screen":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Wait for what is under way, but not long."""
        assert self._task is not None
        self._closing.set()
        self._grown.set()
        _done, late = await asyncio.wait({self._task}, timeout=_MAX_CLOSING_SECONDS)
        if late:
            self._task.cancel()
            await asyncio.wait({self._task})
        with contextlib.suppress(asyncio.CancelledError):
            if error := self._task.exception():
                # An ornament broke; whoever is gone is noticed when the text itself is delivered.
                logger.debug("the screen ended early: %s", type(error).__name__)

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
                if await self._wait(_GRACE_SECONDS[self._reply.chat_id > 0]):
                    return
                newest = self._newest_piece() or newest
            was_shown = True
            # A draft is shown anew before it vanishes, also when the text does not grow.
            if newest.text != shown or (not is_new and self._reply.chat_id > 0):
                was_shown = await self._show(newest)
            if was_shown:
                shown = newest.text
            else:
                self._grown.set()
            clock = _GROUP_SECONDS if self._reply.chat_id < 0 else _PRIVATE_SECONDS
            await self._wait(clock if was_shown else _AGAIN_SECONDS)

    async def _wait(self, seconds: float) -> bool:
        """Wait, and tell whether the text was finished meanwhile."""
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
        bold = self._reply.prompt if self._reply.mode == "continue" else ""
        return text_pieces(bold, text)[-1]

    async def _show(self, piece: Piece) -> bool:
        if self._reply.chat_id > 0:
            return await self._courier.attempt(
                SendMessageDraft(
                    chat_id=self._reply.chat_id,
                    draft_id=self._reply.id,
                    message_thread_id=self._thread_id,
                    text=piece.text,
                    entities=piece.entities,
                    parse_mode=None,
                    can_stop=True,
                    keep_on_stop=True,
                )
            )
        keyboard = stop_keyboard(self._words, self._reply.id)
        messages = self._store.messages_of_reply(self._reply.id)
        if messages:
            return await self._courier.attempt(
                EditMessageText(
                    chat_id=self._reply.chat_id,
                    message_id=messages[0],
                    text=piece.text,
                    entities=piece.entities,
                    parse_mode=None,
                    link_preview_options=NO_PREVIEW,
                    reply_markup=keyboard,
                )
            )
        await self._begin(piece, keyboard)
        return True

    async def _begin(self, piece: Piece, keyboard: InlineKeyboardMarkup) -> None:
        """The message that edits let grow; the finished text will take its place."""
        with contextlib.suppress(TelegramBadRequest):
            await self._courier.send(
                self._key,
                SendMessage(
                    chat_id=self._reply.chat_id,
                    message_thread_id=self._thread_id,
                    text=piece.text,
                    entities=piece.entities,
                    parse_mode=None,
                    link_preview_options=NO_PREVIEW,
                    reply_parameters=answers_to(self._reply.prompt_message_id),
                    reply_markup=keyboard,
                ),
                self._reply.id,
                0,
            )
