"""The worker without HTTP: the queue, deadlines, cancelling, the end."""

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.errors import RequestError, ServiceBusyError, ServiceUnavailableError
from full_stack_transformer.generation.requests import Continuation, Piece
from full_stack_transformer.generation.token_requests import TokenRequest
from full_stack_transformer.serving.workers.engine_worker import (
    EngineWorker,
    Mailbox,
    Ticket,
)
from full_stack_transformer.serving.workers.opening import OpeningOptions, open_served
from full_stack_transformer.serving.workers.served import ServedModel
from tests.serving.tiny_model import one_core

SLOTS, QUEUE = 2, 3


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ServedModel:
    with one_core():
        served = open_served(None, model_dir, OpeningOptions("cpu", SLOTS, "auto", None))
    assert isinstance(served, ServedModel)
    return served


@pytest.fixture
def worker() -> Iterator[EngineWorker]:
    worker = EngineWorker(max_queue_size=QUEUE)
    yield worker
    worker.stop()


class Gate:
    """Holds up the engine before each token of a request, until it is opened."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)

    def forbids(self, token_ids: Sequence[int]) -> bool:
        """Forbids nothing; waits."""
        return not self._permits.acquire(timeout=60)

    def open(self, num_tokens: int = 10_000) -> None:
        """Let so many tokens be made."""
        self._permits.release(num_tokens)


def _ticket(
    model: ServedModel,
    mailbox: Mailbox,
    num_tokens: int = 100,
    seconds: float = 600,
    gate: Gate | None = None,
) -> Ticket:
    forbids = None if gate is None else gate.forbids
    sampling = SamplingParameters(max_new_tokens=num_tokens, seed=1)
    request = TokenRequest([1, 5, 6], sampling, forbids=forbids)
    continuation = Continuation(model.tokenizer, ())
    deadline = time.monotonic() + seconds
    return Ticket(model.name, model.engine, request, continuation, mailbox, 0, deadline)


def _run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(bounded())


async def _last(mailbox: Mailbox) -> Piece:
    while True:
        for _, piece in await mailbox.take():
            if piece.finish_reason is not None:
                return piece


def test_a_full_queue_refuses_all_or_nothing(model: ServedModel, worker: EngineWorker) -> None:
    async def work() -> None:
        mailbox, gate = Mailbox(), Gate()
        tickets = [_ticket(model, mailbox, gate=gate) for _ in range(SLOTS + QUEUE - 1)]
        worker.submit(tickets)
        with pytest.raises(ServiceBusyError) as refused:
            worker.submit([_ticket(model, mailbox), _ticket(model, mailbox)])
        assert refused.value.retry_after_seconds >= 1
        worker.submit([_ticket(model, mailbox)])
        with pytest.raises(RequestError, match="at most 5"):
            worker.check_room(model.engine, SLOTS + QUEUE + 1)
        gate.open()
        worker.cancel(tickets)

    _run(work)


def test_a_cancelled_continuation_frees_its_slot_within_two_tokens(
    model: ServedModel, worker: EngineWorker
) -> None:
    async def work() -> None:
        mailbox, other, gate = Mailbox(), Mailbox(), Gate()
        ticket = _ticket(model, mailbox, gate=gate)
        worker.submit([ticket, _ticket(model, other)])
        gate.open(1)
        await mailbox.take()
        worker.cancel([ticket])
        gate.open()
        assert (await _last(other)).finish_reason == "length"
        # One step may be under way, and a step may confirm eight guesses.
        assert ticket.continuation.num_tokens <= 1 + 9
        assert worker.num_running == 0

    _run(work)


def test_a_cancelled_one_in_the_queue_touches_nobody(
    model: ServedModel, worker: EngineWorker
) -> None:
    async def work() -> None:
        mailboxes, gate = [Mailbox() for _ in range(SLOTS + 2)], Gate()
        tickets = [_ticket(model, mailbox, 40, gate=gate) for mailbox in mailboxes]
        worker.submit(tickets)
        worker.cancel([tickets[-2]])
        gate.open()
        texts = [await _last(mailboxes[number]) for number in (0, 1, 3)]
        assert {piece.finish_reason for piece in texts} == {"length"}
        assert tickets[-2].times.started == 0

    _run(work)


def test_what_takes_too_long_ends_with_a_reason(model: ServedModel, worker: EngineWorker) -> None:
    async def work() -> None:
        mailboxes, gate = [Mailbox() for _ in range(SLOTS + 1)], Gate()
        tickets = [_ticket(model, mailbox, 100, 0.02, gate) for mailbox in mailboxes]
        worker.submit(tickets)
        while time.monotonic() < tickets[-1].deadline:
            await asyncio.sleep(0.01)
        gate.open()
        for mailbox in mailboxes:
            piece = await _last(mailbox)
            assert piece.finish_reason == "error"
            assert "longer than the service allows" in str(piece.problem)
        assert worker.num_running == worker.num_waiting == 0

    _run(work)


def test_at_the_end_running_ones_finish_and_late_ones_are_told(model: ServedModel) -> None:
    async def work() -> None:
        worker = EngineWorker(max_queue_size=QUEUE)
        mailbox = Mailbox()
        worker.submit([_ticket(model, mailbox, 10)])
        worker.drain(60)
        with pytest.raises(ServiceUnavailableError, match="stopping"):
            worker.submit([_ticket(model, mailbox)])
        assert (await _last(mailbox)).finish_reason == "length"
        worker.stop()
        worker, gate = EngineWorker(max_queue_size=QUEUE), Gate()
        worker.submit([_ticket(model, mailbox, gate=gate) for _ in range(SLOTS + 1)])
        worker.drain(0)
        gate.open()
        worker.stop()
        assert "stopping" in str((await _last(mailbox)).problem)

    _run(work)


def test_a_broken_step_ends_its_requests_and_no_others(
    model: ServedModel, worker: EngineWorker, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(token_ids: object) -> bool:
        raise ZeroDivisionError

    async def work() -> None:
        mailbox, later = Mailbox(), Mailbox()
        broken = _ticket(model, mailbox)
        object.__setattr__(broken.request, "forbids", explode)
        worker.submit([broken])
        assert "failed" in str((await _last(mailbox)).problem)
        worker.submit([_ticket(model, later, 3)])
        assert (await _last(later)).finish_reason == "length"

    _run(work)
    assert "a request failed and is ended" in caplog.text


def test_a_broken_reading_ends_its_request_and_no_other(
    model: ServedModel, worker: EngineWorker, caplog: pytest.LogCaptureFixture
) -> None:
    async def read(*ids: Any) -> list[Tensor]:
        return await worker.hidden_states(model.name, model.engine, [ids], math.inf)

    async def work() -> None:
        mailbox = Mailbox()
        worker.submit([_ticket(model, mailbox, 5)])
        with pytest.raises(ServiceUnavailableError, match="failed"):
            await read("no token id")
        assert (await _last(mailbox)).finish_reason == "length"
        [states] = await read(1, 2, 3)
        assert len(states) == 3

    _run(work)
    assert "reading for hidden states failed" in caplog.text


def test_many_texts_of_one_client_leave_room_for_others(
    model: ServedModel, worker: EngineWorker
) -> None:
    async def work() -> None:
        gate, mailbox = Gate(), Mailbox()

        def submit(client: str, number: int) -> list[Ticket]:
            tickets = [_ticket(model, mailbox, 2, gate=gate) for _ in range(number)]
            for ticket in tickets:
                ticket.client = client
            worker.submit(tickets)
            return tickets

        greedy = submit("greedy", SLOTS + QUEUE)
        with pytest.raises(ServiceBusyError, match="more than your share"):
            submit("greedy", 1)
        while worker.num_running < SLOTS:
            await asyncio.sleep(0.01)
        # Three of six places are left: one client may have half of them, and a newcomer one.
        others = submit("second", 2)
        with pytest.raises(ServiceBusyError, match="of them others'"):
            submit("second", 1)
        others += submit("third", 1)
        gate.open()
        num_open = len(greedy) + len(others)
        while num_open:
            num_open -= sum(piece.finish_reason is not None for _, piece in await mailbox.take())
        # The slots that become free are the others' first, although they came later.
        first_of_others = max(others[0].times.started, others[2].times.started)
        assert first_of_others <= min(ticket.times.started for ticket in greedy[SLOTS:])

    _run(work)
