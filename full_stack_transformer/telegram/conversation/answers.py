"""A text of the model, from its prompt to its delivery; a restart continues wherever the last process ended.

    pending reply ──requests──> service ──drafts──> preview
                                        ──texts, committed──> messages

Knows the service's routes and the replies of the database; not how messages are sent.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from full_stack_transformer.arguments.sampling import MAX_SEED
from full_stack_transformer.errors import ServiceRefusedError, ServiceUnavailableError
from full_stack_transformer.serving.client import (
    ModelDescription,
    ServiceClient,
    Turn,
    WantedAnswer,
    WantedContinuation,
)
from full_stack_transformer.serving.schemas import MAX_TEXT_CHARACTERS
from full_stack_transformer.telegram.monitoring import Metrics
from full_stack_transformer.telegram.sending.delivery import (
    ChatMovedError,
    Courier,
    PostponedError,
)
from full_stack_transformer.telegram.sending.display import Display, Preview
from full_stack_transformer.telegram.sending.markdown import FAILURES
from full_stack_transformer.telegram.state.settings import Settings
from full_stack_transformer.telegram.state.store import Job, Reply, Store
from full_stack_transformer.telegram.texts import LANGUAGES

logger = logging.getLogger(__name__)

# A service generates 32 texts at once by default and queues 64 more. Further chats wait here, where
# nobody is refused, and the queue stays free for the service's other clients.
MAX_RUNNING = 32
_MAX_SERVICE_PAUSE_SECONDS = 30.0
_LEAVING_SECONDS = 0.05
# A text that is a day late is of no use.
_GIVE_UP_SECONDS = 24 * 3600.0

# Each cut removes about a third: 200,000 characters shrink to 100 in 20 cuts.
_MAX_CUTS = 24
_MIN_LENGTH = 16
# Of a text file; a long context holds about as much.
MAX_FILE_BYTES = 256 * 1024
# Words by which servers name a prompt that is too long; there is no common code.
# New tokens of an answer for which earlier turns are forgotten; more are rather given up.
_LENGTH_BEFORE_TURNS = 1024
_TOO_LONG = ("context", "token", "length", "long", "large")
_KEPT_SHARE = 0.65
_CHARACTERS_PER_TOKEN = 4
# The limit of our service is 1,000; odd, because a conversation begins and ends with the user.
_MAX_TURNS = 999

Wanted = WantedContinuation | WantedAnswer


@dataclass
class Draft:
    """The text of one variant, as far as it is written."""

    text: str = ""
    finish: str = ""
    num_tokens: int = 0
    """Number of pieces of the stream; a piece is a token, or a few that form one character."""
    request: Wanted | None = None


class Writer:
    """Requests texts from one service.

    Args:
        client: of the service.
        model_path: what `/why` names as the model of `fst generate`, if the bot started the service.
        system_prompt: of conversations whose chat has none of its own.
    """

    def __init__(
        self,
        client: ServiceClient,
        model_path: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        self._client = client
        self._described: tuple[ModelDescription, ...] = ()
        self._model_path = model_path
        self._system_prompt = system_prompt

    @property
    def known_models(self) -> tuple[str, ...]:
        """Names of the models, if the service has answered."""
        return tuple(one.model for one in self._described)

    def prefers_chat(self, model: str | None = None) -> bool:
        """Whether a chosen model, or else the first, is known to have a chat template."""
        return bool(self._described) and self._chosen(model).has_chat_template

    def known_model(self, model: str | None = None) -> str | None:
        """The name of a chosen model, or else of the first, if the service has answered."""
        return self._chosen(model).model if self._described else None

    def system_prompt(self, settings: Settings) -> str | None:
        """What stands before a conversation."""
        return self._system_prompt if settings.system is None else settings.system

    async def describe(
        self, model: str | None = None, *, refresh: bool = False
    ) -> ModelDescription:
        """A model that is served: the one of this name if there is one, else the first.

        Raises:
            ServiceUnavailableError: the service is not available.
        """
        if not self._described or refresh:
            try:
                self._described = await self._client.describe_models()
            except ServiceRefusedError as error:  # no /v1/models: not an OpenAI-compatible server
                raise ServiceUnavailableError(str(error)) from error
        return self._chosen(model)

    def _chosen(self, model: str | None) -> ModelDescription:
        return next((one for one in self._described if one.model == model), self._described[0])

    async def write(
        self, reply: Reply, conversation: list[Reply], drafts: list[Draft], show: Callable[[], None]
    ) -> None:
        """Fill `drafts`, one for each variant, and `reply.model`; call `show` when the first one grew.

        Raises:
            ServiceUnavailableError: the service is away, overloaded or failing; all drafts are invalid.
            ServiceRefusedError: the service rejects the request, so retrying does not help.
        """
        described = await self.describe(reply.settings.model)
        system = self.system_prompt(reply.settings)
        reply.model = described.model
        reply.checkpoint = {
            name: described.checkpoint[name]
            for name in ("experiment", "step", "validation_loss")
            if name in described.checkpoint
        }
        if self._model_path is not None and described == self._described[0]:
            reply.checkpoint["path"] = self._model_path
        try:
            async with asyncio.TaskGroup() as group:
                for index, draft in enumerate(drafts):
                    request = _request(reply, conversation, described, index, system)
                    grown = show if index == 0 else _do_nothing
                    group.create_task(self._fill(draft, request, grown))
        except ExceptionGroup as group_error:
            self._described = ()
            error = group_error.exceptions[0]
            if isinstance(error, ServiceRefusedError):
                now_served = (await self.describe(described.model)).model
                if now_served != described.model:
                    raise ServiceUnavailableError("another model is served now") from error
            raise error from None

    async def _fill(self, draft: Draft, request: Wanted, grown: Callable[[], None]) -> None:
        for _ in range(_MAX_CUTS):
            draft.request = request
            try:
                await self._stream(draft, request, grown)
                return
            except ServiceRefusedError as error:
                shorter = _shortened(request)
                if shorter is None or not any(word in str(error).lower() for word in _TOO_LONG):
                    raise
                request = shorter
        raise ServiceRefusedError("the service rejects the text even when it is short")

    async def _stream(self, draft: Draft, request: Wanted, grown: Callable[[], None]) -> None:
        draft.text, draft.num_tokens = "", 0
        if isinstance(request, WantedAnswer):
            pieces = self._client.stream_chat(request)
        else:
            pieces = self._client.stream_completion(request)
        async for piece in pieces:
            if piece.text:
                draft.text += piece.text
                draft.num_tokens += 1
                grown()
            draft.finish = piece.finish_reason or ""


@dataclass
class Running:
    """A reply that is being written."""

    drafts: list[Draft]
    task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        """Stop the requests; takes effect after the current step of the event loop."""
        if self.task is not None:
            self.task.cancel()


class Answers:
    """Does the jobs of the lane `answers`; use it inside one event loop."""

    def __init__(
        self,
        store: Store,
        courier: Courier,
        display: Display,
        writer: Writer,
        metrics: Metrics,
        ending: asyncio.Event,
        *,
        log_texts: bool = False,
    ) -> None:
        self._store = store
        self._courier = courier
        self._display = display
        self._writer = writer
        self._metrics = metrics
        self._ending = ending
        self._log_texts = log_texts
        self._slots = asyncio.Semaphore(MAX_RUNNING)
        self._num_active = 0
        self._running: dict[int, Running] = {}

    @property
    def num_running(self) -> int:
        """Number of replies that are being written."""
        return len(self._running)

    @property
    def num_ahead(self) -> int:
        """Number of chats that a new text has to wait for."""
        return max(0, self._num_active - MAX_RUNNING + 1)

    def stop(self, reply: Reply) -> bool:
        """End a text early and keep what there is; whether there was something to end."""
        if reply.finish:
            return False
        running = self._running.get(reply.id)
        drafts = running.drafts if running is not None else []
        kept = [draft for draft in drafts if draft.text] or drafts[:1] or [Draft()]
        reply.model = self._writer.known_model(reply.settings.model) or reply.model
        self._keep(reply, kept, "stopped")
        self.cancel(reply.id)
        return True

    def cancel(self, reply_id: int) -> None:
        """Stop writing a reply; the database says what becomes of it."""
        if reply_id in self._running:
            self._running[reply_id].cancel()

    def cancel_chat(self, chat_id: int) -> None:
        """Stop writing the replies of a chat."""
        for reply_id in self._running:
            reply = self._store.reply(reply_id)
            if reply is not None and reply.chat_id == chat_id:
                self.cancel(reply_id)

    def add_notice(self, job_id: int, reply: Reply, text: str) -> None:
        """Send a message that is deleted when the reply of this job is delivered."""
        content = {
            "text": text,
            "job_id": job_id,
            "thread_id": reply.thread_id,
            "reply_to": reply.prompt_message_id,
        }
        self._store.add_job(reply.chat_id, "words", "notice", content, reply.id)

    async def answer(self, job: Job) -> None:
        """Write and deliver a reply, or what is left to do of that."""
        assert job.reply_id is not None
        self._num_active += 1
        try:
            while True:
                reply = self._store.reply(job.reply_id)
                if reply is None:  # deleted by /forget
                    return
                if reply.chat_id != job.chat_id:
                    raise ChatMovedError  # the lane of the new chat does it
                if reply.texts or reply.finish:
                    break
                if reply.file is None:
                    await self._write(job, reply)
                else:
                    await self._read_file(reply, reply.file)
            await self._display.show(reply, str(job.id))
            self._end(job)
        finally:
            self._num_active -= 1

    async def _read_file(self, reply: Reply, file: dict[str, str]) -> None:
        """Put the content of a text file into the prompt; a file that is none ends the reply."""
        content = await self._courier.download(reply.chat_id, file["id"], MAX_FILE_BYTES)
        try:
            text = (content or b"").decode("utf-8-sig")
        except UnicodeDecodeError:
            text = ""
        if not text.strip() or "\0" in text:
            self._keep(reply, [], "unreadable")
            return
        text = text.replace("\r\n", "\n").strip("\n")
        if reply.mode == "chat":
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            text = f"{fence}{file['name']}\n{text}\n{fence}"
        fresh = self._store.reply(reply.id)
        if fresh is not None and not fresh.finish:
            before = f"{fresh.prompt}\n\n" if fresh.prompt else ""
            self._store.save_reply(replace(fresh, prompt=before + text, file=None))

    def _end(self, job: Job) -> None:
        fresh = self._store.job(job.id)
        with self._store.transaction():
            for message_id in fresh.content.get("notices", []) if fresh else []:
                content = {"message_id": message_id}
                self._store.add_job(job.chat_id, "words", "delete", content)
            # A notice that is sent after this deletes itself.
            self._store.end_job(job.id)

    async def _write(self, job: Job, reply: Reply) -> None:
        """Have the texts generated and store them; returns without them if it should be tried again."""
        while reply.id in self._running:  # by the lane of the chat before it moved
            self.cancel(reply.id)
            await asyncio.sleep(_LEAVING_SECONDS)
        await self._or_postpone(self._slots.acquire())
        running = Running([Draft() for _ in range(reply.settings.variants)])
        self._running[reply.id] = running
        try:
            running.task = asyncio.create_task(self._write_with_preview(job, reply, running.drafts))
            await asyncio.wait({running.task})
            if running.task.cancelled():
                return  # stopped: the text so far is in the database
            running.task.result()
        except ServiceUnavailableError as error:
            await self._wait_for_service(job, reply, error)
        except ServiceRefusedError as error:
            reason = str(error).partition(": ")[0]  # the rest may quote the prompt
            logger.warning("no text for chat %d: %s", reply.chat_id, reason)
            self._keep(reply, [], "refused")
        else:
            self._keep(reply, running.drafts, running.drafts[0].finish or "stop")
        finally:
            if running.task is not None and not running.task.done():
                running.task.cancel()
                await asyncio.wait({running.task})
            del self._running[reply.id]
            self._slots.release()

    async def _write_with_preview(self, job: Job, reply: Reply, drafts: list[Draft]) -> None:
        started = time.monotonic()
        conversation = self._store.conversation(reply.parent_id) if reply.mode == "chat" else []

        async with Preview(
            self._courier, self._store, reply, f"{job.id}:0", lambda: drafts[0].text
        ) as preview:

            def grown() -> None:
                nonlocal started
                if started:
                    self._metrics.first_text_seconds.observe(time.monotonic() - started)
                    started = 0.0
                preview.changed()

            await self._writer.write(reply, conversation, drafts, grown)

    def _keep(self, reply: Reply, drafts: list[Draft], finish: str) -> None:
        """Store the texts of a reply, before anybody sees them whole."""
        current = self._store.reply(reply.id)
        if current is None or current.texts or current.finish:
            return  # deleted or stopped meanwhile
        reply.texts = [draft.text for draft in drafts]
        reply.requests = [draft.request.body() for draft in drafts if draft.request]
        reply.finish = finish
        num_tokens = sum(draft.num_tokens for draft in drafts)
        with self._store.transaction():
            self._store.save_reply(reply)
            self._store.add_tokens(reply.user_id, num_tokens)
        self._metrics.replies.labels(finish).inc()
        self._metrics.tokens.inc(num_tokens)
        logger.info(
            "wrote %d texts of %d characters in chat %d (%s)",
            *(len(reply.texts), sum(map(len, reply.texts)), reply.chat_id, finish),
        )
        if self._log_texts:
            logger.info("prompt %r, texts %r", reply.prompt, reply.texts)

    async def _wait_for_service(
        self, job: Job, reply: Reply, error: ServiceUnavailableError
    ) -> None:
        self._metrics.service_failures.inc()
        reason = str(error).partition(": ")[0]
        num_failures = job.content.get("away", 0) + 1
        job.content["away"] = num_failures
        self._store.update_job(job.id, away=num_failures)
        seconds = min(0.5 * 2 ** min(num_failures - 1, 10), _MAX_SERVICE_PAUSE_SECONDS)
        logger.warning(
            "no text for chat %d yet: %s; retrying in %.1f s", job.chat_id, reason, seconds
        )
        if time.time() - job.created > _GIVE_UP_SECONDS:
            self._keep(reply, [], "failed")
            return
        if num_failures == 1:
            self.add_notice(job.id, reply, LANGUAGES[reply.language].service_away)
        await self._or_postpone(asyncio.sleep(seconds))

    async def _or_postpone(self, waiting: Awaitable[object]) -> None:
        """Wait for something; raises PostponedError if the process ends first."""
        task = asyncio.ensure_future(waiting)
        ending = asyncio.create_task(self._ending.wait())
        try:
            await asyncio.wait({task, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise PostponedError
        finally:
            ending.cancel()
            if not task.done():
                task.cancel()


def _do_nothing() -> None:
    pass


def _request(
    reply: Reply,
    conversation: list[Reply],
    described: ModelDescription,
    index: int,
    system: str | None,
) -> Wanted:
    settings = reply.settings
    sampling: dict[str, Any] = {
        "model": described.model,
        "max_tokens": described.default_length if settings.length is None else settings.length,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "repetition_penalty": settings.repetition_penalty,
        "seed": (reply.seed + index) % (MAX_SEED + 1),
    }
    if reply.mode == "continue":
        return WantedContinuation(prompt=reply.prompt[-MAX_TEXT_CHARACTERS:], **sampling)
    turns = []
    for earlier in conversation:
        if earlier.texts and earlier.finish not in FAILURES:
            turns.append(Turn("user", earlier.prompt[-MAX_TEXT_CHARACTERS:]))
            turns.append(Turn("assistant", earlier.text[-MAX_TEXT_CHARACTERS:]))
    turns.append(Turn("user", reply.prompt[-MAX_TEXT_CHARACTERS:]))
    head = [Turn("system", system)] if system else []
    return WantedAnswer(messages=(*head, *turns[-_MAX_TURNS:]), **sampling)


def _shortened(request: Wanted) -> Wanted | None:
    """The next shorter request; None if it cannot be shortened.

    The server's own count of tokens decides, as it rejects what is too long: the bot needs no tokenizer,
    and servers do not report their context length in a common way. Thousands of new tokens become fewer
    first; then the oldest turns are removed; then the larger of two parts is cut, the beginning of the text
    or the number of new tokens.
    """
    length = request.max_tokens or 0  # 0: the service fits its default length into the context
    if isinstance(request, WantedAnswer):
        num_kept = int(request.messages[0].role == "system")
        head, turns = request.messages[:num_kept], request.messages[num_kept:]
        if length > _LENGTH_BEFORE_TURNS:
            return replace(request, max_tokens=max(_LENGTH_BEFORE_TURNS, length // 2))
        if len(turns) > 1:
            # A conversation begins with the user, so turns are removed in pairs.
            return replace(request, messages=head + turns[2:])
        if length <= _MIN_LENGTH:
            return None
        return replace(request, max_tokens=max(_MIN_LENGTH, length // 2))
    num_characters = len(request.prompt)
    if length > max(_MIN_LENGTH, num_characters // _CHARACTERS_PER_TOKEN):
        return replace(request, max_tokens=max(_MIN_LENGTH, length // 2))
    if num_characters <= 1:
        return None
    kept = request.prompt[num_characters - int(num_characters * _KEPT_SHARE) :]
    _, space, rest = kept.partition(" ")
    return replace(request, prompt=rest if space and len(rest) > len(kept) // 2 else kept)
