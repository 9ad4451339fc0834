"""What the database holds of a reply and of a job. Knows neither SQL nor Telegram."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from full_stack_transformer.telegram.state.settings import Settings

Lane = Literal["answers", "words"]


@dataclass
class Reply:
    """One text of the bot, from the moment it is owed; `content` in the database."""

    id: int
    chat_id: int
    thread_id: int
    """0 outside of forums."""
    user_id: int
    language: str
    mode: Literal["continue", "chat"]
    prompt: str
    """What the user wrote, or the text that is continued."""
    prompt_message_id: int
    settings: Settings
    seed: int
    parent_id: int | None = None
    """The reply before this one in its conversation."""
    texts: list[str] = field(default_factory=list)
    """One for each variant; empty while the reply is owed."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """The body that gave each text, as the service took it."""
    shown: int = 0
    finish: str = ""
    """stop, length, stopped (by the user), refused."""
    model: str = ""
    checkpoint: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The variant that is shown."""
        return self.texts[self.shown] if self.texts else ""


@dataclass
class Job:
    """Something that is owed to a chat."""

    id: int
    chat_id: int
    kind: str
    reply_id: int | None
    content: dict[str, Any]
    created: float


def pack_reply(reply: Reply) -> str:
    """The columns' rest, as JSON."""
    content = asdict(reply)
    for name in ("id", "chat_id", "thread_id", "user_id"):
        del content[name]
    return json.dumps(content)


def unpack_reply(row: Sequence[Any]) -> Reply:
    """From id, chat_id, thread_id, user_id, content."""
    reply_id, chat_id, thread_id, user_id, packed = row
    content = json.loads(packed)
    content["settings"] = Settings(**content["settings"])
    return Reply(id=reply_id, chat_id=chat_id, thread_id=thread_id, user_id=user_id, **content)
