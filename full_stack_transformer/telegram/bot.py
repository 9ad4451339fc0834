"""What the bot answers to what: commands, texts, the Repeat button, everything else.

Handlers only line up answers, so that polling never waits for a model. Knows nothing of tokens,
processes and signals.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from aiogram import Bot, F, Router
from aiogram.exceptions import TelegramAPIError
from aiogram.filters import Command
from aiogram.methods import AnswerCallbackQuery, TelegramMethod
from aiogram.types import CallbackQuery, ErrorEvent, Message

from full_stack_transformer.errors import ServiceError, ServiceRefusedError
from full_stack_transformer.serving.client import ServiceClient
from full_stack_transformer.serving.schemas import GeneratedTextsRequest
from full_stack_transformer.telegram import texts
from full_stack_transformer.telegram.chats import Answer, Chats, without_content
from full_stack_transformer.telegram.delivery import deliver, typing
from full_stack_transformer.telegram.replies import Place, RepeatButton, continuation, sentence

logger = logging.getLogger(__name__)

# Below what a service admits by default (16 at once, 64 waiting): a rush of chats waits here,
# where nobody is turned away, and leaves room for the service's other clients.
_MAX_CONCURRENT_GENERATIONS = 32
# A person types about one message per second; who is this far ahead of the bot is flooding.
_MAX_WAITING_ANSWERS = 50


class ContinuationBot:
    """Continues people's texts with a service; `router` holds its handlers."""

    def __init__(
        self, bot: Bot, service: ServiceClient, settings: GeneratedTextsRequest, chats: Chats
    ) -> None:
        self._bot = bot
        self._service = service
        self._settings = settings
        self._chats = chats
        self._generations = asyncio.Semaphore(_MAX_CONCURRENT_GENERATIONS)

    def router(self) -> Router:
        """Handlers in the order in which they are asked; the last ones take what is left."""
        router = Router()
        router.message.register(self._on_command, Command("start", "help"))
        router.message.register(self._on_text, F.text)
        # In a group photos and notices ("NAME joined") are none of the bot's business.
        router.message.register(self._on_anything_else, F.chat.type == "private")
        router.callback_query.register(self._on_repeat, RepeatButton.filter())
        router.callback_query.register(self._on_unknown_button)
        router.error.register(_on_error)
        return router

    async def _on_command(self, message: Message) -> None:
        self._say(_place(message, message.message_id), texts.WELCOME)

    async def _on_text(self, message: Message) -> None:
        self._continue(_place(message, message.message_id), message.text or "")

    async def _on_anything_else(self, message: Message) -> None:
        self._say(_place(message, message.message_id), texts.NOT_A_TEXT)

    async def _on_repeat(self, query: CallbackQuery) -> None:
        # An InaccessibleMessage is older than 48 hours, or deleted.
        pressed = query.message if isinstance(query.message, Message) else None
        prompt = pressed.reply_to_message if pressed else None
        if pressed is None or prompt is None or not prompt.text:
            self._answer_button(query, texts.PROMPT_GONE)
        else:
            self._answer_button(query, None)
            self._continue(_place(pressed, prompt.message_id), prompt.text)

    async def _on_unknown_button(self, query: CallbackQuery) -> None:
        self._answer_button(query, texts.OUTDATED_BUTTON)

    def _answer_button(self, query: CallbackQuery, alert: str | None) -> None:
        """End the button's progress circle; aside, because Telegram waits a few seconds only."""
        method = AnswerCallbackQuery(
            callback_query_id=query.id, text=alert, show_alert=alert is not None
        )
        chat_id = query.message.chat.id if query.message else query.from_user.id
        self._chats.submit_aside(chat_id, lambda: self._send(chat_id, [method]))

    def _say(self, place: Place, words: str) -> None:
        self._line_up(place, lambda: self._send(place.chat_id, [sentence(place, words)]))

    def _continue(self, place: Place, prompt: str) -> None:
        self._line_up(place, lambda: self._answer(place, prompt))

    def _line_up(self, place: Place, answer: Answer) -> None:
        num_waiting = self._chats.num_waiting(place.chat_id)
        if num_waiting == _MAX_WAITING_ANSWERS:  # said once, in its turn
            too_many = [sentence(place, texts.TOO_MANY)]
            self._chats.submit(place.chat_id, lambda: self._send(place.chat_id, too_many))
        elif num_waiting < _MAX_WAITING_ANSWERS:
            self._chats.submit(place.chat_id, answer)
        else:
            logger.warning("left a message of chat %d unanswered, too many wait", place.chat_id)

    async def _answer(self, place: Place, prompt: str) -> None:
        """Generate a continuation of `prompt` and send it, or a sentence that says why there is none."""
        started = time.monotonic()
        try:
            async with typing(self._bot, place.chat_id, place.thread_id):
                continued = await self._generate(prompt)
        except ServiceError as error:
            # Without what follows a colon: the service's own words, which may quote the prompt.
            reason = str(error).partition(": ")[0]
            logger.warning("no continuation for chat %d: %s", place.chat_id, reason)
            refused = isinstance(error, ServiceRefusedError)
            words = texts.REFUSED if refused else texts.SERVICE_AWAY
            await self._send(place.chat_id, [sentence(place, words)])
        except Exception:
            await self._send(place.chat_id, [sentence(place, texts.FAILED)])
            raise
        else:
            messages = continuation(place, prompt, continued)
            if await self._send(place.chat_id, messages):
                logger.info(
                    "continued %d characters in chat %d with %d characters, %d messages, in %.1f s",
                    len(prompt),
                    place.chat_id,
                    len(continued),
                    len(messages),
                    time.monotonic() - started,
                )

    async def _generate(self, prompt: str) -> str:
        request = self._settings.model_copy(update={"seed_text": prompt})
        async with self._generations:
            (continued,) = await self._service.generate_texts(request)
        return continued

    async def _send(self, chat_id: int, methods: Sequence[TelegramMethod[Any]]) -> bool:
        """Whether Telegram took all of them; the first refusal ends it."""
        for method in methods:
            try:
                await deliver(self._bot, method)
            except TelegramAPIError as error:  # blocked, chat deleted, query too old
                name, reason = type(method).__name__, type(error).__name__
                logger.warning("%s in chat %d given up: %s", name, chat_id, reason)
                return False
        return True


def _place(message: Message, prompt_id: int) -> Place:
    thread_id = message.message_thread_id if message.is_topic_message else None
    return Place(message.chat.id, thread_id, prompt_id)


async def _on_error(event: ErrorEvent) -> bool:
    """Take the place of aiogram's own log line, which quotes the error's message."""
    logger.error("update %d failed: %s", event.update.update_id, without_content(event.exception))
    return True
