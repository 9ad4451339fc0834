"""What people ask for in words: prompts and commands, turned into jobs in the database.

Knows neither aiogram nor the service: an `Ask` is all that is left of a message.
"""

import json
import secrets
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from full_stack_transformer.telegram.conversation.lanes import Chats, Running
from full_stack_transformer.telegram.conversation.writing import Draft, Writer
from full_stack_transformer.telegram.sending.buttons import forget_keyboard, settings_keyboard
from full_stack_transformer.telegram.state.policy import Policy
from full_stack_transformer.telegram.state.records import Reply
from full_stack_transformer.telegram.state.settings import Settings, with_value
from full_stack_transformer.telegram.state.store import Store
from full_stack_transformer.telegram.texts import LANGUAGES, Words

# Texts of one chat that may wait; who wants more is asked for patience.
MAX_WAITING = 10
_MAX_RANDOM_SEED = 2**31
_MAX_ID = 2**53


@dataclass
class Ask:
    """A message, as far as the bot cares."""

    chat_id: int
    thread_id: int
    user_id: int
    language: str
    message_id: int
    text: str
    is_private: bool
    replied_id: int | None
    """The message of the bot that it replies to."""

    @property
    def words(self) -> Words:
        """The person's language."""
        return LANGUAGES[self.language]


Handler = Callable[[Ask, str, list[Running]], None]


