"""The one thread that computes models of other tasks: a bounded queue in front, rows in, predictions out.

    handlers --predict--> queue --> thread: rows of all who wait for one model, together --> futures

A request with more rows than a batch is computed a batch at a time, and between two of them others have their
turn; only one such request is under way at once, because what was computed of it takes memory. Knows nothing
of HTTP.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from full_stack_transformer.errors import (
    RequestError,
    RowError,
    ServiceUnavailableError,
)
from full_stack_transformer.serving.workers.thread import WorkerThread, check_share, settle
from full_stack_transformer.tasks.opening import OpenedTask
from full_stack_transformer.tasks.task import Prediction

logger = logging.getLogger(__name__)

# Rows that are computed together.
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
    client: str
    predictions: list[Prediction] = field(default_factory=list)
    """Of its first rows."""
    num_tokens: int = 0

    @property
    def is_large(self) -> bool:
        """Whether it takes more than one batch."""
        return len(self.rows) > MAX_BATCH_ROWS

    @property
    def next_rows(self) -> Sequence[Mapping[str, Any]]:
        """Those of its next batch."""
        return self.rows[len(self.predictions) :][:MAX_BATCH_ROWS]


class TaskWorker(WorkerThread):
    """Owns the thread; every method may be called from the event loop.

    Args:
        max_queue_size: requests that may wait for one client.
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
        # Clients that wait and have been served, the one whose turn was last at the end.
        self._served: list[str] = []
        self._was_large = False
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that are computed now."""
        return self._num_running

    def check_room(self, client: str = "") -> None:
        """Refuse what would not be taken now.

        Raises:
            ServiceBusyError: the client's share of the queue is full.
            ServiceUnavailableError: the service is stopping.
        """
        self.check_is_taking()
        waiting = [job.client for job in tuple(self._waiting)]
        num_own = waiting.count(client)
        check_share(
            *(num_own + 1, len(waiting) - num_own),
            max_own=self._max_queue_size,
            seconds=len(waiting) * self._seconds_per_batch,
        )

    async def predict(
        self,
        model_name: str,
        opened: OpenedTask,
        rows: Sequence[Mapping[str, Any]],
        deadline: float,
        *,
        client: str = "",
    ) -> Predicted:
        """The predictions for some rows; a caller that is cancelled takes them out of the queue.

        Args:
            model_name: for the metrics.
            opened: what computes.
            rows: as the task wants them.
            deadline: by time.monotonic().
            client: who asks.

        Raises:
            RequestError: a row does not fit the task.
            ServiceBusyError, ServiceUnavailableError: as `check_room`, or it took too long, or failed.
        """
        answer: asyncio.Future[Predicted] = asyncio.get_running_loop().create_future()
        job = _Job(model_name, opened, rows, answer, deadline, client)
        with self._wake:
            self.check_room(client)
            self._waiting.append(job)
            self._wake.notify()
        return await job.answer

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            batch = self._take_batch()
            if batch is None:
                return
            started, num_rows = time.monotonic(), sum(len(job.next_rows) for job in batch)
            self._compute(batch)
            seconds = time.monotonic() - started
            self._seconds_per_batch += 0.1 * (seconds - self._seconds_per_batch)
            self._num_running = 0
            self._on_batch(batch[0].model_name, num_rows, seconds)

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
            first = self._next_job()
            self._waiting.remove(first)
            batch, num_rows, passed = [first], len(first.next_rows), deque[_Job]()
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

    def _next_job(self) -> _Job:
        """Large requests and small ones by turns, and the clients of each by turns."""
        large = [job for job in self._waiting if job.is_large]
        small = [job for job in self._waiting if not job.is_large]
        self._was_large = bool(large) and not (small and self._was_large)
        begun = [job for job in large if job.predictions]
        job = min((begun or large) if self._was_large else small, key=self._turn)
        waiting = {job.client for job in self._waiting} - {job.client}
        self._served = [*(one for one in self._served if one in waiting), job.client]
        return job

    def _turn(self, job: _Job) -> int:
        """How lately the client was served; 0 for never."""
        return 1 + self._served.index(job.client) if job.client in self._served else 0

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
        rows = [row for job in batch for row in job.next_rows]
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
            self._give(batch, predictions, num_tokens)

    def _give(
        self, batch: Iterable[_Job], predictions: list[Prediction], num_tokens: list[int]
    ) -> None:
        """Hand out what was computed; a large request goes on waiting until all of it is."""
        first = 0
        for job in batch:
            some = slice(first, first + len(job.next_rows))
            first = some.stop
            job.predictions += predictions[some]
            job.num_tokens += sum(num_tokens[some])
            if len(job.predictions) == len(job.rows):
                settle(job.answer, Predicted(job.predictions, job.num_tokens))
            else:
                with self._wake:
                    self._waiting.appendleft(job)
