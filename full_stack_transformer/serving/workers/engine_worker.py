"""The one thread that owns the engines: a bounded queue in front, pieces of text out to asyncio.

    handlers --submit--> queue --> thread: add, step, cancel --one call_soon_threadsafe a step--> mailboxes

One thread steps the engines of all models in turn: they share the device. Knows nothing of HTTP.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from full_stack_transformer.errors import (
    FullStackTransformerError,
    RequestError,
    ServiceError,
    ServiceUnavailableError,
)
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.requests import Continuation, Piece
from full_stack_transformer.generation.token_requests import TokenEvent, TokenRequest
from full_stack_transformer.serving.workers.thread import WorkerThread, call_on, check_share, settle

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_MODEL_FAILED = "the model failed on this request"


class Mailbox:
    """Pieces of the continuations of one HTTP request, with their indices; read on the event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._arrived: list[tuple[int, Piece]] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, number: int, piece: Piece) -> None:
        """Called on the event loop."""
        self._arrived.append((number, piece))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[tuple[int, Piece]]:
        """What has arrived since the last time, at least one piece; for one reader."""
        if not self._arrived:
            self._waiter = self.loop.create_future()
            await self._waiter
        arrived, self._arrived = self._arrived, []
        return arrived


@dataclass
class Times:
    """When things happened to a continuation, by time.monotonic(); 0 before they did."""

    submitted: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0


@dataclass(eq=False)
class Ticket:
    """One continuation on its way through the worker."""

    model_name: str
    engine: Engine
    request: TokenRequest
    continuation: Continuation
    mailbox: Mailbox
    number: int
    deadline: float
    """By time.monotonic()."""
    client: str = ""
    """Who asks: clients share the queue."""
    times: Times = field(default_factory=Times)
    is_cancelled: bool = False


@dataclass(eq=False)
class _Reading:
    """Sequences whose hidden states are wanted, one after the other."""

    model_name: str
    engine: Engine
    sequences: list[Sequence[int]]
    answer: "asyncio.Future[list[Tensor]]"
    deadline: float
    client: str
    summarize: Callable[[Sequence[int], Tensor], Tensor]
    shares_with: str | None
    adapter: int
    states: list[Tensor] = field(default_factory=list)


