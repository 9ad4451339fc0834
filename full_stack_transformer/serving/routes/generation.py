"""What the routes that generate share: bodies to continuations in the queue, pieces back, cancellation.

    body --token_requests--> Exchange --pieces--> answer

Knows the worker and the schemas; nothing of routes.
"""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from full_stack_transformer.errors import RequestError
from full_stack_transformer.generation.continuation import Continuation
from full_stack_transformer.generation.engine import FinishReason, TokenRequest
from full_stack_transformer.generation.sampling import SamplingParameters, ScoredToken
from full_stack_transformer.generation.text_generator import GenerationOptions, as_token_request
from full_stack_transformer.serving.http.bodies import InvalidBodyError
from full_stack_transformer.serving.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    GeneratedTextsRequest,
)
from full_stack_transformer.serving.workers.engine_worker import (
    EngineWorker,
    Mailbox,
    Piece,
    Ticket,
)
from full_stack_transformer.serving.workers.models import ServedModel

# Shorter texts are tokenized at once: a hop to another thread would take longer.
_MAX_CHARACTERS_AT_ONCE = 4096
# No token spells more, however the tokenizer was trained; so a longer prompt never fits.
_MAX_CHARACTERS_OF_TOKEN = 256
_MAX_RANDOM_SEED = 2**32
_MAX_TICKETS = 128


_Answer = TypeVar("_Answer")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Wanted:
    """One continuation that is wanted."""

    request: TokenRequest
    stops: tuple[str, ...] = ()
    strips_start: bool = False
    """Leave out white space before the first word."""


@dataclass
class FinishedText:
    """A whole continuation."""

    text: str = ""
    finish_reason: FinishReason | None = None
    num_tokens: int = 0
    scored: list[ScoredToken] = field(default_factory=list)
    scored_prompt: list[ScoredToken] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Take in what comes next.

        Raises:
            FullStackTransformerError: the piece says that the continuation failed.
        """
        if piece.problem is not None:
            raise piece.problem
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        self.num_tokens += piece.num_tokens
        self.scored += piece.scored
        self.scored_prompt += piece.scored_prompt


class Exchange:
    """The continuations of one HTTP request, in the queue or on their way."""

    def __init__(self, worker: EngineWorker, tickets: list[Ticket], mailbox: Mailbox) -> None:
        self.tickets = tickets
        self.num_prompt_tokens = 0
        self._worker = worker
        self._mailbox = mailbox

    async def take(self) -> list[tuple[int, Piece]]:
        """Pieces that have arrived, with the numbers of their continuations; at least one."""
        return await self._mailbox.take()

    def close(self) -> None:
        """Cancel what is unfinished."""
        self._worker.cancel(self.tickets)


@contextlib.contextmanager
def submitted(request: Request, model: ServedModel, wanted: Sequence[Wanted]) -> Iterator[Exchange]:
    """Continuations in the queue; whatever is unfinished after the body is cancelled."""
    exchange = submit(request, model, wanted)
    try:
        yield exchange
    finally:
        exchange.close()


def submit(request: Request, model: ServedModel, wanted: Sequence[Wanted]) -> Exchange:
    """Queue continuations; who calls closes the exchange.

    Raises:
        RequestError: one of them can never be generated.
        ServiceUnavailableError: the queue is full or the service is stopping.
    """
    state = request.app.state
    for one in wanted:
        model.engine.check(one.request)
    mailbox = Mailbox()
    deadline = time.monotonic() + state.request_timeout_seconds
    tickets = [
        Ticket(
            model_name=model.name,
            engine=model.engine,
            request=one.request,
            continuation=Continuation(model.tokenizer, one.stops),
            mailbox=mailbox,
            number=number,
            deadline=deadline,
        )
        for number, one in enumerate(wanted)
    ]
    state.worker.submit(tickets)
    exchange = Exchange(state.worker, tickets, mailbox)
    request.state.facts.tickets = tickets
    return exchange


async def encode(model: ServedModel, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt; long ones beside the event loop.

    Raises:
        RequestError: it can never fit into the context.
    """
    if not isinstance(prompt, str):
        return list(prompt)
    most = model.engine.max_length * _MAX_CHARACTERS_OF_TOKEN
    if len(prompt) > most:
        raise RequestError(
            f"the model's context is {model.engine.max_length} tokens, but the prompt has "
            f"{len(prompt):,} characters; shorten it"
        )
    if len(prompt) <= _MAX_CHARACTERS_AT_ONCE:
        return model.tokenizer.encode_prompt(prompt)
    return await asyncio.to_thread(model.tokenizer.encode_prompt, prompt)


def options_of_texts(body: GeneratedTextsRequest) -> GenerationOptions:
    """What the native route asks for, in the generator's words."""
    return GenerationOptions(
        max_new_tokens=body.generation_max_len,
        sampling=SamplingParameters(
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            repetition_penalty=body.repetition_penalty,
        ),
        ignored_words=tuple(body.ignored_words),
        seed=body.seed,
        over_length="clip",
    )


def options_of_openai(
    body: CompletionRequest | ChatCompletionRequest,
    max_new_tokens: int,
    num_log_probabilities: int | None,
) -> GenerationOptions:
    """What OpenAI's routes ask for, in the generator's words."""
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(body.min_tokens, max_new_tokens),
        sampling=SamplingParameters(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k,
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p,
            typical_p=body.typical_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias={int(key): value for key, value in (body.logit_bias or {}).items()},
        ),
        ignored_words=tuple(body.ignored_words),
        num_log_probabilities=num_log_probabilities,
        seed=body.seed,
    )


def token_requests(
    model: ServedModel, prompt_ids: Sequence[int], options: GenerationOptions, num_sequences: int
) -> list[TokenRequest]:
    """Requests of `num_sequences` continuations of one prompt; the second has the seed after the first's."""
    first_seed = secrets.randbelow(_MAX_RANDOM_SEED) if options.seed is None else options.seed
    one = as_token_request(
        prompt_ids,
        options,
        model.tokenizer,
        end_ids=model.end_ids,
        max_length=model.engine.max_length,
    )
    # Seeds wrap around at 2^63, the largest that a body may name.
    return [
        dataclasses.replace(one, seed=(first_seed + index) % 2**63)
        for index in range(num_sequences)
    ]


def check_room(request: Request, model: ServedModel, num_tickets: int) -> None:
    """Refuse early what is not taken now.

    Raises:
        RequestError, ServiceUnavailableError: see `EngineWorker.check_room`.
    """
    if num_tickets > _MAX_TICKETS:
        raise InvalidBodyError(
            f"at most {_MAX_TICKETS} texts are generated for one request, {num_tickets} were asked for"
        )
    request.app.state.worker.check_room(model.engine, num_tickets)


async def wait_for_texts(exchange: Exchange, request: Request) -> list[FinishedText]:
    """Whole texts of all continuations.

    Raises:
        ClientGoneError: nobody waits for the answer any more.
        FullStackTransformerError: one of them failed.
    """
    texts = [FinishedText() for _ in exchange.tickets]

    async def collect() -> None:
        while any(text.finish_reason is None for text in texts):
            for number, piece in await exchange.take():
                texts[number].add(piece)

    await unless_gone(request.receive, collect())
    return texts


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _Answer]) -> _Answer:
    """What `work` gives; it is cancelled when the client goes away.

    Handlers that do not stream are not cancelled by themselves, so the connection is watched here.

    Raises:
        ClientGoneError: the client has gone.
    """
    working = asyncio.ensure_future(work)
    # The body has been read, so the next message is that of the end.
    watching = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
