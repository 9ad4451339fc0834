"""Whose turn it is: in each chat one text after the other, and beside them the bot's own words.

    store ──wake──> lane of a chat ──job──> service ──text, committed──> messages ──> job ended

A lane takes the oldest job of its chat from the database, so that a restart goes on where the last
process ended. Knows how a job is done; not where it comes from.
"""

import asyncio
import functools
import logging
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiogram.exceptions import TelegramAPIError, TelegramBadRequest

from full_stack_transformer.errors import ServiceRefusedError, ServiceUnavailableError
from full_stack_transformer.telegram.conversation.display import Display
from full_stack_transformer.telegram.conversation.screen import Screen
from full_stack_transformer.telegram.conversation.writing import Draft, Writer
from full_stack_transformer.telegram.monitoring import Metrics
from full_stack_transformer.telegram.sending.delivery import ChatGoneError, ChatMovedError, Courier
from full_stack_transformer.telegram.state.records import Job, Lane, Reply
from full_stack_transformer.telegram.state.store import Store
from full_stack_transformer.telegram.texts import LANGUAGES

logger = logging.getLogger(__name__)

# Below what a service admits by default (16 at once, 64 waiting): a rush of chats waits here,
# where nobody is turned away, and leaves room for the service's other clients.
MAX_RUNNING = 32
_MAX_SERVICE_PAUSE_SECONDS = 30.0
_MAX_FAILURES = 3
_AGAIN_SECONDS = 1.0
_LEAVING_SECONDS = 0.05
# A text that is a day late helps nobody.
_GIVE_UP_SECONDS = 24 * 3600.0

WordsJob = Callable[[Job], Awaitable[None]]


class PostponedError(Exception):
    """The process ends before a job began; the next one does it."""


@dataclass
class Running:
    """A reply that is being written."""

    drafts: list[Draft] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """End it; what became of it is in the database already."""
        if self.task is not None:
            self.task.cancel()


