"""A text of the model, from its prompt to its delivery; a restart continues wherever the last process ended.

    pending reply ──requests──> service ──drafts──> preview
                                        ──texts, committed──> messages

Knows the replies of the database; not the service's routes (`writing`), and not how messages are sent.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable
from dataclasses import dataclass, replace

from full_stack_transformer.errors import ServiceRefusedError, ServiceUnavailableError
from full_stack_transformer.telegram.conversation.writing import Draft, Writer
from full_stack_transformer.telegram.monitoring import Metrics
from full_stack_transformer.telegram.sending.delivery import (
    ChatMovedError,
    Courier,
    PostponedError,
)
from full_stack_transformer.telegram.sending.display import Display, Preview
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

# Of a text file; a long context holds about as much.
MAX_FILE_BYTES = 256 * 1024


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