class EngineWorker(WorkerThread):
    """Owns the thread; every method may be called from the event loop.

    Args:
        max_queue_size: continuations of one model that may wait for one client.
        on_piece: told of each piece on the event loop, before it is read; for metrics.
    """

    def __init__(
        self,
        *,
        max_queue_size: int,
        on_piece: Callable[[Ticket, Piece], None] = lambda ticket, piece: None,
    ) -> None:
        super().__init__("engine")
        self._max_queue_size = max_queue_size
        self._on_piece = on_piece
        self._waiting: deque[Ticket] = deque()
        self._readings: deque[_Reading] = deque()
        # The sequence that an engine reads now, by its id there.
        self._read_now: dict[Engine, tuple[int, _Reading]] = {}
        self._running: dict[tuple[Engine, int], Ticket] = {}
        self._errands: deque[Callable[[], None]] = deque()
        # Adapters that nothing new is asked of.
        self._retired: list[tuple[Engine, int]] = []
        self._seconds_per_ticket = 1.0
        # Clients that wait and have had something started, the latest at the end.
        self._starts: list[str] = []
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Continuations that wait for a slot."""
        return len(self._waiting) + len(self._readings)

    @property
    def num_running(self) -> int:
        """Continuations in slots."""
        return len(self._running)

    def count(self, model_name: str) -> tuple[int, int]:
        """Continuations of a model in slots, and what waits for one."""
        running = tuple(self._running.values())
        waiting = [one.model_name for one in tuple(self._waiting)]
        waiting += [one.model_name for one in tuple(self._readings)]
        return [one.model_name for one in running].count(model_name), waiting.count(model_name)

    def check_room(self, engine: Engine, num_tickets: int, client: str = "") -> None:
        """Refuse what would not be taken now; cheap, for before the work of tokenizing.

        Raises:
            RequestError: this many are never taken at once.
            ServiceBusyError: the client's share of the queue is full.
            ServiceUnavailableError: the service is stopping.
        """
        self.check_is_taking()
        most = self._max_queue_size + engine.num_slots
        if num_tickets > most:
            raise RequestError(
                f"at most {most} texts can be generated at once, found {num_tickets}"
            )
        waiting = [one.client for one in tuple(self._waiting) if one.engine is engine]
        waiting += [one.client for one in tuple(self._readings)]
        num_running = sum(1 for key in tuple(self._running) if key[0] is engine)
        num_own, num_free = waiting.count(client), max(0, engine.num_slots - num_running)
        check_share(
            max(0, num_own + num_tickets - num_free),
            len(waiting) - num_own,
            max_own=self._max_queue_size,
            seconds=max(1, len(waiting)) / engine.num_slots * self._seconds_per_ticket,
        )

    def submit(self, tickets: list[Ticket]) -> None:
        """Queue continuations of one model, all of them or none.

        Raises:
            ServiceBusyError, ServiceUnavailableError, RequestError: as `check_room`.
        """
        now = time.monotonic()
        with self._wake:
            self.check_room(tickets[0].engine, len(tickets), tickets[0].client)
            for ticket in tickets:
                ticket.times.submitted = now
            self._waiting.extend(tickets)
            self._wake.notify()

    async def hidden_states(
        self,
        model_name: str,
        engine: Engine,
        sequences: list[Sequence[int]],
        deadline: float,
        *,
        client: str = "",
        summarize: Callable[[Sequence[int], Tensor], Tensor] = lambda ids, states: states,
        shares_with: str | None = None,
        adapter: int = 0,
    ) -> list[Tensor]:
        """What the model makes of each token of each sequence, (tokens, hidden).

        Args:
            model_name: for the metrics.
            engine: that reads.
            sequences: token ids.
            deadline: by time.monotonic().
            client: who asks.
            summarize: what to keep of a sequence, out of its ids and states: all states of many are large.
            shares_with: as in `TokenRequest`.
            adapter: as there.

        Raises:
            ServiceBusyError, ServiceUnavailableError, RequestError: as `check_room`, or the model failed.
        """
        answer: asyncio.Future[list[Tensor]] = asyncio.get_running_loop().create_future()
        reading = _Reading(
            *(model_name, engine, sequences, answer, deadline, client, summarize, shares_with),
            adapter=adapter,
        )
        with self._wake:
            self.check_room(engine, 1, client)
            self._readings.append(reading)
            self._wake.notify()
        return await answer

    def cancel(self, tickets: list[Ticket]) -> None:
        """End continuations nobody waits for: those in slots before the next step."""
        with self._wake:
            for ticket in tickets:
                ticket.is_cancelled = True
            waiting = [ticket for ticket in self._waiting if not ticket.is_cancelled]
            if len(waiting) < len(self._waiting):
                self._waiting = deque(waiting)
            self._wake.notify()

    async def between_steps(self, call: Callable[[], _Result]) -> _Result:
        """What `call` returns, in the thread that owns the engines; it should be short.

        Raises:
            ServiceUnavailableError: the service is stopping.
            Exception: that of the call.
        """
        answer: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()

        def errand() -> None:
            try:
                result = call()
            except Exception as error:
                settle(answer, error)
            else:
                settle(answer, result)

        with self._wake:
            self.check_is_taking()
            self._errands.append(errand)
            self._wake.notify()
        return await answer

    def retire(self, engine: Engine, adapter: int) -> None:
        """Remove an adapter of an engine when the last request for it has left the queue.

        The engine keeps it until those in slots have ended. The caller submits no more of them.
        """
        with self._wake:
            self._retired.append((engine, adapter))
            self._wake.notify()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while self._take_in():
            try:
                self._run_errands()
                self._end_readings()
                self._start_readings()
                self._step()
            except Exception:
                # What is broken here must not leave every later client waiting forever.
                logger.exception("a generation step failed; all requests are ended")
                self._end_all(ServiceUnavailableError(_MODEL_FAILED))
                for reading in tuple(self._readings):
                    self._finish_reading(reading, ServiceUnavailableError(_MODEL_FAILED))

    def _take_in(self) -> bool:
        """Wait for work, end what is cancelled or late, fill free slots; false when it is time to leave."""
        late: list[Ticket] = []
        with self._wake:
            while not (
                self._waiting or self._running or self._readings or self._errands or self._retired
            ):
                if self._is_stopping:
                    return False
                self._wake.wait()
            for key in [key for key, ticket in self._running.items() if ticket.is_cancelled]:
                self._release(key)
            now = time.monotonic()
            if now >= self._stop_at:
                late = list(self._waiting)
                self._waiting.clear()
            elif self._waiting and min(ticket.deadline for ticket in self._waiting) <= now:
                late = [ticket for ticket in self._waiting if ticket.deadline <= now]
                self._waiting = deque(ticket for ticket in self._waiting if ticket.deadline > now)
            self._fill_slots(now)
        if now >= self._stop_at:
            self._end_all(ServiceUnavailableError("the service is stopping"), late)
            return True
        self._end_late(now, late)
        return True

    def _run_errands(self) -> None:
        """What others want between two steps, and the end of adapters that nothing waits for."""
        while self._errands:
            self._errands.popleft()()
        if not self._retired:
            return
        with self._wake:
            needed = {(one.engine, one.request.adapter) for one in self._waiting}
            needed |= {(one.engine, one.adapter) for one in self._readings}
            free = [one for one in self._retired if one not in needed]
            self._retired = [one for one in self._retired if one in needed]
        for engine, adapter in free:
            engine.remove_adapter(adapter)

    def _fill_slots(self, now: float) -> None:
        """Start what waits: of the client with the fewest in slots, or whose last start is longest ago."""
        waiting = {one.client for one in self._waiting}
        self._starts = [one for one in self._starts if one in waiting]
        while True:
            running = Counter((key[0], one.client) for key, one in self._running.items())
            # One slot is left for hidden states.
            kept = {one.engine for one in self._readings if one.engine.num_slots > 1}
            kept -= self._read_now.keys()
            turns = {client: turn for turn, client in enumerate(self._starts)}
            ticket = min(
                (one for one in self._waiting if one.engine.num_free_slots > (one.engine in kept)),
                key=lambda one: (running[one.engine, one.client], turns.get(one.client, -1)),
                default=None,
            )
            if ticket is None:
                return
            self._waiting.remove(ticket)
            self._starts = [*(one for one in self._starts if one != ticket.client), ticket.client]
            ticket.times.started = now
            try:
                self._running[ticket.engine, ticket.engine.add(ticket.request)] = ticket
            except Exception as error:
                self._deliver([(ticket, _ended_by(error))])

    def _end_late(self, now: float, late: list[Ticket]) -> None:
        for key in [key for key, ticket in self._running.items() if ticket.deadline <= now]:
            late.append(self._running[key])
            self._release(key)
        if late:
            problem = ServiceUnavailableError("the request took longer than the service allows")
            self._deliver([(ticket, Piece("", "error", problem=problem)) for ticket in late])

    def _end_readings(self) -> None:
        """Let go of what nobody waits for any more, or waits too long."""
        now = time.monotonic()
        for reading in tuple(self._readings):
            if reading.answer.cancelled() or now >= min(reading.deadline, self._stop_at):
                problem = ServiceUnavailableError(
                    "the service is stopping or the request took too long"
                )
                self._finish_reading(reading, problem)

    def _start_readings(self) -> None:
        """Let each engine with a free slot read a sequence for hidden states; requests take turns."""
        for reading in tuple(self._readings):
            engine = reading.engine
            if engine in self._read_now or not engine.num_free_slots:
                continue
            sequence = reading.sequences[len(reading.states)]
            try:
                request = TokenRequest.for_hidden_states(
                    sequence, reading.shares_with, reading.adapter
                )
                self._read_now[engine] = (engine.add(request), reading)
            except Exception as error:
                self._fail_reading(reading, error)

    def _note_states(self, reading: _Reading, event: TokenEvent) -> None:
        """What the end of a sequence means for its request."""
        del self._read_now[reading.engine]
        if event.problem is not None:
            self._fail_reading(reading, event.problem)
            return
        sequence, states = reading.sequences[len(reading.states)], event.hidden_states
        assert states is not None
        try:
            reading.states.append(reading.summarize(sequence, states))
        except Exception as error:
            self._fail_reading(reading, error)
            return
        if len(reading.states) == len(reading.sequences):
            self._finish_reading(reading, None)
        else:
            self._readings.remove(reading)
            self._readings.append(reading)

    def _fail_reading(self, reading: _Reading, error: Exception) -> None:
        # Left where it is, it would be tried again forever.
        if not isinstance(error, FullStackTransformerError):
            logger.error("reading for hidden states failed; its request is ended", exc_info=error)
        self._finish_reading(reading, _problem_of(error))

    def _finish_reading(self, reading: _Reading, problem: Exception | None) -> None:
        under_way = self._read_now.get(reading.engine)
        if under_way is not None and under_way[1] is reading:
            reading.engine.cancel(under_way[0])
            del self._read_now[reading.engine]
        self._readings.remove(reading)
        settle(reading.answer, reading.states if problem is None else problem)

    def _step(self) -> None:
        deliveries: list[tuple[Ticket, Piece]] = []
        for engine in dict.fromkeys([*(engine for engine, _ in self._running), *self._read_now]):
            try:
                events = engine.step()
            except Exception as error:  # the engines of other models go on
                deliveries += self._end_broken(engine, error)
                continue
            by_request: dict[int, list[TokenEvent]] = {}
            for event in events:
                by_request.setdefault(event.request_id, []).append(event)
            if engine in self._read_now:
                key, reading = self._read_now[engine]
                for event in by_request.pop(key, ()):
                    self._note_states(reading, event)
            deliveries += [self._piece((engine, key), some) for key, some in by_request.items()]
        if deliveries:
            self._deliver(deliveries)

    def _end_broken(self, engine: Engine, error: Exception) -> list[tuple[Ticket, Piece]]:
        """The end of all that an engine does, whose step has failed."""
        those = {key: one for key, one in self._running.items() if key[0] is engine}
        for key in those:
            self._release(key)
        if engine in self._read_now:
            self._fail_reading(self._read_now[engine][1], error)
        return [(one, _ended_by(error)) for one in those.values()]

    def _piece(self, key: tuple[Engine, int], events: Sequence[TokenEvent]) -> tuple[Ticket, Piece]:
        """What the events of one request add to its text."""
        ticket = self._running[key]
        try:
            piece = ticket.continuation.push(*events)
        except Exception as error:
            piece = _ended_by(error)
        problem = events[-1].problem
        if problem is not None:
            piece = replace(piece, problem=_problem_of(problem))
        if piece.finish_reason is not None:
            self._release(key)
            self._note_end(ticket)
        ticket.times.first_token = ticket.times.first_token or time.monotonic()
        return ticket, piece

    def _note_end(self, ticket: Ticket) -> None:
        ticket.times.ended = time.monotonic()
        taken = ticket.times.ended - ticket.times.started
        self._seconds_per_ticket += 0.1 * (taken - self._seconds_per_ticket)

    def _end_all(self, problem: FullStackTransformerError, others: Sequence[Ticket] = ()) -> None:
        tickets = [*self._running.values(), *others]
        for key in list(self._running):
            self._release(key)
        self._deliver([(ticket, Piece("", "error", problem=problem)) for ticket in tickets])

    def _release(self, key: tuple[Engine, int]) -> None:
        key[0].cancel(key[1])
        del self._running[key]

    def _deliver(self, deliveries: list[tuple[Ticket, Piece]]) -> None:
        """Hand pieces over to the event loops of their readers: one call a loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Piece]]] = {}
        for delivery in deliveries:
            by_loop.setdefault(delivery[0].mailbox.loop, []).append(delivery)
        for loop, some in by_loop.items():
            call_on(loop, lambda some=some: self._put(some))  # type: ignore[misc]

    def _put(self, deliveries: list[tuple[Ticket, Piece]]) -> None:
        for ticket, piece in deliveries:
            self._on_piece(ticket, piece)
            ticket.mailbox.put(ticket.number, piece)


