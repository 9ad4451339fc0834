"""What the routes that generate share: schemas to options, tickets to texts, cancellation.

Knows the worker and the schemas; nothing of routes.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace

from starlette.requests import Request

from full_stack_transformer.errors import ServiceUnavailableError
from full_stack_transformer.generation.continuation import TextPiece
from full_stack_transformer.generation.engine import FinishReason
from full_stack_transformer.generation.sampling import SamplingParameters
from full_stack_transformer.generation.text_generator import GenerationOptions
from full_stack_transformer.serving.engine_worker import EngineWorker, Ticket
from full_stack_transformer.serving.schemas import CompletionRequest, GeneratedTextsRequest

_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class FinishedText:
    """A whole continuation."""

    text: str
    finish_reason: FinishReason
    num_tokens: int


def options_of(body: GeneratedTextsRequest | CompletionRequest) -> GenerationOptions:
    """What a body asks for, in the generator's words."""
    sampling = SamplingParameters(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        repetition_penalty=body.repetition_penalty,
    )
    if isinstance(body, GeneratedTextsRequest):
        return GenerationOptions(
            max_new_tokens=body.generation_max_len,
            sampling=sampling,
            ignored_words=tuple(body.ignored_words),
            seed=body.seed,
            over_length="clip",
        )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return GenerationOptions(
        max_new_tokens=body.max_tokens, sampling=sampling, stop=tuple(stop), seed=body.seed
    )


@contextlib.contextmanager
def submitted(
    worker: EngineWorker, prompt: str, options: GenerationOptions, num_sequences: int
) -> Iterator[list[Ticket]]:
    """Tickets of `num_sequences` continuations; whatever is unfinished after the body is cancelled."""
    first_seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    requests = []
    for index in range(num_sequences):
        # Seeds wrap around at 2^63, the largest that a body may name.
        seeded = replace(options, seed=(first_seed + index) % 2**63)
        requests.append((worker.token_request(prompt, seeded), seeded))
    tickets = worker.submit(requests)
    try:
        yield tickets
    finally:
        worker.cancel(tickets)


async def wait_for_texts(tickets: list[Ticket], request: Request) -> list[FinishedText]:
    """Whole texts of all tickets; gives up when the client has gone.

    Raises:
        ServiceUnavailableError: the model failed, or nobody waits for the answer any more.
    """
    gathering = asyncio.gather(*(_wait_for_text(ticket) for ticket in tickets))
    try:
        while not gathering.done():
            # Handlers that do not stream are not cancelled by a client that goes away.
            await asyncio.wait({gathering}, timeout=_SECONDS_BETWEEN_LOOKS)
            if not gathering.done() and await request.is_disconnected():
                raise ServiceUnavailableError("the client has gone")
    finally:
        gathering.cancel()
    return gathering.result()


async def _wait_for_text(ticket: Ticket) -> FinishedText:
    text = ""
    async for piece in ticket.read():
        text += piece.text
        if piece.finish_reason is not None:
            return FinishedText(text, _checked(piece), ticket.continuation.num_tokens)
    raise AssertionError("a ticket ends with a finish reason")


async def merged_pieces(tickets: list[Ticket]) -> AsyncIterator[tuple[int, TextPiece]]:
    """Pieces of all tickets as they arrive, with the number of their ticket."""
    arriving: asyncio.Queue[tuple[int, TextPiece]] = asyncio.Queue()

    async def forward(index: int, ticket: Ticket) -> None:
        async for piece in ticket.read():
            await arriving.put((index, piece))

    forwarders = [asyncio.create_task(forward(*numbered)) for numbered in enumerate(tickets)]
    try:
        num_open = len(tickets)
        while num_open:
            index, piece = await arriving.get()
            num_open -= piece.finish_reason is not None
            _checked(piece)
            yield index, piece
    finally:
        for forwarder in forwarders:
            forwarder.cancel()


def _checked(piece: TextPiece) -> FinishReason:
    if piece.finish_reason == "error":
        raise ServiceUnavailableError("the model failed on this request")
    return piece.finish_reason or "length"
