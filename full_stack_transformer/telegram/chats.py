"""Whose turn it is: one chat's answers in order, different chats at the same time.

Knows neither Telegram nor the service: an answer is something to await.
"""

import asyncio
import logging
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)

Answer = Callable[[], Awaitable[object]]


class Chats:
    """The answers that are owed; use it inside one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Answer]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, chat_id: int, answer: Answer) -> None:
        """Give `answer` after all earlier ones of this chat."""
        if chat_id in self._waiting:
            self._waiting[chat_id].append(answer)
        else:
            self._waiting[chat_id] = deque([answer])
            self._start(self._work(chat_id))

    def submit_aside(self, chat_id: int, answer: Answer) -> None:
        """Give `answer` at once, without waiting for the turn of its chat."""
        self._start(_give(chat_id, answer))

    def num_waiting(self, chat_id: int) -> int:
        """Answers of this chat that wait for their turn."""
        return len(self._waiting.get(chat_id, ()))

    def num_owed(self) -> int:
        """Answers of all chats that wait or are being given."""
        return len(self._tasks) + sum(len(waiting) for waiting in self._waiting.values())

    async def finish(self, max_seconds: float) -> None:
        """Wait until every answer is given, and abandon what is left after `max_seconds`."""
        try:
            async with asyncio.timeout(max_seconds):
                while self._tasks:
                    await asyncio.wait(self._tasks)
        except TimeoutError:
            self.abandon()
            await asyncio.wait(self._tasks)

    def abandon(self) -> None:
        """Give up all answers that are owed."""
        logger.warning("abandoned %d answers", self.num_owed())
        for task in self._tasks:
            task.cancel()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        # The loop refers to tasks weakly: without the set one could vanish in mid-run.
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, chat_id: int) -> None:
        waiting = self._waiting[chat_id]
        try:
            while waiting:
                await _give(chat_id, waiting.popleft())
        finally:
            del self._waiting[chat_id]


async def _give(chat_id: int, answer: Answer) -> None:
    try:
        await answer()
    except Exception as error:  # one failed answer must not take the next ones with it
        logger.error("an answer in chat %d failed: %s", chat_id, without_content(error))


def without_content(error: BaseException) -> str:
    """Type and place of an error; its message stays away, because it may quote what a user wrote."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}\n{frames}".rstrip()