def _ended_by(error: Exception) -> Piece:
    """The end of a continuation that failed."""
    if not isinstance(error, FullStackTransformerError):
        logger.error("a generation step failed; its requests are ended", exc_info=error)
    return Piece("", "error", problem=_problem_of(error))


def _problem_of(error: Exception) -> FullStackTransformerError:
    """What a client is told of an error: what he did wrong, or that the model failed."""
    if isinstance(error, RequestError | ServiceError):
        return error
    if isinstance(error, FullStackTransformerError):
        return ServiceUnavailableError(str(error))
    return ServiceUnavailableError(_MODEL_FAILED)


def describe(tickets: Sequence[Ticket]) -> dict[str, Any]:
    """Sizes and times of the continuations of one HTTP request, for its line in the log."""
    times = [ticket.times for ticket in tickets]
    started = [one.started - one.submitted for one in times if one.started]
    first = [one.first_token - one.submitted for one in times if one.first_token]
    return {
        "model": tickets[0].model_name if tickets else None,
        "seconds_in_queue": round(max(started), 6) if started else None,
        "seconds_to_first_token": round(min(first), 6) if first else None,
        "num_texts": len(times),
        "prompt_tokens": sum(len(ticket.request.prompt_ids) for ticket in tickets),
        "new_tokens": sum(ticket.continuation.num_tokens for ticket in tickets),
    }
