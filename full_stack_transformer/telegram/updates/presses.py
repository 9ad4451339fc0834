"""What a pressed button does: checked against the database, then recorded like anything else.

A button's data come from outside: whose it is and what it belongs to is looked up, never believed.
"""

from dataclasses import replace

from aiogram.types import CallbackQuery, Chat

from full_stack_transformer.telegram.conversation.lanes import Chats, Running
from full_stack_transformer.telegram.sending.buttons import Press, parse_press
from full_stack_transformer.telegram.state.policy import Policy
from full_stack_transformer.telegram.state.records import Reply
from full_stack_transformer.telegram.state.settings import (
    MODES,
    NUMERIC_FIELDS,
    PRESETS,
    Settings,
    stepped,
)
from full_stack_transformer.telegram.state.store import Store
from full_stack_transformer.telegram.texts import LANGUAGES, language_of
from full_stack_transformer.telegram.updates.asks import Ask, Asks, joined

_CONTINUE_PROMPTS = {"en": "Please continue.", "ru": "Продолжай, пожалуйста."}


class Presses:
    """Carries out presses."""

    def __init__(self, store: Store, chats: Chats, policy: Policy, asks: Asks) -> None:
        self._store = store
        self._chats = chats
        self._policy = policy
        self._asks = asks

    def press(
        self, query: CallbackQuery, chat: Chat, message_id: int, stopped: list[Running]
    ) -> str | None:
        """Do what a button says; a sentence for an alert where it cannot be done."""
        language = language_of(query.from_user.language_code)
        words = LANGUAGES[language]
        press = parse_press(query.data)
        if press is None:
            return words.alert_outdated
        user_id = query.from_user.id
        ask = Ask(
            chat_id=chat.id,
            thread_id=0,
            user_id=user_id,
            language=language,
            message_id=message_id,
            text="",
            is_private=chat.type == "private",
            replied_id=None,
        )
        if press.action in ("set", "forget"):
            if press.number != user_id:
                return words.alert_foreign
            thread_id = getattr(query.message, "message_thread_id", None)
            is_topic = getattr(query.message, "is_topic_message", None)
            ask.thread_id = (thread_id or 0) if is_topic else 0
            if press.action == "forget":
                self._asks.forget(ask, stopped)
                return None
            return self._set(ask, press)
        reply = self._store.reply(press.number)
        if reply is None or reply.chat_id != chat.id:
            return words.alert_gone
        if reply.user_id != user_id and not self._policy.is_admin(user_id):
            return words.alert_foreign
        ask.thread_id = reply.thread_id
        return self._on_reply(ask, press, reply, stopped)

    def _on_reply(self, ask: Ask, press: Press, reply: Reply, stopped: list[Running]) -> str | None:
        words = ask.words
        if press.action == "stop":
            return None if self._asks.stop(reply, stopped) else words.nothing_to_stop
        if press.action == "panel":
            settings = self._asks.settings(ask.chat_id, ask.thread_id)
            self._asks.say(
                ask,
                *self._asks.panel(words, ask.thread_id),
                keyboard=self._asks.panel_keyboard(ask, settings),
            )
            return None
        if not reply.texts:
            return words.alert_not_ready
        if press.action == "show":
            return self._show(press, reply, words.alert_outdated)
        reason = self._asks.reason_against(ask.chat_id, ask.user_id)
        if reason is not None:
            return getattr(words, reason).format(quota=self._policy.max_tokens_per_day)[:200]  # type: ignore[no-any-return]
        self._asks.owe(self._next(ask, press, reply))
        return None

    def _show(self, press: Press, reply: Reply, outdated: str) -> str | None:
        (number,) = press.fields
        if not number.isdigit() or int(number) >= len(reply.texts):
            return outdated
        if int(number) != reply.shown:
            reply.shown = int(number)
            self._store.save_reply(reply)
            self._store.add_job(reply.chat_id, "words", "render", reply_id=reply.id)
        return None

    def _next(self, ask: Ask, press: Press, reply: Reply) -> Reply:
        """Another sample of the same prompt, or the text that follows."""
        settings = self._asks.settings(reply.chat_id, reply.thread_id)
        seed = self._asks.new_seed(settings)
        fresh = replace(
            reply,
            id=0,
            user_id=ask.user_id,
            language=ask.language,
            settings=settings,
            seed=seed,
            texts=[],
            requests=[],
            shown=0,
            finish="",
            model="",
            checkpoint={},
        )
        if press.action == "repeat":
            if settings.seed is not None:  # another sample, and yet the same whenever this is done
                fresh.seed = reply.seed + max(1, len(reply.texts))
            return fresh
        fresh.parent_id = reply.id
        fresh.prompt_message_id = ask.message_id
        if reply.mode == "continue":
            fresh.prompt = joined(reply, "")
        else:
            fresh.prompt = _CONTINUE_PROMPTS[ask.language]
        return fresh

    def _set(self, ask: Ask, press: Press) -> str | None:
        settings = self._asks.settings(ask.chat_id, ask.thread_id)
        changed = _changed(settings, *press.fields, newest=self._newest_seed(ask))
        if changed is None:
            return ask.words.alert_outdated
        if changed != settings:
            self._store.save_settings(ask.chat_id, ask.thread_id, changed)
        if changed != settings:
            self._store.add_job(
                ask.chat_id,
                "words",
                "panel",
                {
                    "message_id": ask.message_id,
                    "user_id": ask.user_id,
                    "thread_id": ask.thread_id,
                    "language": ask.language,
                },
            )
        return None

    def _newest_seed(self, ask: Ask) -> int:
        reply = self._store.newest_reply(ask.chat_id, ask.thread_id, user_id=ask.user_id)
        return 0 if reply is None else reply.seed


def _changed(settings: Settings, name: str, change: str, *, newest: int) -> Settings | None:
    """Settings after a press; None where the button is none of this version.

    Seed toggles between a random one and that of the newest text, which so can be had again.
    """
    if name == "preset" and change in PRESETS:
        return replace(settings, **PRESETS[change])
    if name == "mode" and change in MODES:
        return replace(settings, mode=change)
    if name == "seed" and change == "0":
        return replace(settings, seed=newest if settings.seed is None else None)
    if name in NUMERIC_FIELDS and change in ("+", "-", "0"):
        return settings if change == "0" else stepped(settings, name, 1 if change == "+" else -1)
    return None
