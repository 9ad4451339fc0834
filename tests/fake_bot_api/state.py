"""Chats, messages, updates and what was called; time passes only when somebody acts."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

# https://core.telegram.org/bots/api#getupdates
UPDATE_TYPES = ("message", "edited_message", "callback_query", "my_chat_member")


class ApiError(Exception):
    """An answer `{"ok": false}`."""

    def __init__(self, status: int, description: str, parameters: Json | None = None) -> None:
        super().__init__(description)
        self.status = status
        self.description = description
        self.parameters = parameters


class Bell:
    """Wakes everybody who waits for a condition; nobody polls or sleeps."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Something changed."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait_until(self, condition: Callable[[], bool], timeout_seconds: float) -> bool:
        """Whether `condition` came true in time."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while not condition():
                    await self._event.wait()
        except TimeoutError:
            return condition()
        return True


@dataclass
class Chat:
    """Messages of one chat by id; `reply_to` holds an id, so that a deleted message is gone."""

    id: int
    type: str
    messages: dict[int, Json] = field(default_factory=dict)
    num_messages: int = 0

    def as_json(self) -> Json:
        """The chat as Telegram describes it."""
        name = "first_name" if self.type == "private" else "title"
        return {"id": self.id, "type": self.type, name: f"Chat {self.id}"}

    def add(self, message: Json) -> Json:
        """Number and keep a message."""
        self.num_messages += 1
        message = {
            "message_id": self.num_messages,
            "date": int(time.time()),
            "chat": self.as_json(),
            **message,
        }
        self.messages[self.num_messages] = message
        return message

    def view(self, message: Json) -> Json:
        """The message as Telegram shows it: with the message it replies to, while that exists."""
        shown = {key: value for key, value in message.items() if key != "reply_to"}
        replied = self.messages.get(message.get("reply_to", 0))
        if replied is not None:
            shown["reply_to_message"] = {k: v for k, v in replied.items() if k != "reply_to"}
        return shown


@dataclass
class Fault:
    """The next `times` calls of `method` go wrong."""

    method: str
    kind: str
    times: int
    chat_id: int | None
    status: int
    description: str
    retry_after: int
    after: bool
    """Carry the call out, and lose only its answer."""


class World:
    """Everything that one fake server knows."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.bot: Json = {
            "id": int(token.partition(":")[0]),
            "is_bot": True,
            "first_name": "Bot",
            "username": "fake_bot",
        }
        self.bell = Bell()
        self.chats: dict[int, Chat] = {}
        self.updates: list[Json] = []
        self.num_updates = 0
        self.num_polls = 0
        self.allowed_updates: tuple[str, ...] = UPDATE_TYPES
        self.webhook_url = ""
        self.commands: list[Json] = []
        self.open_queries: dict[str, int] = {}
        """Button presses that wait for their answer: query id -> chat id."""
        self.query_answers: dict[str, Json] = {}
        self.num_queries = 0
        self.requests: list[Json] = []
        self.faults: list[Fault] = []

    def chat(self, chat_id: object) -> Chat:
        """The chat that a bot names; only one that a user opened exists."""
        try:
            return self.chats[int(str(chat_id))]
        except (KeyError, ValueError):
            raise ApiError(400, "Bad Request: chat not found") from None

    def open_chat(self, chat_id: int) -> Chat:
        """The chat that a user writes in; negative ids are groups."""
        kind = "private" if chat_id > 0 else "supergroup"
        return self.chats.setdefault(chat_id, Chat(chat_id, kind))

    def add_update(self, kind: str, content: Json) -> None:
        """Queue an update, unless the last poll did not ask for its kind."""
        if kind in self.allowed_updates:
            self.num_updates += 1
            self.updates.append({"update_id": self.num_updates, kind: content})
        self.bell.ring()

    def take_fault(self, method: str, parameters: Json) -> Fault | None:
        """The fault that strikes this call."""
        for fault in self.faults:
            chats_match = fault.chat_id is None or str(fault.chat_id) == str(
                parameters.get("chat_id")
            )
            if fault.method.lower() == method and chats_match and fault.times > 0:
                fault.times -= 1
                return fault
        return None
