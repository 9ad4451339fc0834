"""Updates in, jobs out: what the bot owes for what people did, recorded before Telegram is told.

    raw updates ──one transaction──> who and where ──> command · prompt · press · stop ──> jobs

Handlers are plain functions on the database; nothing is sent from here but, after the commit, what
nobody would miss: the answers that end a button's progress circle.
"""

import logging
import re
import sqlite3
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiogram.methods import AnswerCallbackQuery
from aiogram.types import CallbackQuery, Chat, InaccessibleMessage, Message, Update, User
from pydantic import ValidationError

from full_stack_transformer.telegram.conversation.lanes import Chats, Running
from full_stack_transformer.telegram.monitoring import Metrics
from full_stack_transformer.telegram.state.policy import Policy
from full_stack_transformer.telegram.state.store import Store
from full_stack_transformer.telegram.texts import LANGUAGES, language_of
from full_stack_transformer.telegram.updates.asks import Ask, Asks
from full_stack_transformer.telegram.updates.presses import Presses

logger = logging.getLogger(__name__)

# What is asked of Telegram; edited messages and posts of channels are none of the bot's business.
ALLOWED_UPDATES = ("message", "callback_query", "my_chat_member", "stopped_message_generation")

_COMMAND = re.compile(r"/([A-Za-z0-9_]{1,32})(?:@([A-Za-z0-9_]{1,64}))?(?:\s+(.*))?", re.DOTALL)
_CHAT_TYPES = ("private", "group", "supergroup")
# A group's admin who writes anonymously. https://core.telegram.org/bots/api#message, field `from`
_GROUP_ANONYMOUS_BOT = 1087968824
# Telegram's numbers have at most 52 significant bits; SQLite's 63.
_MAX_ID = 2**53
_SECONDS_BETWEEN_COMPLAINTS = 10.0


@dataclass
class Effects:
    """What follows a commit."""

    answers: list[AnswerCallbackQuery] = field(default_factory=list)
    stopped: list[Running] = field(default_factory=list)


