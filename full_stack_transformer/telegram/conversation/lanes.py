"""Whose turn it is: in each chat one text after the other, and beside them the bot's own messages.

    store ──has_new_jobs──> lane of a chat ──job──> its handler ──> job ended

A lane takes the oldest job of its chat from the database, so that a restart goes on where the last
process ended. Knows neither what a job is about nor where it comes from.
"""

import asyncio
import functools
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping

from aiogram.exceptions import TelegramAPIError, TelegramBadRequest

from full_stack_transformer.telegram.monitoring import Metrics
from full_stack_transformer.telegram.sending.delivery import ChatGoneError, ChatMovedError
from full_stack_transformer.telegram.state.store import Job, Lane, Store
from full_stack_transformer.telegram.texts import LANGUAGES

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3
_RETRY_SECONDS = 1.0


Handler = Callable[[Job], Awaitable[None]]
"""Does one job."""


class PostponedError(Exception):
    """The process ends before a job began; the next process does it."""


class Lanes:
    """The lanes of all chats; use it inside one event loop.

    Args:
        store: the pending jobs.
        handlers: what does the jobs of each lane.
        metrics: counts failures.
        ending: once it is set, no more answers begin.
    """

    def __init__(
        self,
        store: Store,
        handlers: Mapping[Lane, Handler],
        metrics: Metrics,
        ending: asyncio.Event,
    ) -> None:
        self._store = store
        self._handlers = handlers
        self._metrics = metrics
        self._ending = ending
        self._lanes: dict[tuple[Lane, int], asyncio.Task[None]] = {}
        self._is_abandoned = False

    async def run(self) -> None:
        """Give each chat with pending jobs its lanes, until cancelled."""
        while True:
            self._store.has_new_jobs.clear()
            self._start_lanes()
            await self._store.has_new_jobs.wait()

    def _start_lanes(self) -> None:
        if self._is_abandoned:
            return
        lanes: tuple[Lane, ...] = ("words",) if self._ending.is_set() else ("words", "answers")
        for lane in lanes:
            for chat_id in self._store.chats_with_jobs(lane):
                key = (lane, chat_id)
                if key not in self._lanes:
                    self._lanes[key] = asyncio.create_task(self._run_lane(lane, chat_id))
                    self._lanes[key].add_done_callback(functools.partial(self._left, key))

    def _left(self, key: tuple[Lane, int], task: asyncio.Task[None]) -> None:
        del self._lanes[key]
        self._start_lanes()  # a job may have been added after the lane looked for one

    async def finish(self, max_seconds: float) -> None:
        """Finish the jobs under way and the bot's own messages; other texts wait for the next process."""
        self._ending.set()
        if self._lanes:
            logger.info(
                "finishing the replies of %d chats; a second signal stops at once", len(self._lanes)
            )
        try:
            async with asyncio.timeout(max_seconds):
                while self._lanes:
                    await asyncio.wait(self._lanes.values())
                    await asyncio.sleep(0)  # for the callbacks that remove lanes
        except TimeoutError:
            await self.abandon()
        num_left = self._store.num_jobs() + self._store.num_jobs(lane="words")
        if num_left:
            logger.info("%d jobs are left for the next start", num_left)

    async def abandon(self) -> None:
        """Stop at once; the database keeps every job that has not ended."""
        self._is_abandoned = True
        self._ending.set()
        tasks = list(self._lanes.values())
        for task in tasks:
            task.cancel()
        if tasks:
            logger.warning(
                "interrupted the replies of %d chats; the next start continues", len(tasks)
            )
            await asyncio.wait(tasks)

    async def _run_lane(self, lane: Lane, chat_id: int) -> None:
        while (job := self._store.next_job(chat_id, lane)) is not None:
            if lane == "answers" and self._ending.is_set():
                return
            try:
                await self._handlers[lane](job)
                self._store.end_job(job.id)
            except (PostponedError, ChatMovedError):
                return
            except ChatGoneError:
                logger.warning(
                    "chat %d is gone or has blocked the bot; its data is deleted", chat_id
                )
                self._store.forget_chat(chat_id)
                self._store.erase()
            except Exception as error:  # one failed job must not stop the next ones
                await self._failed(job, error)

    async def _failed(self, job: Job, error: Exception) -> None:
        self._metrics.failures.inc()
        where = "" if isinstance(error, TelegramAPIError) else f"\n{_frames(error)}"
        name = type(error).__name__
        logger.error("a job (%s) in chat %d failed: %s%s", job.kind, job.chat_id, name, where)
        num_failures = job.content.get("failures", 0) + 1
        if num_failures < _MAX_FAILURES and not isinstance(error, TelegramBadRequest):
            self._store.update_job(job.id, failures=num_failures)
            await asyncio.sleep(_RETRY_SECONDS)
            return
        reply = None if job.reply_id is None else self._store.reply(job.reply_id)
        with self._store.transaction():
            if reply is not None and job.kind == "answer":
                text = LANGUAGES[reply.language].failed
                content = {"text": text, "reply_to": reply.prompt_message_id}
                self._store.add_job(job.chat_id, "words", "say", content)
            self._store.end_job(job.id)


def _frames(error: BaseException) -> str:
    """Where an error happened, without its message, which may quote a user's text."""
    return "".join(traceback.format_tb(error.__traceback__)).rstrip()
