"""What users ask for: whether they may, and what is recorded for it in the database.

Knows neither aiogram nor the service: a `UserRequest` is all that is left of an update.
"""

import secrets
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from full_stack_transformer.telegram.conversation.answers import Answers
from full_stack_transformer.telegram.conversation.writing import Writer
from full_stack_transformer.telegram.sending.formatting import settings_keyboard
from full_stack_transformer.telegram.state.settings import Settings
from full_stack_transformer.telegram.state.store import Reply, Store
from full_stack_transformer.telegram.texts import LANGUAGES, Words

# A user may have this many texts waiting in a chat besides the one that is being written.
MAX_WAITING = 10
_MAX_RANDOM_SEED = 2**31

# A person types about one message a second.
_FLOOD_BURST = 30.0
_FLOOD_PER_SECOND = 1.0
_MAX_REMEMBERED = 10_000


@dataclass
class UserRequest:
    """Who sent or pressed something, and where."""

    chat_id: int
    thread_id: int
    user_id: int
    language: str
    message_id: int
    """The user's message; for a press the message with the button."""
    text: str
    is_private: bool
    replied_id: int | None
    """The message of the bot that it replies to."""
    file: dict[str, str] | None = None
    """Id and name of a text file."""

    @property
    def words(self) -> Words:
        """The bot's texts in the user's language."""
        return LANGUAGES[self.language]


@dataclass
class Policy:
    """Who may use the bot, and how much."""

    store: Store
    """Holds what admins decided while the bot ran."""
    allowed_ids: frozenset[int] = frozenset()
    """Users and chats; empty for everybody."""
    admin_ids: frozenset[int] = frozenset()
    max_tokens_per_day: int = 0
    """For each user except admins; 0 for no limit."""
    clock: Callable[[], float] = time.monotonic
    _floods: dict[int, tuple[float, float]] = field(default_factory=dict)
    _silent_until: dict[Hashable, float] = field(default_factory=dict)

    def is_admin(self, user_id: int) -> bool:
        """Whether a user is an admin; the anonymous admins of a group, who share its id, are not."""
        return user_id > 0 and user_id in self.admin_ids

    def may_use(self, user_id: int, chat_id: int) -> bool:
        """Whether the bot answers a user in a chat; a decision of an admin overrides the option."""
        if self.is_admin(user_id):
            return True
        guests = self.store.guests()
        if user_id in guests:
            return guests[user_id]
        if chat_id in guests:
            return guests[chat_id]
        return not self.allowed_ids or not self.allowed_ids.isdisjoint((user_id, chat_id))

    def has_tokens(self, user_id: int) -> bool:
        """Whether a user has tokens left today; the last text may exceed the limit."""
        if not self.max_tokens_per_day or self.is_admin(user_id):
            return True
        return self.store.tokens_today(user_id) < self.max_tokens_per_day

    def is_flooding(self, user_id: int) -> bool:
        """Count one action of a user; whether there were too many."""
        now = self.clock()
        tokens, since = self._floods.get(user_id, (_FLOOD_BURST, now))
        tokens = min(_FLOOD_BURST, tokens + (now - since) * _FLOOD_PER_SECOND)
        if len(self._floods) > _MAX_REMEMBERED:
            self._floods.clear()
        self._floods[user_id] = (max(0.0, tokens - 1), now)
        return tokens < 1

    def may_repeat(self, what: Hashable, seconds: float) -> bool:
        """Whether a message may be sent again; true at most once in this number of seconds."""
        now = self.clock()
        if now < self._silent_until.get(what, 0.0):
            return False
        if len(self._silent_until) > _MAX_REMEMBERED:
            self._silent_until = {
                key: until for key, until in self._silent_until.items() if until > now
            }
        self._silent_until[what] = now + seconds
        return True

    def describe(self) -> str:
        """The allowed and denied ids, for admins."""
        guests = self.store.guests()
        allowed = self.allowed_ids | {guest for guest, is_in in guests.items() if is_in}
        denied = [guest for guest, is_in in guests.items() if not is_in]
        text = ", ".join(map(str, sorted(allowed))) if self.allowed_ids else "*"
        return text + "".join(f", −{guest}" for guest in denied)