class Asks:
    """Records what is asked for."""

    def __init__(
        self,
        store: Store,
        chats: Chats,
        writer: Writer,
        policy: Policy,
        default: Settings,
        *,
        service_url: str,
        log_texts: bool,
    ) -> None:
        self._store = store
        self._chats = chats
        self._writer = writer
        self._policy = policy
        self._default = default
        self._service_url = service_url
        self._log_texts = log_texts
        self._commands: dict[str, Handler] = {
            "start": self._start,
            "help": self._help,
            "settings": self._settings,
            "stop": self._stop,
            "reset": self._reset,
            "why": self._why,
            "status": self._status,
            "privacy": self._privacy,
            "export": self._export,
            "forget": self._forget,
        }
        self._admin_commands: dict[str, Handler] = {"allow": self._allow, "deny": self._deny}

    def command(self, name: str, user_id: int) -> Handler | None:
        """What a command does; admins know more of them."""
        if self._policy.is_admin(user_id) and name in self._admin_commands:
            return self._admin_commands[name]
        return self._commands.get(name)

    # Prompts

    def reason_against(self, chat_id: int, user_id: int) -> Literal["too_many", "quota"] | None:
        """Why a user gets no text now, as the name of a sentence."""
        if not self._policy.has_tokens(user_id):
            return "quota"
        if self._store.num_jobs(chat_id) > MAX_WAITING:
            return "too_many"
        return None

    def settings(self, chat_id: int, thread_id: int) -> Settings:
        """Of a chat or topic."""
        return self._store.settings(chat_id, thread_id, self._default)

    def continue_or_answer(self, ask: Ask) -> None:
        """Owe a text for a prompt; one that replies to a text of the bot goes on from there."""
        settings = self.settings(ask.chat_id, ask.thread_id)
        replied = None
        if ask.replied_id is not None:
            replied = self._store.reply_of_message(ask.chat_id, ask.replied_id)
        mode: Literal["continue", "chat"] = self._mode(settings)
        prompt, parent = ask.text, replied
        if mode == "continue" and replied is not None and replied.texts:
            prompt = joined(replied, ask.text)
        if mode == "chat" and replied is None:
            parent = self._store.newest_reply(ask.chat_id, ask.thread_id, mode="chat")
        self.owe(
            Reply(
                id=0,
                chat_id=ask.chat_id,
                thread_id=ask.thread_id,
                user_id=ask.user_id,
                language=ask.language,
                mode=mode,
                prompt=prompt,
                prompt_message_id=ask.message_id,
                settings=settings,
                seed=self.new_seed(settings),
                parent_id=None if parent is None else parent.id,
            )
        )

    def _mode(self, settings: Settings) -> Literal["continue", "chat"]:
        if settings.mode == "auto":
            return "chat" if self._writer.prefers_chat else "continue"
        return settings.mode

    def new_seed(self, settings: Settings) -> int:
        """The seed of a text: the fixed one, or one that nobody has had."""
        return secrets.randbelow(_MAX_RANDOM_SEED) if settings.seed is None else settings.seed

    def owe(self, reply: Reply) -> None:
        """Record a text that is owed, and say how many are before it."""
        num_ahead = self._store.num_unwritten(reply.chat_id) + self._chats.num_ahead()
        self._store.add_reply(reply)
        job_id = self._store.add_job(reply.chat_id, "answers", "answer", reply_id=reply.id)
        if num_ahead:
            job = self._store.job(job_id)
            assert job is not None
            text = LANGUAGES[reply.language].queued.format(position=num_ahead + 1)
            self._chats.notify(job, reply, text)

    def say(self, ask: Ask, text: str, **content: Any) -> None:
        """Owe some words of the bot's own."""
        content |= {"text": text, "reply_to": ask.message_id, "thread_id": ask.thread_id}
        self._store.add_job(ask.chat_id, "words", "say", content)

    # Commands

    def _start(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        self.say(ask, ask.words.welcome)

    def _help(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        self.say(ask, ask.words.help)

    def _privacy(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        logging = {"en": " (texts too, for now)", "ru": " (пока и тексты)"}[ask.language]
        self.say(ask, ask.words.privacy.format(logging=logging if self._log_texts else ""))

    def _settings(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        settings = self.settings(ask.chat_id, ask.thread_id)
        if argument:
            name, _, value = argument.lower().partition(" ")
            changed = with_value(settings, name, value.strip())
            if isinstance(changed, str):
                self.say(ask, ask.words.setting_expected.format(expected=changed))
                return
            self._store.save_settings(ask.chat_id, ask.thread_id, changed)
            self.say(ask, ask.words.setting_set)
            return
        self.say(
            ask, *self.panel(ask.words, ask.thread_id), keyboard=self.panel_keyboard(ask, settings)
        )

    def panel(self, words: Words, thread_id: int) -> tuple[str]:
        """The text over the settings."""
        return (words.settings_topic if thread_id else words.settings_title,)

    def panel_keyboard(self, ask: Ask, settings: Settings) -> dict[str, Any]:
        """The buttons of the settings, for the person who asked."""
        keyboard = settings_keyboard(ask.words, ask.user_id, settings)
        return keyboard.model_dump(exclude_none=True)

    def _stop(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        waiting = self._store.waiting_answers(ask.chat_id, ask.user_id)
        replies = [self._store.reply(reply_id) for _, reply_id in waiting]
        unfinished = [reply for reply in replies if reply is not None and not reply.finish]
        if not unfinished:
            self.say(ask, ask.words.nothing_to_stop)
        for reply in unfinished:
            self.stop(reply, stopped)

    def stop(self, reply: Reply, stopped: list[Running]) -> bool:
        """End a text early and keep what there is; whether there was something to end."""
        if reply.finish:
            return False
        running = self._chats.running.get(reply.id)
        drafts = running.drafts if running is not None else []
        kept = [draft for draft in drafts if draft.text] or drafts[:1] or [Draft()]
        if self._writer.known_model is not None:
            reply.model = self._writer.known_model
        self._chats.keep(reply, kept, "stopped")
        if running is not None:
            stopped.append(running)
        return True

    def _reset(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        self._store.begin_conversation(ask.chat_id, ask.thread_id)
        self.say(ask, ask.words.reset)

    def _status(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        self._store.add_job(ask.chat_id, "words", "status", _whose(ask))

    def _export(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        if ask.is_private:
            self._store.add_job(ask.chat_id, "words", "export", _whose(ask))
        else:
            self.say(ask, ask.words.private_only)

    def _forget(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        keyboard = forget_keyboard(ask.words, ask.user_id).model_dump(exclude_none=True)
        self.say(ask, ask.words.forget_question, keyboard=keyboard)

    def forget(self, ask: Ask, stopped: list[Running]) -> None:
        """Delete what is kept: all of a private chat, the user's own texts of a group."""
        if ask.is_private:
            self.forget_chat(ask.chat_id, stopped)
        else:
            for _, reply_id in self._store.waiting_answers(ask.chat_id, ask.user_id):
                if reply_id in self._chats.running:
                    stopped.append(self._chats.running[reply_id])
            self._store.forget_user_in_chat(ask.chat_id, ask.user_id)
        self._store.saw_message(ask.chat_id, ask.message_id)
        self._store.add_job(
            ask.chat_id, "words", "say", {"text": ask.words.forgotten, "thread_id": ask.thread_id}
        )

    def forget_chat(self, chat_id: int, stopped: list[Running]) -> None:
        """Delete everything of a chat."""
        stopped.extend(self._running_in(chat_id))
        self._store.forget_chat(chat_id)

    def move_chat(self, old_id: int, new_id: int, stopped: list[Running]) -> None:
        """A group has a new number; what is being written there begins anew in the new one."""
        stopped.extend(self._running_in(old_id))
        self._store.move_chat(old_id, new_id)

    def _running_in(self, chat_id: int) -> list[Running]:
        replies = {reply_id: self._store.reply(reply_id) for reply_id in self._chats.running}
        return [
            self._chats.running[reply_id]
            for reply_id, reply in replies.items()
            if reply is not None and reply.chat_id == chat_id
        ]

    def _why(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        if ask.replied_id is not None:
            reply = self._store.reply_of_message(ask.chat_id, ask.replied_id)
        else:
            reply = self._store.newest_reply(ask.chat_id, ask.thread_id, user_id=ask.user_id)
        if reply is None or not reply.texts or reply.shown >= len(reply.requests):
            self.say(ask, ask.words.why_nothing)
            return
        self.say(ask, self._explanation(reply, ask.words), codes=self._codes(reply, ask.words))

    def _explanation(self, reply: Reply, words: Words) -> str:
        request = reply.requests[reply.shown]
        known = [f"{name} {value}" for name, value in reply.checkpoint.items() if name != "path"]
        settings = asdict(reply.settings)
        shown = {name: settings[name] for name in words.fields if name != "seed"}
        shown["length"] = request.get("max_tokens", shown["length"])
        return words.why.format(
            model=reply.model or "?",
            checkpoint=f" ({', '.join(known)})" if known else "",
            mode=reply.mode,
            seed=request["seed"],
            finish=reply.finish,
            settings=", ".join(f"{words.fields[name]} {value:g}" for name, value in shown.items()),
        )

    def _codes(self, reply: Reply, words: Words) -> list[tuple[str, str]]:
        request = reply.requests[reply.shown]
        path = "chat/completions" if reply.mode == "chat" else "completions"
        body = shlex.quote(json.dumps(request, ensure_ascii=False))
        call = f"curl {self._service_url}/v1/{path} -H 'content-type: application/json' -d {body}"
        if reply.mode == "chat":
            return [(words.why_chat, call)]
        model = str(reply.checkpoint.get("path") or reply.model)
        return [(words.why_same, generate_command(model, request)), (words.why_same, call)]

    def _allow(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        self._decide(ask, argument, "allow", is_allowed=True)

    def _deny(self, ask: Ask, argument: str, stopped: list[Running]) -> None:
        self._decide(ask, argument, "deny", is_allowed=False)

    def _decide(self, ask: Ask, argument: str, command: str, *, is_allowed: bool) -> None:
        digits = argument.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and 0 < int(digits[:17]) < _MAX_ID):
            self.say(ask, ask.words.admin_usage.format(command=command))
            return
        self._store.allow(int(argument[:18]), is_allowed)
        self.say(ask, ask.words.admin_done)


def _whose(ask: Ask) -> dict[str, Any]:
    return {
        "user_id": ask.user_id,
        "language": ask.language,
        "reply_to": ask.message_id,
        "thread_id": ask.thread_id,
    }


def joined(reply: Reply, text: str) -> str:
    """A text of the bot with a person's words after it, a space between them where none is."""
    before = reply.prompt + reply.text if reply.mode == "continue" else reply.text
    needs_space = before and text and not before[-1].isspace() and text[0].isalnum()
    return f"{before} {text}" if needs_space else before + text


def generate_command(model: str, request: dict[str, Any]) -> str:
    """The line for a shell that prints the prompt and the same text again."""
    options = {
        "prompt": request["prompt"],
        "max_new_tokens": request["max_tokens"],
        "temperature": request["temperature"],
        "top_k": request.get("top_k", 0),
        "top_p": request["top_p"],
        "repetition_penalty": request.get("repetition_penalty", 1.0),
        "seed": request["seed"],
    }
    # With an equals sign a prompt that begins with a hyphen is no option.
    words = [f"--{name}={value}" for name, value in options.items()]
    return shlex.join(["fst", "generate", model, *words])
