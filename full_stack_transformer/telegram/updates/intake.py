"""From raw updates to recorded jobs: is an update meant for the bot, and may its user use it?

    raw updates ──one transaction──> who and where ──> prompt · command · press · stop ──> jobs

Everything is recorded before Telegram is told that the updates were received. Nothing is sent from here,
except the answers that end a button's progress circle, which are tried once.
"""

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from aiogram.methods import AnswerCallbackQuery
from aiogram.types import CallbackQuery, InaccessibleMessage, Message, Update, User
from pydantic import ValidationError

from full_stack_transformer.telegram.conversation.answers import Answers
from full_stack_transformer.telegram.conversation.commands import Commands
from full_stack_transformer.telegram.conversation.requests import Policy, Requests, UserRequest
from full_stack_transformer.telegram.conversation.writing import Writer
from full_stack_transformer.telegram.monitoring import Metrics
from full_stack_transformer.telegram.sending.formatting import (
    ForgetButton,
    ReplyButton,
    SettingButton,
    VariantButton,
    key_of_model,
    parse_button,
)
from full_stack_transformer.telegram.state.database import is_fault
from full_stack_transformer.telegram.state.settings import (
    MODES,
    NUMERIC_FIELDS,
    PRESETS,
    Settings,
    stepped,
)
from full_stack_transformer.telegram.state.store import Reply, Store
from full_stack_transformer.telegram.texts import LANGUAGES, language_of
from full_stack_transformer.telegram.updates.addressing import (
    Address,
    address_of,
    sender_id,
    text_file_of,
)

logger = logging.getLogger(__name__)

_CHAT_TYPES = ("private", "group", "supergroup")
# Telegram's ids have at most 52 significant bits; SQLite's integers 63.
_MAX_ID = 2**53
_SECONDS_BETWEEN_COMPLAINTS = 10.0
# The messages of an album arrive together.
_SECONDS_OF_AN_ALBUM = 60.0
_MAX_QUERY_ID_CHARACTERS = 64