class Chats:
    """The lanes of all chats; use it inside one event loop."""

    def __init__(
        self,
        store: Store,
        courier: Courier,
        writer: Writer,
        metrics: Metrics,
        *,
        log_texts: bool = False,
    ) -> None:
        self._store = store
        self._courier = courier
        self.display = Display(store, courier)
        self._writer = writer
        self._metrics = metrics
        self._log_texts = log_texts
        self.say: WordsJob | None = None
        """What does the jobs of the other lane."""
        self._lanes: dict[tuple[Lane, int], asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(MAX_RUNNING)
        self._ending = asyncio.Event()
        self._is_abandoned = False
        self.running: dict[int, Running] = {}
        """Replies that are being written, by their number."""

    def wake(self) -> None:
        """Give every chat that something is owed to its lane."""
        lanes: tuple[Lane, ...] = ("words",) if self._ending.is_set() else ("words", "answers")
        for lane in lanes:
            for chat_id in self._store.chats_with_jobs(lane):
                key = (lane, chat_id)
                if key not in self._lanes:
                    self._lanes[key] = asyncio.create_task(self._run_lane(lane, chat_id))
                    self._lanes[key].add_done_callback(functools.partial(self._left, key))

    def _left(self, key: tuple[Lane, int], task: asyncio.Task[None]) -> None:
        del self._lanes[key]
        if not self._is_abandoned:
            self.wake()  # a job may have come after the lane looked for one

    def num_ahead(self) -> int:
        """Texts that wait because the bound over all chats is reached."""
        num_lanes = sum(lane == "answers" for lane, _ in self._lanes)
        return max(0, num_lanes - MAX_RUNNING + 1)

    async def finish(self, max_seconds: float) -> None:
        """Finish what is being written or said; what has not begun stays for the next process."""
        self._ending.set()
        if self._lanes:
            logger.info(
                "%d chats are answered to the end; a second signal leaves at once", len(self._lanes)
            )
        try:
            async with asyncio.timeout(max_seconds):
                while self._lanes:
                    await asyncio.wait(self._lanes.values())
                    await asyncio.sleep(0)  # for the callbacks that take lanes out
        except TimeoutError:
            await self.abandon()
        num_left = self._store.num_jobs() + self._store.num_jobs(lane="words")
        if num_left:
            logger.info("%d jobs stay for the next start", num_left)

    async def abandon(self) -> None:
        """Leave everything as it is in the database."""
        self._is_abandoned = True
        self._ending.set()
        tasks = list(self._lanes.values())
        for task in tasks:
            task.cancel()
        if tasks:
            logger.warning("left %d chats in mid-answer; the next start goes on", len(tasks))
            await asyncio.wait(tasks)

    async def _run_lane(self, lane: Lane, chat_id: int) -> None:
        while (job := self._store.next_job(chat_id, lane)) is not None:
            if lane == "answers" and self._ending.is_set():
                return
            try:
                if lane == "answers":
                    await self._answer(job)
                else:
                    assert self.say is not None
                    await self.say(job)
                self._store.end_job(job.id)
            except PostponedError:
                return
            except ChatMovedError:
                asyncio.get_running_loop().call_soon(self.wake)
                return
            except ChatGoneError:
                logger.warning("chat %d is gone or shut the bot out; its data are deleted", chat_id)
                self._store.forget_chat(chat_id)
                self._store.erase()
            except Exception as error:  # one failed job must not take the next ones with it
                await self._failed(job, error)

    async def _failed(self, job: Job, error: Exception) -> None:
        self._metrics.failures.inc()
        where = "" if isinstance(error, TelegramAPIError) else f"\n{_frames(error)}"
        name = type(error).__name__
        logger.error("a job (%s) in chat %d failed: %s%s", job.kind, job.chat_id, name, where)
        num_failures = job.content.get("failures", 0) + 1
        if num_failures < _MAX_FAILURES and not isinstance(error, TelegramBadRequest):
            self._store.remember(job.id, failures=num_failures)
            await asyncio.sleep(_AGAIN_SECONDS)
            return
        reply = None if job.reply_id is None else self._store.reply(job.reply_id)
        with self._store.transaction():
            if reply is not None and job.kind == "answer":
                words = LANGUAGES[reply.language]
                self._store.add_job(
                    job.chat_id,
                    "words",
                    "say",
                    {"text": words.failed, "reply_to": reply.prompt_message_id},
                )
            self._store.end_job(job.id)
        self.wake()

    async def _answer(self, job: Job) -> None:
        """From a prompt to its delivered text; may begin anywhere between."""
        assert job.reply_id is not None
        while True:
            reply = self._store.reply(job.reply_id)
            if reply is None:  # forgotten meanwhile
                return
            if reply.chat_id != job.chat_id:
                raise ChatMovedError  # the lane of the new chat does it
            if reply.texts or reply.finish:
                break
            await self._write(job, reply)
        await self.display.show(reply, str(job.id))
        self._delete_notices(job)

    def _delete_notices(self, job: Job) -> None:
        fresh = self._store.job(job.id)
        with self._store.transaction():
            for message_id in fresh.content.get("notices", []) if fresh else []:
                content = {"message_id": message_id}
                self._store.add_job(job.chat_id, "words", "delete", content)
            self._store.end_job(
                job.id
            )  # from here on a notice that is still under way deletes itself
        self.wake()

    async def _write(self, job: Job, reply: Reply) -> None:
        """Have the text made and keep it; returns without one when it should be tried again."""
        while reply.id in self.running:  # the lane that the chat had before it moved
            self.running[reply.id].stop()
            await asyncio.sleep(_LEAVING_SECONDS)
        await self._or_end(self._slots.acquire())
        running = Running([Draft() for _ in range(reply.settings.variants)])
        self.running[reply.id] = running
        try:
            running.task = asyncio.create_task(self._write_on_screen(job, reply, running.drafts))
            await asyncio.wait({running.task})
            if running.task.cancelled():
                return  # stopped: the text so far is in the database
            running.task.result()
        except ServiceUnavailableError as error:
            await self._wait_for_service(job, reply, error)
        except ServiceRefusedError as error:
            reason = str(error).partition(": ")[0]  # what follows may quote the prompt
            logger.warning("no text for chat %d: %s", reply.chat_id, reason)
            self.keep(reply, [], "refused")
        else:
            self.keep(reply, running.drafts, running.drafts[0].finish or "stop")
        finally:
            if running.task is not None and not running.task.done():
                running.task.cancel()
                await asyncio.wait({running.task})
            del self.running[reply.id]
            self._slots.release()

    async def _write_on_screen(self, job: Job, reply: Reply, drafts: list[Draft]) -> None:
        started = time.monotonic()
        conversation = self._store.conversation(reply.parent_id) if reply.mode == "chat" else []

        async with Screen(
            self._courier, self._store, reply, f"{job.id}:0", lambda: drafts[0].text
        ) as screen:

            def grew() -> None:
                nonlocal started
                if started:
                    self._metrics.first_text_seconds.observe(time.monotonic() - started)
                    started = 0.0
                screen.changed()

            await self._writer.write(reply, conversation, drafts, grew)

    def keep(self, reply: Reply, drafts: list[Draft], finish: str) -> None:
        """A reply has its texts; they are kept before anybody sees them whole."""
        current = self._store.reply(reply.id)
        if current is None or current.texts or current.finish:
            return  # forgotten, or stopped in this moment
        reply.texts = [draft.text for draft in drafts]
        reply.requests = [draft.request.body() for draft in drafts if draft.request]
        reply.finish = finish
        num_tokens = sum(draft.num_tokens for draft in drafts)
        with self._store.transaction():
            self._store.save_reply(reply)
            self._store.charge(reply.user_id, num_tokens)
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
        self._store.remember(job.id, away=num_failures)
        seconds = min(0.5 * 2 ** min(num_failures - 1, 10), _MAX_SERVICE_PAUSE_SECONDS)
        logger.warning("no text for chat %d yet: %s; again in %.1f s", job.chat_id, reason, seconds)
        if time.time() - job.created > _GIVE_UP_SECONDS:
            self.keep(reply, [], "failed")
            return
        if num_failures == 1:
            self.notify(job, reply, LANGUAGES[reply.language].service_away)
            self.wake()
        await self._or_end(asyncio.sleep(seconds))

    def notify(self, job: Job, reply: Reply, text: str) -> None:
        """Say something that is deleted when the text comes."""
        self._store.add_job(
            reply.chat_id,
            "words",
            "notice",
            {
                "text": text,
                "job_id": job.id,
                "thread_id": reply.thread_id,
                "reply_to": reply.prompt_message_id,
            },
            reply.id,
        )

    async def _or_end(self, waiting: Awaitable[object]) -> None:
        """Wait, unless the process ends meanwhile."""
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


def _frames(error: BaseException) -> str:
    """Where an error happened; its message stays away, because it may quote what a user wrote."""
    return "".join(traceback.format_tb(error.__traceback__)).rstrip()
