"""A finished reply as the messages of its chat: sent, edited when another variant is shown, deleted.

Knows how a reply is shown; not when.
"""

import logging

from aiogram.exceptions import TelegramAPIError, TelegramBadRequest
from aiogram.methods import DeleteMessage, EditMessageText, SendMessage
from aiogram.types import InlineKeyboardMarkup

from full_stack_transformer.telegram.sending.buttons import reply_keyboard
from full_stack_transformer.telegram.sending.delivery import Courier, MessageGoneError
from full_stack_transformer.telegram.sending.replies import (
    NO_PREVIEW,
    Piece,
    answers_to,
    reply_pieces,
)
from full_stack_transformer.telegram.state.records import Reply
from full_stack_transformer.telegram.state.store import Store
from full_stack_transformer.telegram.texts import LANGUAGES

logger = logging.getLogger(__name__)


class Display:
    """Shows replies."""

    def __init__(self, store: Store, courier: Courier) -> None:
        self._store = store
        self._courier = courier

    async def show(self, reply: Reply, key: str) -> None:
        """Make the messages of a finished reply show its text: edit, send, delete what is too much."""
        words = LANGUAGES[reply.language]
        pieces = reply_pieces(reply)
        messages = self._store.messages_of_reply(reply.id)
        is_text = reply.finish not in ("refused", "failed")
        for position, piece in enumerate(pieces):
            is_last = position == len(pieces) - 1
            keyboard = (
                reply_keyboard(words, reply.id, reply.shown, len(reply.texts))
                if is_last and is_text
                else None
            )
            if position < len(messages):
                try:
                    await self._edit(reply.chat_id, messages[position], piece, keyboard)
                    continue
                except MessageGoneError:  # deleted by a person
                    self._store.forget_message(reply.chat_id, messages[position])
                    self._store.withdraw_send(reply.chat_id, f"{key}:{position}")
            await self._send(reply, f"{key}:{position}", position, piece, keyboard)
        for message_id in messages[len(pieces) :]:
            await self.delete(reply.chat_id, message_id)

    async def _edit(
        self, chat_id: int, message_id: int, piece: Piece, keyboard: InlineKeyboardMarkup | None
    ) -> None:
        await self._courier.call(
            EditMessageText(
                chat_id=chat_id,
                message_id=message_id,
                text=piece.text,
                entities=piece.entities,
                parse_mode=None,
                link_preview_options=NO_PREVIEW,
                reply_markup=keyboard,
            )
        )

    async def _send(
        self,
        reply: Reply,
        key: str,
        position: int,
        piece: Piece,
        keyboard: InlineKeyboardMarkup | None,
    ) -> None:
        method = SendMessage(
            chat_id=reply.chat_id,
            message_thread_id=reply.thread_id or None,
            text=piece.text,
            entities=piece.entities,
            parse_mode=None,
            link_preview_options=NO_PREVIEW,
            reply_parameters=answers_to(reply.prompt_message_id),
            reply_markup=keyboard,
        )
        try:
            await self._courier.send(key, method, reply.id, position)
        except TelegramBadRequest as error:
            if "thread not found" not in error.message:
                raise
            # The topic was deleted; the text is owed all the same.
            await self._courier.send(
                key, method.model_copy(update={"message_thread_id": None}), reply.id, position
            )

    async def delete(self, chat_id: int, message_id: int) -> None:
        """Delete a message of the bot; one that cannot be deleted stays."""
        try:
            await self._courier.call(DeleteMessage(chat_id=chat_id, message_id=message_id))
        except (TelegramAPIError, MessageGoneError):
            logger.debug("a message of chat %d could not be deleted", chat_id)
        self._store.forget_message(chat_id, message_id)