class Requests:
    """Records what users ask for."""

    def __init__(
        self, store: Store, answers: Answers, writer: Writer, policy: Policy, default: Settings
    ) -> None:
        self._store = store
        self._answers = answers
        self._writer = writer
        self._policy = policy
        self._default = default

    def settings(self, chat_id: int, thread_id: int) -> Settings:
        """The settings of a chat or topic."""
        return self._store.settings(chat_id, thread_id, self._default)

    def converses(self, request: UserRequest) -> bool:
        """Whether the next message is answered, rather than continued."""
        settings = self.settings(request.chat_id, request.thread_id)
        if settings.mode == "auto":
            return self._writer.prefers_chat(settings.model)
        return settings.mode == "chat"

    def refusal(self, request: UserRequest) -> Literal["too_many", "quota"] | None:
        """Why a user gets no text now, as the name of a text; None if nothing speaks against it."""
        if not self._policy.has_tokens(request.user_id):
            return "quota"
        if self._store.num_jobs(request.chat_id) > MAX_WAITING:
            return "too_many"
        return None

    # Texts of the model

    def add_prompt(self, request: UserRequest) -> None:
        """Add a pending text for a prompt; a reply to a text of the bot continues from there."""
        settings = self.settings(request.chat_id, request.thread_id)
        replied = None
        if request.replied_id is not None:
            replied = self._store.reply_of_message(request.chat_id, request.replied_id)
        mode: Literal["continue", "chat"] = "chat" if self.converses(request) else "continue"
        prompt, parent = request.text, replied
        if mode == "continue" and replied is not None and replied.texts:
            prompt = _joined(replied, request.text)
        if mode == "chat" and replied is None:
            parent = self._store.newest_reply(request.chat_id, request.thread_id, mode="chat")
        self._add_reply(
            Reply(
                id=0,
                chat_id=request.chat_id,
                thread_id=request.thread_id,
                user_id=request.user_id,
                language=request.language,
                mode=mode,
                prompt=prompt,
                prompt_message_id=request.message_id,
                settings=settings,
                seed=_new_seed(settings),
                file=request.file,
                parent_id=None if parent is None else parent.id,
            )
        )

    def add_repeat(self, request: UserRequest, reply: Reply) -> None:
        """Add another sample of the same prompt."""
        again = self._like(request, reply)
        if (
            again.settings.seed is not None
        ):  # another sample, but the same each time this is repeated
            again.seed = reply.seed + max(1, len(reply.texts))
        self._add_reply(again)

    def add_continuation(self, request: UserRequest, reply: Reply) -> None:
        """Add the text that follows a reply."""
        following = self._like(request, reply)
        following.parent_id = reply.id
        following.prompt_message_id = request.message_id
        is_chat = reply.mode == "chat"
        following.prompt = request.words.continue_prompt if is_chat else _joined(reply, "")
        self._add_reply(following)

    def _like(self, request: UserRequest, reply: Reply) -> Reply:
        """A pending reply with the prompt of another one, and the settings of now."""
        settings = self.settings(reply.chat_id, reply.thread_id)
        return replace(
            reply,
            id=0,
            user_id=request.user_id,
            language=request.language,
            settings=settings,
            seed=_new_seed(settings),
            texts=[],
            requests=[],
            shown=0,
            finish="",
            model="",
            checkpoint={},
        )

    def _add_reply(self, reply: Reply) -> None:
        num_ahead = self._store.num_unwritten(reply.chat_id) + self._answers.num_ahead
        self._store.add_reply(reply)
        job_id = self._store.add_job(reply.chat_id, "answers", "answer", reply_id=reply.id)
        if num_ahead:
            text = LANGUAGES[reply.language].queued.format(position=num_ahead + 1)
            self._answers.add_notice(job_id, reply, text)

    # The bot's own messages

    def say(self, request: UserRequest, text: str, **content: Any) -> None:
        """Add a message with a text of the bot."""
        content |= {"text": text, "reply_to": request.message_id, "thread_id": request.thread_id}
        self._store.add_job(request.chat_id, "words", "say", content)

    def show_settings(self, request: UserRequest) -> None:
        """Add a message with the settings and their buttons."""
        settings = self.settings(request.chat_id, request.thread_id)
        models = self._writer.known_models
        keyboard = settings_keyboard(request.words, request.user_id, settings, models)
        title = request.words.settings_title(request.thread_id)
        self.say(request, title, keyboard=keyboard.model_dump(exclude_none=True))

    # Deleting and moving

    def forget(self, request: UserRequest) -> None:
        """Delete everything of a private chat, or a user's texts in a group."""
        chat_id, user_id = request.chat_id, request.user_id
        if request.is_private:
            self.forget_chat(chat_id)
        else:
            for reply in self._store.pending_replies(chat_id, user_id):
                self._answers.cancel(reply.id)
            self._store.forget_user_in_chat(chat_id, user_id)
        self._store.saw_message(chat_id, request.message_id)
        content = {"text": request.words.forgotten, "thread_id": request.thread_id}
        self._store.add_job(chat_id, "words", "say", content)

    def forget_chat(self, chat_id: int) -> None:
        """Delete everything of a chat."""
        self._answers.cancel_chat(chat_id)
        self._store.forget_chat(chat_id)

    def move_chat(self, old_id: int, new_id: int) -> None:
        """Move everything to the new id of a group; a text that is being written there begins again."""
        self._answers.cancel_chat(old_id)
        self._store.move_chat(old_id, new_id)


def _new_seed(settings: Settings) -> int:
    """The fixed seed of the settings, or a random one."""
    return secrets.randbelow(_MAX_RANDOM_SEED) if settings.seed is None else settings.seed


def _joined(reply: Reply, text: str) -> str:
    """A text of the bot followed by a user's text, with a space between them if there is none."""
    before = reply.prompt + reply.text if reply.mode == "continue" else reply.text
    needs_space = before and text and not before[-1].isspace() and text[0].isalnum()
    return f"{before} {text}" if needs_space else before + text
