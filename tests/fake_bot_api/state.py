"""Chats, messages, updates and recorded calls; time passes only when somebody acts."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

# https://core.telegram.org/bots/api#getupdates
UPDATE_TYPES = (
    "message",
    "edited_message",
    "callback_query",
    "my_chat_member",
    "stopped_message_generation",
)
# https://core.telegram.org/bots/api#sendmessagedraft
DRAFT_SECONDS = 30.0
# https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this: capacity, per second
PRIVATE_LIMIT = (5.0, 1.0)
GROUP_LIMIT = (20.0, 20 / 60)


class ApiError(Exception):
    """An answer `{"ok": false}`."""

    def __init__(self, status: int, description: str, parameters: Json | None = None) -> None:
        super().__init__(description)
        self.status = status
        self.description = description
        self.parameters = parameters


class Bell:
    """Wakes all who wait for a condition, so that nobody polls or sleeps."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Something changed."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait_until(self, condition: Callable[[], bool], timeout_seconds: float) -> bool:
        """Wait for `condition`; whether it became true in time."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while not condition():
                    await self._event.wait()
        except TimeoutError:
            return condition()
        return True


class Bucket:
    """The rate limit of a chat."""

    def __init__(self, capacity: float, per_second: float) -> None:
        self._capacity = self._tokens = capacity
        self._per_second = per_second
        self._filled_at = time.monotonic()

    def seconds_to_wait(self) -> float:
        """Take a token; else the seconds until there is one."""
        now = time.monotonic()
        gained = (now - self._filled_at) * self._per_second
        self._tokens, self._filled_at = min(self._capacity, self._tokens + gained), now
        if self._tokens < 1:
            return (1 - self._tokens) / self._per_second
        self._tokens -= 1
        return 0.0


@dataclass
class Chat:
    """Messages of one chat by id; `reply_to` holds an id, so that a deleted message is gone."""

    id: int
    type: str
    messages: dict[int, Json] = field(default_factory=dict)
    num_messages: int = 0
    threads: set[int] = field(default_factory=set)
    """Topics with messages."""
    draft: Json | None = None
    """What streams into the chat now; read it with `living_draft`."""
    is_blocked: bool = False
    moved_to: int | None = None
    bucket: Bucket = field(init=False)

    def __post_init__(self) -> None:
        """A chat's limit follows its kind."""
        self.bucket = Bucket(*(PRIVATE_LIMIT if self.type == "private" else GROUP_LIMIT))

    def living_draft(self) -> Json | None:
        """The draft, unless it has vanished by itself."""
        if self.draft is not None and time.monotonic() - self.draft["at"] > DRAFT_SECONDS:
            self.draft = None
        return self.draft

    def as_json(self) -> Json:
        """The chat as Telegram describes it."""
        name = "first_name" if self.type == "private" else "title"
        return {"id": self.id, "type": self.type, name: f"Chat {self.id}"}

    def add(self, message: Json) -> Json:
        """Store a message, with a new id."""
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
    """Lets the next `times` calls of `method` fail."""

    method: str
    kind: str
    times: int
    chat_id: int | None
    status: int
    description: str
    retry_after: int
    seconds: float
    after: bool
    """Carry the call out, and lose only its response."""


class World:
    """The state of one fake server."""

    def __init__(self, token: str, *, with_limits: bool = True) -> None:
        self.token = token
        self.with_limits = with_limits
        self.bot: Json = {
            "id": int(token.partition(":")[0]),
            "is_bot": True,
            "first_name": "Bot",
            "username": "fake_bot",
            "can_read_all_group_messages": False,
        }
        self.bell = Bell()
        self.chats: dict[int, Chat] = {}
        self.updates: list[Json] = []
        self.num_updates = 0
        self.num_polls = 0
        self.allowed_updates: tuple[str, ...] = UPDATE_TYPES
        self.webhook_url = ""
        self.webhook_secret = ""
        self.webhook_failures = 0
        self.commands: dict[str, list[Json]] = {}
        self.descriptions: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        """Scope and language, as JSON -> menu."""
        self.num_limited = 0
        """Number of calls beyond a chat's limit."""
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

    def writable_chat(self, chat_id: object) -> Chat:
        """The chat that a bot writes into now; counts against its limit."""
        chat = self.chat(chat_id)
        if chat.moved_to is not None:
            description = "Bad Request: group chat was upgraded to a supergroup chat"
            raise ApiError(400, description, {"migrate_to_chat_id": chat.moved_to})
        if chat.is_blocked:
            raise ApiError(403, "Forbidden: bot was blocked by the user")
        seconds = chat.bucket.seconds_to_wait() if self.with_limits else 0.0
        if seconds > 0:
            self.num_limited += 1
            retry_after = math.ceil(seconds)
            description = f"Too Many Requests: retry after {retry_after}"
            raise ApiError(429, description, {"retry_after": retry_after})
        return chat

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
        """The fault for this call, if there is one."""
        for fault in self.faults:
            chats_match = fault.chat_id is None or str(fault.chat_id) == str(
                parameters.get("chat_id")
            )
            if fault.method.lower() in ("*", method) and chats_match and fault.times > 0:
                fault.times -= 1
                return fault
        return None