class Intake:
    """Takes updates, each once."""

    def __init__(
        self,
        store: Store,
        chats: Chats,
        policy: Policy,
        metrics: Metrics,
        asks: Asks,
        me: User,
    ) -> None:
        self._store = store
        self._chats = chats
        self._policy = policy
        self._metrics = metrics
        self._asks = asks
        self._presses = Presses(store, chats, policy, asks)
        self._me = me

    def take(self, raw_updates: list[Any]) -> Effects:
        """Record updates and what is owed for them; after this they may be confirmed.

        Raises:
            sqlite3.Error: the database cannot be written, such as on a full disk; nothing is recorded.
        """
        effects = Effects()
        with self._store.transaction():
            for raw in raw_updates:
                self._metrics.updates.labels(self._take_one(raw, effects)).inc()
        self._store.erase()
        for running in effects.stopped:
            running.stop()
        self._chats.wake()
        return effects

    def _take_one(self, raw: Any, effects: Effects) -> str:
        update_id = raw.get("update_id") if isinstance(raw, dict) else None
        if type(update_id) is not int or abs(update_id) >= _MAX_ID:
            return "malformed"
        if not self._store.take_update(update_id):
            return "repeated"
        try:
            update = Update.model_validate(raw)
        except (ValidationError, RecursionError):
            logger.warning("update %d is malformed", update_id)
            return "malformed"
        try:
            with self._store.transaction():
                return "handled" if self._handle(update, effects) else "ignored"
        except sqlite3.OperationalError:
            raise
        except Exception as error:  # one strange update must not stop the others
            # Type and place only: the message may quote what a user wrote.
            frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
            logger.error("update %d failed: %s\n%s", update_id, type(error).__name__, frames)
            self._metrics.failures.inc()
            return "failed"

    def _handle(self, update: Update, effects: Effects) -> bool:
        if update.message is not None:
            return self._on_message(update.message, effects)
        if update.callback_query is not None:
            return self._on_press(update.callback_query, effects)
        if stopped := update.stopped_message_generation:
            reply = self._store.reply(stopped.draft_id) if _is_sane(stopped.draft_id) else None
            if reply is None or reply.chat_id != stopped.chat.id:
                return False
            self._asks.stop(reply, effects.stopped)
            return True
        if member := update.my_chat_member:
            is_out = member.new_chat_member.status in ("kicked", "left")
            if is_out and _is_sane(member.chat.id):
                logger.info("chat %d shut the bot out; its data are deleted", member.chat.id)
                self._asks.forget_chat(member.chat.id, effects.stopped)
            return is_out
        return False

    def _on_message(self, message: Message, effects: Effects) -> bool:
        chat = message.chat
        thread_id, replied = message.message_thread_id, message.reply_to_message
        if chat.type not in _CHAT_TYPES or not _is_sane(chat.id, message.message_id):
            return False
        if not _is_sane(thread_id or 1, 1 if replied is None else replied.message_id):
            return False
        if message.migrate_to_chat_id is not None and _is_sane(message.migrate_to_chat_id):
            self._asks.move_chat(chat.id, message.migrate_to_chat_id, effects.stopped)
            return True
        self._store.saw_message(chat.id, message.message_id)
        user = message.from_user
        if user is None or not _is_sane(user.id):
            return False
        if user.is_bot and user.id != _GROUP_ANONYMOUS_BOT:
            return False
        ask = self._ask_of(message, user)
        if self._policy.is_flooding(user.id):
            return self._complain(ask, "too_many")
        command = _COMMAND.fullmatch(ask.text)
        if command is not None:
            return self._on_command(ask, command, effects)
        if not self._is_meant_for_me(message):
            return False
        if not self._policy.may_use(user.id, chat.id):
            return self._complain(ask, "not_allowed")
        if not ask.text.strip():
            # In a group photos and notices ("NAME joined") are none of the bot's business.
            return ask.is_private and self._complain(ask, "not_a_text")
        return self._on_prompt(ask)

    def _ask_of(self, message: Message, user: User) -> Ask:
        replied = message.reply_to_message
        from_me = replied is not None and replied.from_user is not None
        return Ask(
            chat_id=message.chat.id,
            thread_id=(message.message_thread_id or 0) if message.is_topic_message else 0,
            user_id=user.id,
            language=language_of(user.language_code),
            message_id=message.message_id,
            text=_without_surrogates(message.text or ""),
            is_private=message.chat.type == "private",
            replied_id=replied.message_id
            if replied is not None and from_me and replied.from_user.id == self._me.id  # type: ignore[union-attr]
            else None,
        )

    def _on_command(self, ask: Ask, command: re.Match[str], effects: Effects) -> bool:
        name, addressee, argument = command.groups()
        if addressee is not None and addressee.lower() != (self._me.username or "").lower():
            return False
        if not self._policy.may_use(ask.user_id, ask.chat_id):
            return self._complain(ask, "not_allowed")
        handler = self._asks.command(name.lower(), ask.user_id)
        if handler is None:
            return ask.is_private and self._complain(ask, "unknown_command")
        handler(ask, (argument or "").strip(), effects.stopped)
        return True

    def _is_meant_for_me(self, message: Message) -> bool:
        """In groups: a reply to the bot or its name, unless Telegram filters for us (privacy mode)."""
        if message.chat.type == "private" or not self._me.can_read_all_group_messages:
            return True
        replied = message.reply_to_message
        if replied is not None and replied.from_user is not None:
            return replied.from_user.id == self._me.id
        return f"@{self._me.username}".lower() in (message.text or "").lower()

    def _on_prompt(self, ask: Ask) -> bool:
        mention = f"@{self._me.username}"
        if not ask.is_private and mention.lower() in ask.text.lower():
            words = re.sub(re.escape(mention) + r"\s?", "", ask.text, flags=re.IGNORECASE)
            if words.strip():
                ask.text = words
        reason = self._asks.reason_against(ask.chat_id, ask.user_id)
        if reason is not None:
            return self._complain(ask, reason)
        self._asks.continue_or_answer(ask)
        return True

    def _complain(self, ask: Ask, reason: str) -> bool:
        """Say why there is no text; the same person hears the same only once in a while."""
        what = (ask.chat_id, ask.user_id, reason)
        if self._policy.may_say_again(what, _SECONDS_BETWEEN_COMPLAINTS):
            words = getattr(LANGUAGES[ask.language], reason)
            quota = self._policy.max_tokens_per_day
            self._asks.say(ask, words.format(user_id=ask.user_id, quota=quota))
        else:
            logger.info("left a message of chat %d unanswered: %s", ask.chat_id, reason)
        return True

    def _on_press(self, query: CallbackQuery, effects: Effects) -> bool:
        chat: Chat | None = query.message.chat if query.message else None
        alert: str | None = None
        words = LANGUAGES[language_of(query.from_user.language_code)]
        if (
            chat is None
            or query.message is None
            or not _is_sane(*_numbers_of(query, query.message))
        ):
            alert = words.alert_outdated
        elif self._policy.is_flooding(query.from_user.id):
            alert = words.too_many
        elif not self._policy.may_use(query.from_user.id, chat.id):
            alert = words.alert_foreign
        else:
            alert = self._presses.press(query, chat, query.message.message_id, effects.stopped)
        effects.answers.append(
            AnswerCallbackQuery(
                callback_query_id=query.id, text=alert or None, show_alert=bool(alert) or None
            )
        )
        return True


def _is_sane(*numbers: int) -> bool:
    return all(0 < abs(number) < _MAX_ID for number in numbers)


def _numbers_of(query: CallbackQuery, message: Message | InaccessibleMessage) -> Iterator[int]:
    """What of a press goes into the database."""
    yield from (message.chat.id, message.message_id, query.from_user.id)
    if isinstance(message, Message) and message.message_thread_id is not None:
        yield message.message_thread_id


def _without_surrogates(text: str) -> str:
    """Halves of UTF-16 pairs joined where they belong together, replaced where they are alone."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
