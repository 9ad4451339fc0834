"""What the threads that compute share: how they end, and how answers get back to the event loops."""

import asyncio
import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from full_stack_transformer.errors import ServiceBusyError, ServiceUnavailableError

logger = logging.getLogger(__name__)

_MAX_RETRY_SECONDS = 60
_Result = TypeVar("_Result")


class WorkerThread(ABC):
    """A thread with work to wait for, which can be told to end.

    A subclass starts `_thread` when it is ready.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._wake = threading.Condition()
        self._is_stopping = False
        self._stop_at = math.inf
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_stopping(self) -> bool:
        """Whether nothing new is taken."""
        return self._is_stopping

    def check_is_taking(self) -> None:
        """Refuse what comes too late.

        Raises:
            ServiceUnavailableError: the service is stopping.
        """
        if self._is_stopping:
            raise ServiceUnavailableError("the service is stopping")

    def drain(self, seconds: float) -> None:
        """Take nothing new from now on; what is not finished after `seconds` ends with an error."""
        with self._wake:
            self._is_stopping = True
            self._stop_at = min(self._stop_at, time.monotonic() + seconds)
            self._wake.notify()

    def stop(self) -> None:
        """Drain at once and wait for the thread."""
        self.drain(0)
        self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """What the thread does, to its end."""


def check_share(num_own: int, num_others: int, *, max_own: int, seconds: float) -> None:
    """Refuse what is more than a client's share of a queue, so that nobody shuts the others out.

    A client alone may have `max_own` places. As many again are for others: each may have half of what the
    rest leaves (dynamic thresholds: Choudhury and Hahne 1998), so a newcomer nearly always finds room.

    Args:
        num_own: places that the client would have.
        num_others: places that others have.
        max_own: places of a client alone.
        seconds: until there will be room, about.

    Raises:
        ServiceBusyError: there is no room now.
    """
    if num_own > max(0, 2 * max_own - num_others + 1) // 2:
        whose = f" ({num_others} of them others')" if num_others else ""
        waiting = f"{num_own + num_others} texts or requests would wait{whose}"
        raise busy(f"{waiting}, which is more than your share; try again later", seconds)


def busy(message: str, seconds: float) -> ServiceBusyError:
    """The queue is full, and it will take so long until there is room."""
    return ServiceBusyError(message, min(_MAX_RETRY_SECONDS, max(1, math.ceil(seconds))))


def call_on(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call on the event loop, from another thread; nothing happens where it has ended."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:  # the loop has ended, and with it everybody who waited
        logger.debug("an answer came after the end of the service")


def settle(answer: "asyncio.Future[_Result]", result: _Result | Exception) -> None:
    """Give the answer, or the exception, to whoever still waits for it on the future's event loop."""

    def finish() -> None:
        if answer.done():
            return
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    call_on(answer.get_loop(), finish)
