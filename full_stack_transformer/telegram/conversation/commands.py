"""Commands, and the bot's own messages that answer them.

    Commands.run ──recorded as a job of the lane `words`──> OwnMessages.send ──> message

Knows how messages are sent and what the database holds; neither updates nor who may send them.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from aiogram.methods import SendDocument
from aiogram.types import BufferedInputFile, InlineKeyboardMarkup

from full_stack_transformer.errors import ServiceError
from full_stack_transformer.telegram.conversation.answers import Answers
from full_stack_transformer.telegram.conversation.requests import Policy, Requests, UserRequest
from full_stack_transformer.telegram.conversation.writing import Writer
from full_stack_transformer.telegram.sending.delivery import Courier, MessageGoneError
from full_stack_transformer.telegram.sending.display import Display
from full_stack_transformer.telegram.sending.formatting import (
    Piece,
    edited_message,
    explained_pieces,
    forget_keyboard,
    new_message,
    settings_keyboard,
    text_pieces,
)
from full_stack_transformer.telegram.state.settings import MODES, with_value
from full_stack_transformer.telegram.state.store import Job, Reply, Store
from full_stack_transformer.telegram.texts import LANGUAGES, Words

_MAX_ID = 2**53  # of Telegram's users and chats
# Telegram's longest message, less the command.
_MAX_SYSTEM_CHARACTERS = 4000

Handler = Callable[[UserRequest, str], None]


class Commands:
    """Records what a command asks for."""

    def __init__(
        self,
        store: Store,
        answers: Answers,
        policy: Policy,
        requests: Requests,
        writer: Writer,
        *,
        service_url: str,
        log_texts: bool,
    ) -> None:
        self._store = store
        self._answers = answers
        self._policy = policy
        self._requests = requests
        self._writer = writer
        self._say = requests.say
        self._service_url = service_url
        self._log_texts = log_texts
        self._handlers: dict[str, Handler] = {
            "start": self._start,
            "help": lambda request, _: self._say(request, request.words.help),
            "settings": self._settings,
            "system": self._system,
            "model": self._model,
            "stop": self._stop,
            "reset": self._reset,
            "why": self._why,
            "status": lambda request, _: self._later("status", request),
            "privacy": self._privacy,
            "export": self._export,
            "forget": self._forget,
        }
        self._admin_handlers: dict[str, Handler] = {
            "allow": lambda request, argument: self._decide(request, "allow", argument),
            "deny": lambda request, argument: self._decide(request, "deny", argument),
        }

    def run(self, name: str, argument: str, request: UserRequest) -> bool:
        """Carry out a command; false if there is none of that name, or for admins only."""
        handler = self._handler(name, request)
        if handler is None:
            return False
        handler(request, argument)
        return True

    def has(self, name: str, request: UserRequest) -> bool:
        """Whether there is a command of that name for whoever asks."""
        return self._handler(name, request) is not None

    def _handler(self, name: str, request: UserRequest) -> Handler | None:
        handler = self._handlers.get(name)
        if handler is None and self._policy.is_admin(request.user_id):
            handler = self._admin_handlers.get(name)
        return handler

    def _later(self, kind: str, request: UserRequest) -> None:
        """Add a message whose text is composed when it is sent."""
        content = {
            "user_id": request.user_id,
            "language": request.language,
            "reply_to": request.message_id,
            "thread_id": request.thread_id,
        }
        self._store.add_job(request.chat_id, "words", kind, content)

    def _settings(self, request: UserRequest, argument: str) -> None:
        if not argument:
            self._requests.show_settings(request)
            return
        settings = self._requests.settings(request.chat_id, request.thread_id)
        name, _, value = argument.lower().partition(" ")
        changed = with_value(settings, name, value.strip())
        if isinstance(changed, str):
            self._say(request, request.words.setting_expected.format(expected=changed))
            return
        self._store.save_settings(request.chat_id, request.thread_id, changed)
        self._say(request, request.words.setting_set)

    def _start(self, request: UserRequest, argument: str) -> None:
        words = request.words
        self._say(
            request, words.welcome_chat if self._requests.converses(request) else words.welcome
        )

    def _system(self, request: UserRequest, argument: str) -> None:
        """Show or set the system prompt of this chat; a hyphen takes it back."""
        words, ids = request.words, (request.chat_id, request.thread_id)
        settings = self._requests.settings(*ids)
        if not argument:
            prompt = self._writer.system_prompt(settings)
            self._say(
                request, words.system_is.format(prompt=prompt) if prompt else words.system_none
            )
            return
        system = None if argument == "-" else argument[:_MAX_SYSTEM_CHARACTERS]
        self._store.save_settings(*ids, replace(settings, system=system))
        self._say(request, words.setting_set)

    def _model(self, request: UserRequest, argument: str) -> None:
        if not argument:
            self._requests.show_settings(request)
            return
        ids = (request.chat_id, request.thread_id)
        names = self._writer.known_models
        found = [name for name in names if name.lower() == argument.lower()]
        if not found:
            expected = ", ".join(names) or request.words.status_away
            self._say(request, request.words.setting_expected.format(expected=expected))
            return
        self._store.save_settings(*ids, replace(self._requests.settings(*ids), model=found[0]))
        self._say(request, request.words.setting_set)

    def _stop(self, request: UserRequest, argument: str) -> None:
        pending = self._store.pending_replies(request.chat_id, request.user_id)
        unfinished = [reply for reply in pending if not reply.finish]
        if not unfinished:
            self._say(request, request.words.nothing_to_stop)
        for reply in unfinished:
            self._answers.stop(reply)

    def _reset(self, request: UserRequest, argument: str) -> None:
        self._store.begin_conversation(request.chat_id, request.thread_id)
        self._say(request, request.words.reset)

    def _privacy(self, request: UserRequest, argument: str) -> None:
        logging = request.words.privacy_logging if self._log_texts else ""
        self._say(request, request.words.privacy.format(logging=logging))

    def _export(self, request: UserRequest, argument: str) -> None:
        if request.is_private:
            self._later("export", request)
        else:
            self._say(request, request.words.private_only)

    def _forget(self, request: UserRequest, argument: str) -> None:
        keyboard = forget_keyboard(request.words, request.user_id).model_dump(exclude_none=True)
        self._say(request, request.words.forget_question, keyboard=keyboard)

    def _why(self, request: UserRequest, argument: str) -> None:
        chat_id, words = request.chat_id, request.words
        if request.replied_id is not None:
            reply = self._store.reply_of_message(chat_id, request.replied_id)
        else:
            reply = self._store.newest_reply(chat_id, request.thread_id, user_id=request.user_id)
        if reply is None or not reply.texts or reply.shown >= len(reply.requests):
            self._say(request, words.why_nothing)
            return
        codes = _commands_for(reply, words, self._service_url)
        self._say(request, _explanation(reply, words), codes=codes)

    def _decide(self, request: UserRequest, command: str, argument: str) -> None:
        digits = argument.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and 0 < int(digits[:17]) < _MAX_ID):
            self._say(request, request.words.admin_usage.format(command=command))
            return
        self._store.allow(int(argument[:18]), command == "allow")
        self._say(request, request.words.admin_done)


def _explanation(reply: Reply, words: Words) -> str:
    request = reply.requests[reply.shown]
    known = [f"{name} {value}" for name, value in reply.checkpoint.items() if name != "path"]
    settings = asdict(reply.settings)
    values = {name: settings[name] for name in words.fields if name != "seed"}
    values["length"] = request.get("max_tokens", values["length"])
    return words.why.format(
        model=reply.model or "?",
        checkpoint=f" ({', '.join(known)})" if known else "",
        mode=words.modes[MODES.index(reply.mode)],
        seed=request["seed"],
        finish=words.finishes.get(reply.finish, reply.finish),
        settings=", ".join(f"{words.fields[name]} {words.number(values[name])}" for name in values),
    )


def _commands_for(reply: Reply, words: Words, service_url: str) -> list[tuple[str, str]]:
    """Titles and shell commands that generate the shown text again."""
    request = reply.requests[reply.shown]
    path = "chat/completions" if reply.mode == "chat" else "completions"
    body = shlex.quote(json.dumps(request, ensure_ascii=False))
    call = f"curl {service_url}/v1/{path} -H 'content-type: application/json' -d {body}"
    if reply.mode == "chat":
        return [(words.why_chat, call)]
    model = str(reply.checkpoint.get("path") or reply.model)
    return [(words.why_same, _generate_command(model, request)), (words.why_same, call)]


def _generate_command(model: str, request: dict[str, Any]) -> str:
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    options: dict[str, Any] = {
        "prompt": request["prompt"],
        "max_new_tokens": request.get("max_tokens"),
    }
    options |= {name: request.get(name) for name in names}
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    # With an equals sign, as a prompt that begins with a hyphen would be taken for an option.
    return shlex.join(["fst", "generate", model, *given, "--raw"])


class OwnMessages:
    """Does the jobs of the lane `words`, by kind:

    say      a text                                  panel    the settings, edited after a press
    notice   one that is deleted with the answer     render   a reply whose shown variant changed
    delete   delete such a notice                    status   the text of /status
    export   the file of /export
    """

    def __init__(
        self,
        store: Store,
        courier: Courier,
        display: Display,
        answers: Answers,
        writer: Writer,
        policy: Policy,
        requests: Requests,
    ) -> None:
        self._store = store
        self._courier = courier
        self._display = display
        self._answers = answers
        self._writer = writer
        self._policy = policy
        self._requests = requests
        self._kinds = {
            "say": self._say,
            "notice": self._notice,
            "delete": self._delete,
            "panel": self._panel,
            "render": self._render,
            "status": self._status,
            "export": self._export,
        }

    async def send(self, job: Job) -> None:
        """Do one job."""
        await self._kinds[job.kind](job)

    async def _say(self, job: Job) -> None:
        if "codes" in job.content:
            pieces = explained_pieces(job.content["text"], job.content["codes"])
        else:
            pieces = text_pieces("", job.content["text"])
        for position, piece in enumerate(pieces):
            keyboard = job.content.get("keyboard") if position == len(pieces) - 1 else None
            await self._send(job, position, piece, keyboard)

    async def _send(self, job: Job, position: int, piece: Piece, keyboard: object = None) -> int:
        method = new_message(
            job.chat_id,
            job.content.get("thread_id"),
            piece,
            job.content.get("reply_to"),
            InlineKeyboardMarkup.model_validate(keyboard) if keyboard else None,
        )
        return await self._courier.send(f"{job.id}:{position}", method)

    async def _notice(self, job: Job) -> None:
        answer_id = job.content["job_id"]
        if self._store.job(answer_id) is None:
            return  # the answer was delivered first
        message_id = await self._send(job, 0, Piece(job.content["text"], []))
        answer = self._store.job(answer_id)
        if answer is None:
            await self._display.delete(job.chat_id, message_id)
        else:
            notices = [*answer.content.get("notices", []), message_id]
            self._store.update_job(answer_id, notices=notices)

    async def _delete(self, job: Job) -> None:
        await self._display.delete(job.chat_id, job.content["message_id"])

    async def _panel(self, job: Job) -> None:
        if self._store.has_newer_panel(job):
            return  # of several quick presses only the last state is shown
        words = LANGUAGES[job.content["language"]]
        thread_id = job.content["thread_id"]
        settings = self._requests.settings(job.chat_id, thread_id)
        models = self._writer.known_models
        keyboard = settings_keyboard(words, job.content["user_id"], settings, models)
        piece = Piece(words.settings_title(thread_id), [])
        method = edited_message(job.chat_id, job.content["message_id"], piece, keyboard)
        try:
            await self._courier.call(method)
        except MessageGoneError:
            return

    async def _render(self, job: Job) -> None:
        reply = None if job.reply_id is None else self._store.reply(job.reply_id)
        if reply is not None:
            await self._display.show(reply, str(job.id))

    async def _status(self, job: Job) -> None:
        words = LANGUAGES[job.content["language"]]
        user_id = job.content["user_id"]
        try:
            chosen = self._requests.settings(job.chat_id, job.content.get("thread_id") or 0).model
            model = (await self._writer.describe(chosen, refresh=True)).model
            lines = [words.status_service.format(model=model)]
        except ServiceError:
            lines = [words.status_away]
        lines.append(words.status.format(num_waiting=self._store.num_unwritten(job.chat_id)))
        used, quota = self._store.tokens_today(user_id), self._policy.max_tokens_per_day
        template = words.status_quota if quota else words.status_no_quota
        lines.append(template.format(used=used, quota=quota))
        if self._policy.is_admin(user_id):
            lines.append(
                words.status_admin.format(
                    num_jobs=self._store.num_jobs(),
                    num_running=self._answers.num_running,
                    allowed=self._policy.describe(),
                )
            )
        await self._send(job, 0, Piece("\n".join(lines), []))

    async def _export(self, job: Job) -> None:
        words = LANGUAGES[job.content["language"]]
        exported = self._store.export_chat(job.chat_id, job.content["user_id"])
        content = json.dumps(exported, ensure_ascii=False, indent=1).encode("utf-8", "replace")
        await self._courier.send(
            f"{job.id}:0",
            SendDocument(
                chat_id=job.chat_id,
                message_thread_id=job.content.get("thread_id") or None,
                document=BufferedInputFile(content, "telegram_bot_export.json"),
                caption=words.export_caption,
                parse_mode=None,
            ),
        )
