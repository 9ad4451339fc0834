"""The one thread that computes models of other tasks: a bounded queue in front, rows in, predictions out.

    handlers --predict--> queue --> thread: rows of all who wait for one model, together --> futures

Knows nothing of HTTP.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from full_stack_transformer.errors import (
    RequestError,
    RowError,
    ServiceUnavailableError,
)
from full_stack_transformer.serving.workers.thread import WorkerThread, busy, settle
from full_stack_transformer.tasks.opening import OpenedTask
from full_stack_transformer.tasks.task import Prediction

logger = logging.getLogger(__name__)

# Rows that are computed together, unless one request alone has more.
MAX_BATCH_ROWS = 32


@dataclass(frozen=True)
class Predicted:
    """What became of the rows of one request."""

    predictions: list[Prediction]
    num_tokens: int
    """Tokens that the model read."""


@dataclass(eq=False)
class _Job:
    """The rows of one request."""

    model_name: str
    opened: OpenedTask
    rows: Sequence[Mapping[str, Any]]
    answer: "asyncio.Future[Predicted]"
    deadline: float


class TaskWorker(WorkerThread):
    """Owns the thread; every method may be called from the event loop.

    Args:
        max_queue_size: requests that may wait.
        on_batch: told, in the thread, of each batch: the model's name, its rows, the seconds it took.
    """

    def __init__(
        self,
        *,
        max_queue_size: int,
        on_batch: Callable[[str, int, float], None] = lambda name, rows, seconds: None,
    ) -> None:
        super().__init__("tasks")
        self._max_queue_size = max_queue_size
        self._on_batch = on_batch
        self._waiting: deque[_Job] = deque()
        self._num_running = 0
        self._seconds_per_batch = 0.1
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that are computed now."""
        return self._num_running

    def check_room(self) -> None:
        """Refuse what would not be taken now.

        Raises:
            ServiceBusyError: the queue is full.
            ServiceUnavailableError: the service is stopping.
        """
        self.check_is_taking()
        num_ahead = len(self._waiting)
        if num_ahead >= self._max_queue_size:
            raise busy(
                f"{num_ahead} requests are waiting; try again later",
                num_ahead * self._seconds_per_batch,
            )

    async def predict(
        self,
        model_name: str,
        opened: OpenedTask,
        rows: Sequence[Mapping[str, Any]],
        deadline: float,
    ) -> Predicted:
        """The predictions for some rows; a caller that is cancelled takes them out of the queue.

        Args:
            model_name: for the metrics.
            opened: what computes.
            rows: as the task wants them.
            deadline: by time.monotonic().

        Raises:
            RequestError: a row does not fit the task.
            ServiceBusyError, ServiceUnavailableError: as `check_room`, or it took too long, or failed.
        """
        answer: asyncio.Future[Predicted] = asyncio.get_running_loop().create_future()
        job = _Job(model_name, opened, rows, answer, deadline)
        with self._wake:
            self.check_room()
            self._waiting.append(job)
            self._wake.notify()
        return await job.answer

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            batch = self._take_batch()
            if batch is None:
                return
            started = time.monotonic()
            self._compute(batch)
            seconds = time.monotonic() - started
            self._seconds_per_batch += 0.1 * (seconds - self._seconds_per_batch)
            self._num_running = 0
            self._on_batch(batch[0].model_name, sum(len(job.rows) for job in batch), seconds)

    def _take_batch(self) -> list[_Job] | None:
        """The oldest request and those behind it that fit into a batch with it; none at the end."""
        with self._wake:
            while True:
                self._drop_late()
                if self._waiting:
                    break
                if self._is_stopping:
                    return None
                self._wake.wait()
            first = self._waiting.popleft()
            batch, num_rows, passed = [first], len(first.rows), deque[_Job]()
            while self._waiting:
                job = self._waiting.popleft()
                fits = job.opened is first.opened and num_rows + len(job.rows) <= MAX_BATCH_ROWS
                if fits:
                    batch.append(job)
                    num_rows += len(job.rows)
                else:
                    passed.append(job)
            self._waiting = passed
            self._num_running = len(batch)
            return batch

    def _drop_late(self) -> None:
        """End what nobody waits for, what is late, and everything after the end of the service."""
        now = time.monotonic()
        kept = deque[_Job]()
        for job in self._waiting:
            if job.answer.cancelled():
                continue
            if now >= self._stop_at:
                settle(job.answer, ServiceUnavailableError("the service is stopping"))
            elif now >= job.deadline:
                problem = ServiceUnavailableError("the request took longer than the service allows")
                settle(job.answer, problem)
            else:
                kept.append(job)
        self._waiting = kept

    def _compute(self, batch: list[_Job]) -> None:
        task, backbone = batch[0].opened.row_task, batch[0].opened.backbone
        rows = [row for job in batch for row in job.rows]
        try:
            features = task.features(rows)
            predictions = task.predict_features(rows, features, backbone)
        except RowError as error:
            if len(batch) == 1:
                settle(batch[0].answer, RequestError(str(error)))
                return
            for job in batch:  # one row is wrong, and only its sender is to hear of it
                self._compute([job])
        except Exception:
            logger.exception("a batch failed; its requests are ended")
            for job in batch:
                settle(job.answer, ServiceUnavailableError("the model failed on this request"))
        else:
            num_tokens = [0] * len(rows)
            for feature in features:
                num_tokens[feature["row"]] += task.num_tokens(feature)
            first = 0
            for job in batch:
                some = slice(first, first + len(job.rows))
                settle(job.answer, Predicted(predictions[some], sum(num_tokens[some])))
                first += len(job.rows)