class Intake:
    """Takes updates, each once."""

    def __init__(
        self,
        store: Store,
        answers: Answers,
        policy: Policy,
        requests: Requests,
        commands: Commands,
        writer: Writer,
        metrics: Metrics,
        me: User,
        answer_press: Callable[[AnswerCallbackQuery], None],
    ) -> None:
        self._store = store
        self._answers = answers
        self._policy = policy
        self._requests = requests
        self._commands = commands
        self._metrics = metrics
        self._presses = Presses(store, answers, policy, requests, writer)
        self._me = me
        self._answer_press = answer_press

    def take(self, raw_updates: list[Any]) -> None:
        """Record updates and the jobs for them; after this they may be confirmed.

        Raises:
            sqlite3.Error: the database cannot be written, such as on a full disk; nothing is recorded.
            DatabaseLostError: they are recorded in a file that is not at its path any more.
        """
        with self._store.transaction():
            for raw in raw_updates:
                self._metrics.updates.labels(self._take_one(raw)).inc()
        self._store.erase()
        self._store.check()

    def _take_one(self, raw: Any) -> str:
        update_id = raw.get("update_id") if isinstance(raw, dict) else None
        if type(update_id) is not int or abs(update_id) >= _MAX_ID:
            return "malformed"
        if not self._store.record_update(update_id):
            return "repeated"
        try:
            update = Update.model_validate(raw)
        except (ValidationError, RecursionError):
            logger.warning("update %d is malformed", update_id)
            return "malformed"
        try:
            with self._store.transaction():
                return "handled" if self._handle(update) else "ignored"
        except Exception as error:  # one strange update must not stop the others
            if is_fault(error):
                raise
            # Without the message, which may quote a user's text.
            frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
            logger.error("update %d failed: %s\n%s", update_id, type(error).__name__, frames)
            self._metrics.failures.inc()
            return "failed"

    def _handle(self, update: Update) -> bool:
        if update.message is not None:
            return self._on_message(update.message)
        if update.callback_query is not None:
            return self._on_press(update.callback_query)
        if stopped := update.stopped_message_generation:
            reply = self._store.reply(stopped.draft_id) if _is_valid(stopped.draft_id) else None
            if reply is None or reply.chat_id != stopped.chat.id:
                return False
            self._answers.stop(reply)
            return True
        if member := update.my_chat_member:
            is_out = member.new_chat_member.status in ("kicked", "left")
            if is_out and _is_valid(member.chat.id):
                logger.info(
                    "chat %d blocked or removed the bot; its data is deleted", member.chat.id
                )
                self._requests.forget_chat(member.chat.id)
            return is_out
        return False

    def _on_message(self, message: Message) -> bool:
        chat, thread_id = message.chat, message.message_thread_id
        replied = message.reply_to_message
        if chat.type not in _CHAT_TYPES or not _is_valid(chat.id, message.message_id):
            return False
        if not _is_valid(thread_id or 1, 1 if replied is None else replied.message_id):
            return False
        if message.migrate_to_chat_id or message.migrate_from_chat_id:
            return self._on_migration(message)
        self._store.saw_message(chat.id, message.message_id)
        user_id, address = sender_id(message), address_of(message, self._me)
        if user_id is None or address is None or not _is_valid(user_id):
            return False
        request = _request_of(message, user_id, address)
        command = address.command
        if command and not (address.is_certain or self._commands.has(command.name, request)):
            return False  # in a group, where other bots may know it
        # Telegram may send a message again with another update id.
        if not self._store.take_once(chat.id, f"message {message.message_id}"):
            return False
        if self._policy.is_flooding(user_id):
            return self._complain(request, "too_many")
        if not self._policy.may_use(user_id, chat.id):
            return self._complain(request, "not_allowed")
        if command is None:
            return self._on_prompt(request, message.media_group_id)
        if self._commands.run(command.name, command.argument, request):
            return True
        return self._complain(request, "unknown_command")

    def _on_migration(self, message: Message) -> bool:
        """Both the old and the new group say so; the second one changes nothing."""
        old_id = message.migrate_from_chat_id or message.chat.id
        new_id = message.migrate_to_chat_id or message.chat.id
        if old_id == new_id or not _is_valid(old_id, new_id):
            return False
        self._requests.move_chat(old_id, new_id)
        return True

    def _on_prompt(self, request: UserRequest, album_id: str | None) -> bool:
        is_first = album_id is None or self._policy.may_repeat(
            (request.chat_id, album_id), _SECONDS_OF_AN_ALBUM
        )
        if not request.text.strip() and request.file is None:
            # The pictures of an album are messages of their own, and one of them has the caption.
            return is_first and self._complain(request, "not_a_text")
        refusal = self._requests.refusal(request)
        if refusal is not None:
            return self._complain(request, refusal)
        self._requests.add_prompt(request)
        return True

    def _complain(self, request: UserRequest, reason: str) -> bool:
        """Say why there is no text; whoever floods or is not allowed is told only once in a while."""
        what = (request.chat_id, request.user_id, reason)
        is_limited = reason in ("too_many", "not_allowed")
        if not is_limited or self._policy.may_repeat(what, _SECONDS_BETWEEN_COMPLAINTS):
            text: str = getattr(request.words, reason)
            quota = self._policy.max_tokens_per_day
            self._requests.say(request, text.format(user_id=request.user_id, quota=quota))
        else:
            logger.info("a message of chat %d is not answered: %s", request.chat_id, reason)
        return True

    def _on_press(self, query: CallbackQuery) -> bool:
        request = _request_of_press(query)
        alert = None
        press_id = f"press {query.id[:_MAX_QUERY_ID_CHARACTERS]!a}"
        if request is not None and not self._store.take_once(request.chat_id, press_id):
            return False
        if request is None:
            words = LANGUAGES[language_of(query.from_user.language_code)]
            alert = words.alert_outdated
        elif self._policy.is_flooding(request.user_id):
            alert = request.words.too_many
        elif not self._policy.may_use(request.user_id, request.chat_id):
            alert = request.words.alert_foreign
        else:
            alert = self._presses.press(query.data, request)
        self._answer_press(
            AnswerCallbackQuery(
                callback_query_id=query.id, text=alert or None, show_alert=bool(alert) or None
            )
        )
        return True


