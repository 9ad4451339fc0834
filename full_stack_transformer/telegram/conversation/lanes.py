"""Whose turn it is: in each chat one text after the other, and beside them the bot's own messages.

    store ──has_new_jobs──> lane of a chat ──job──> its handler ──> job ended

A lane takes the oldest job of its chat from the database, so that a restart goes on where the last
process ended. Knows neither what a job is about nor where it comes from.
"""

import asyncio
import contextlib
import functools
import logging
import sqlite3
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping

from aiogram.exceptions import TelegramAPIError, TelegramBadRequest

from full_stack_transformer.telegram.monitoring import Metrics
from full_stack_transformer.telegram.sending.delivery import (
    ChatGoneError,
    ChatMovedError,
    PostponedError,
)
from full_stack_transformer.telegram.state.database import is_fault
from full_stack_transformer.telegram.state.store import Job, Lane, Store
from full_stack_transformer.telegram.texts import LANGUAGES

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3
_RETRY_SECONDS = 1.0
_MAX_RETRY_SECONDS = 10.0

Handler = Callable[[Job], Awaitable[None]]
"""Does one job."""


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
        self._postponed: set[tuple[Lane, int]] = set()
        self._fault: BaseException | None = None
        self._is_abandoned = False

    async def run(self) -> None:
        """Give each chat with pending jobs its lanes, until cancelled.

        Raises:
            sqlite3.Error: the database is damaged.
        """
        while self._fault is None:
            self._store.has_new_jobs.clear()
            self._start_lanes()
            await self._store.has_new_jobs.wait()
        raise self._fault

    def _start_lanes(self) -> None:
        if self._is_abandoned:
            return
        lanes: tuple[Lane, ...] = ("words",) if self._ending.is_set() else ("words", "answers")
        try:
            pending = [(lane, chat) for lane in lanes for chat in self._store.chats_with_jobs(lane)]
        except sqlite3.OperationalError as error:
            self._store.report(error)
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._store.has_new_jobs.set)
            return
        for key in pending:
            if key not in self._lanes and key not in self._postponed:
                self._lanes[key] = asyncio.create_task(self._run_lane(*key))
                self._lanes[key].add_done_callback(functools.partial(self._left, key))

    def _left(self, key: tuple[Lane, int], task: asyncio.Task[None]) -> None:
        del self._lanes[key]
        error = None if task.cancelled() else task.exception()
        if error is not None and is_fault(error):
            self._fault = error
            self._store.has_new_jobs.set()
            return
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
        pause_seconds = _RETRY_SECONDS
        while True:
            try:
                if not await self._do_next(lane, chat_id):
                    return
                pause_seconds = _RETRY_SECONDS
            except PostponedError:
                self._postponed.add((lane, chat_id))
                return
            except (
                sqlite3.OperationalError
            ) as error:  # the job stays, and is done when there is room
                self._store.report(error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), pause_seconds)
                    self._postponed.add((lane, chat_id))
                    return
                pause_seconds = min(2 * pause_seconds, _MAX_RETRY_SECONDS)

    async def _do_next(self, lane: Lane, chat_id: int) -> bool:
        """Do the oldest job of a lane; false if the lane ends."""
        job = self._store.next_job(chat_id, lane)
        if job is None or (lane == "answers" and self._ending.is_set()):
            return False
        if self._store.is_failing:
            # Nothing is generated or sent that cannot be recorded; equal values would not be written.
            self._store.update_job(job.id, tried=time.time())
        try:
            await self._handlers[lane](job)
            self._store.end_job(job.id)
        except ChatMovedError:
            return False
        except ChatGoneError:
            logger.warning("chat %d is gone or has blocked the bot; its data is deleted", chat_id)
            self._store.forget_chat(chat_id)
            self._store.erase()
        except PostponedError:
            raise
        except Exception as error:  # one failed job must not stop the next ones
            if is_fault(error):
                raise
            await self._failed(job, error)
        return True

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