class Presses:
    """Carries out presses of buttons; whose a button is and what it belongs to is always looked up."""

    def __init__(
        self, store: Store, answers: Answers, policy: Policy, requests: Requests, writer: Writer
    ) -> None:
        self._store = store
        self._answers = answers
        self._writer = writer
        self._policy = policy
        self._requests = requests

    def press(self, data: str | None, request: UserRequest) -> str | None:
        """Do what a button says; the text of an alert if that is impossible."""
        button = parse_button(data)
        if button is None:
            return request.words.alert_outdated
        if isinstance(button, ForgetButton | SettingButton):
            if button.user_id != request.user_id:
                return request.words.alert_foreign
            if isinstance(button, SettingButton):
                return self._set(request, button)
            self._requests.forget(request)
            return None
        reply = self._store.reply(button.reply_id)
        if reply is None or reply.chat_id != request.chat_id:
            return request.words.alert_gone
        if reply.user_id != request.user_id and not self._policy.is_admin(request.user_id):
            return request.words.alert_foreign
        request.thread_id = reply.thread_id
        if isinstance(button, VariantButton):
            return self._show(request, button.variant, reply)
        return self._on_reply(request, button, reply)

    def _on_reply(self, request: UserRequest, button: ReplyButton, reply: Reply) -> str | None:
        if button.action == "stop":
            return None if self._answers.stop(reply) else request.words.nothing_to_stop
        if button.action == "panel":
            self._requests.show_settings(request)
            return None
        if not reply.texts:
            return request.words.alert_not_ready
        refusal = self._requests.refusal(request)
        if refusal is not None:
            text: str = getattr(request.words, refusal)
            return text.format(quota=self._policy.max_tokens_per_day)[:200]
        if button.action == "repeat":
            self._requests.add_repeat(request, reply)
        else:
            self._requests.add_continuation(request, reply)
        return None

    def _show(self, request: UserRequest, variant: int, reply: Reply) -> str | None:
        if not reply.texts:
            return request.words.alert_not_ready
        if variant >= len(reply.texts):
            return request.words.alert_outdated
        if variant != reply.shown:
            reply.shown = variant
            self._store.save_reply(reply)
            self._store.add_job(reply.chat_id, "words", "render", reply_id=reply.id)
        return None

    def _set(self, request: UserRequest, button: SettingButton) -> str | None:
        chat_id, thread_id = request.chat_id, request.thread_id
        settings = self._requests.settings(chat_id, thread_id)
        newest = self._store.newest_reply(chat_id, thread_id, user_id=request.user_id)
        newest_seed = 0 if newest is None else newest.seed
        models = self._writer.known_models
        changed = _changed(settings, button, newest_seed=newest_seed, models=models)
        if changed is None:
            return request.words.alert_outdated
        if changed != settings:
            self._store.save_settings(chat_id, thread_id, changed)
            content = {
                "message_id": request.message_id,
                "user_id": request.user_id,
                "thread_id": thread_id,
                "language": request.language,
            }
            self._store.add_job(chat_id, "words", "panel", content)
        return None


def _request_of(message: Message, user_id: int, address: Address) -> UserRequest:
    user = message.from_user
    return UserRequest(
        chat_id=message.chat.id,
        thread_id=(message.message_thread_id or 0) if message.is_topic_message else 0,
        user_id=user_id,
        language=language_of(None if user is None else user.language_code),
        message_id=message.message_id,
        text=address.text,
        is_private=message.chat.type == "private",
        replied_id=address.replied_id,
        file=text_file_of(message),
    )


def _request_of_press(query: CallbackQuery) -> UserRequest | None:
    message = query.message
    if message is None or not _is_valid(*_ids_of(query, message)):
        return None
    thread_id = 0
    if isinstance(message, Message) and message.is_topic_message:
        thread_id = message.message_thread_id or 0
    return UserRequest(
        chat_id=message.chat.id,
        thread_id=thread_id,
        user_id=query.from_user.id,
        language=language_of(query.from_user.language_code),
        message_id=message.message_id,
        text="",
        is_private=message.chat.type == "private",
        replied_id=None,
    )


def _changed(
    settings: Settings, button: SettingButton, *, newest_seed: int, models: Sequence[str]
) -> Settings | None:
    """The settings after a press; None for a button of another version.

    Seed switches between a random one and that of the newest text, which can be generated again so.
    """
    name, change = button.name, button.change
    if name == "preset" and change in PRESETS:
        return replace(settings, **PRESETS[change])
    if name == "mode" and change in MODES:
        return replace(settings, mode=change)
    if name == "model":
        found = [model for model in models if key_of_model(model) == change]
        return replace(settings, model=found[0]) if found else None
    if name == "seed" and change == "0":
        return replace(settings, seed=newest_seed if settings.seed is None else None)
    if name in NUMERIC_FIELDS and change in ("+", "-", "0"):
        return settings if change == "0" else stepped(settings, name, 1 if change == "+" else -1)
    return None


def _is_valid(*ids: int) -> bool:
    return all(0 < abs(number) < _MAX_ID for number in ids)


def _ids_of(query: CallbackQuery, message: Message | InaccessibleMessage) -> Iterator[int]:
    """The ids of a press that are stored in the database."""
    yield from (message.chat.id, message.message_id, query.from_user.id)
    if isinstance(message, Message) and message.message_thread_id is not None:
        yield message.message_thread_id
