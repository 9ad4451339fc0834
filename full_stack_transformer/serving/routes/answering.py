"""What the routes that generate share: requests into the queue, pieces back, whole or as a stream.

    body --given parameters, prompt--> TokenRequest --> Exchange --Piece--> answer or server-sent events

Belongs to no route: completions, chats and the native one build on it.
"""

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Self, TypeVar

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from full_stack_transformer.errors import (
    ContextLengthError,
    FullStackTransformerError,
    RequestError,
)
from full_stack_transformer.generation.requests import Continuation, Piece, joined
from full_stack_transformer.generation.token_requests import TokenRequest
from full_stack_transformer.serving.http.bodies import InvalidBodyError
from full_stack_transformer.serving.routes.log_probabilities import ShownTokens
from full_stack_transformer.serving.schemas import (
    ErrorDetail,
    ErrorResponse,
    OpenAIBody,
    ResponseFormat,
)
from full_stack_transformer.serving.workers.constraints import Grammar, any_of, grammar_of
from full_stack_transformer.serving.workers.engine_worker import EngineWorker, Mailbox, Ticket
from full_stack_transformer.serving.workers.served import ServedModel

# Shorter texts are tokenized at once: a hop to another thread would take longer.
_MAX_CHARACTERS_AT_ONCE = 4096
# No token spells more, however the tokenizer was trained; so a longer prompt never fits.
_MAX_CHARACTERS_OF_TOKEN = 256
_MAX_TICKETS = 128

_Answer = TypeVar("_Answer")


class ClientGoneError(Exception):
    """The client has disconnected."""


class Usage(BaseModel):
    """Tokens of prompts and of new texts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


# ---------------------------------------------------------------------- prompts


@contextlib.contextmanager
def naming(field: str, index: int, *, of: int) -> Iterator[None]:
    """Errors inside name the element of a list that they are about."""
    try:
        yield
    except RequestError as error:
        if of == 1:
            raise
        raise type(error)(f"{field}[{index}]: {error}") from None


async def encode(
    model: ServedModel, prompts: Sequence[str | list[int]], field: str
) -> list[list[int]]:
    """Token ids of prompts; long ones are encoded in another thread.

    Args:
        model: that reads them.
        prompts: texts, or token ids already.
        field: of the body, for errors.

    Raises:
        RequestError: one can never fit into the context.
    """
    most = model.engine.max_length * _MAX_CHARACTERS_OF_TOKEN
    num_characters = 0
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            num_characters += len(prompt)
            if len(prompt) > most:
                with naming(field, index, of=len(prompts)):
                    raise ContextLengthError(
                        f"the model's context is {model.engine.max_length} tokens, but the prompt has "
                        f"{len(prompt):,} characters; shorten it"
                    )

    def encode_all() -> list[list[int]]:
        encoded = model.tokenizer.encode_prompt
        return [encoded(one) if isinstance(one, str) else list(one) for one in prompts]

    if num_characters <= _MAX_CHARACTERS_AT_ONCE:
        return encode_all()
    return await asyncio.to_thread(encode_all)


def check_room(request: Request, model: ServedModel, num_texts: int) -> None:
    """Refuse early what is not taken now.

    Raises:
        RequestError, ServiceUnavailableError: see `EngineWorker.check_room`.
    """
    if num_texts > _MAX_TICKETS:
        raise InvalidBodyError(
            f"at most {_MAX_TICKETS} texts can be generated for one request, found {num_texts}"
        )
    facts = request.state.facts
    request.app.state.worker.check_room(model.engine, num_texts, facts.client)


# ---------------------------------------------------------------------- into the queue, and back


class Exchange:
    """The continuations of one HTTP request, in the queue or on their way; leaving it cancels the rest."""

    def __init__(self, worker: EngineWorker, tickets: list[Ticket], mailbox: Mailbox) -> None:
        self.tickets = tickets
        self.held = contextlib.ExitStack()
        """What the continuations need for as long as they go on."""
        self._worker = worker
        self._mailbox = mailbox

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def take(self) -> list[tuple[int, Piece]]:
        """Pieces that have arrived, with the indices of their continuations; at least one."""
        return await self._mailbox.take()

    def close(self) -> None:
        """Cancel what is unfinished, and give back what it needed."""
        self._worker.cancel(self.tickets)
        self.held.close()


def sharing(request: Request) -> str | None:
    """With whom a request shares what has been read, as in `TokenRequest.shares_with`."""
    match request.app.state.prefix_cache:
        case "shared":
            return ""
        case "per_key":
            return request.state.facts.key or ""
        case _:
            return uuid.uuid4().hex


def submit(request: Request, model: ServedModel, wanted: Sequence[TokenRequest]) -> Exchange:
    """Queue continuations; the caller closes the exchange.

    Raises:
        RequestError: one of them can never be generated, or the adapter has been unloaded.
        ServiceUnavailableError: the queue is full or the service is stopping.
    """
    state = request.app.state
    shares_with, adapter = sharing(request), model.adapter_number
    wanted = [dataclasses.replace(one, shares_with=shares_with, adapter=adapter) for one in wanted]
    for one in wanted:
        model.engine.check(one)
    mailbox = Mailbox()
    deadline = time.monotonic() + state.request_timeout_seconds
    tickets = [
        Ticket(
            model_name=model.name,
            engine=model.engine,
            request=one,
            continuation=Continuation(model.tokenizer, one.sampling.stop),
            mailbox=mailbox,
            number=number,
            deadline=deadline,
            client=request.state.facts.client,
        )
        for number, one in enumerate(wanted)
    ]
    state.worker.submit(tickets)
    request.state.facts.tickets = tickets
    return Exchange(state.worker, tickets, mailbox)


async def wait_for_texts(exchange: Exchange, request: Request) -> list[Piece]:
    """Each continuation as a whole.

    Raises:
        ClientGoneError: the client has disconnected.
        FullStackTransformerError: one of them failed.
    """
    pieces: list[list[Piece]] = [[] for _ in exchange.tickets]

    async def collect() -> None:
        num_open = len(pieces)
        while num_open:
            for index, piece in await exchange.take():
                if piece.problem is not None:
                    raise piece.problem
                pieces[index].append(piece)
                num_open -= piece.finish_reason is not None

    await unless_gone(request.receive, collect())
    return [joined(some) for some in pieces]


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _Answer]) -> _Answer:
    """What `work` returns; it is cancelled when the client goes away.

    Handlers that do not stream are not cancelled by themselves, so the connection is watched here.

    Raises:
        ClientGoneError: the client has disconnected.
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


# ---------------------------------------------------------------------- OpenAI's answers


class OpenAIAnswer(ABC):
    """One request on its way to an answer in OpenAI's form; completions and chats derive from it.

    Args:
        body: of the request.
        model: that answers.
        prefix: of the answer's id.
        kind: the answer's `object`.
        chunk_kind: the one of its pieces.
    """

    def __init__(
        self, body: OpenAIBody, model: ServedModel, *, prefix: str, kind: str, chunk_kind: str
    ) -> None:
        if body.includes_usage and not body.stream:
            raise InvalidBodyError("stream_options: only possible with stream", "stream_options")
        self._model = model
        self._stream = bool(body.stream)
        self._format = body.response_format
        self._includes_usage = body.includes_usage
        self._counts_each_piece = body.includes_usage_of_pieces
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": chunk_kind if body.stream else kind,
            "created": int(time.time()),
            "model": model.name,
        }
        self._num_prompt_tokens = 0
        self._num_new_tokens = 0
        self._begun: set[int] = set()
        # Of each continuation: tokens of its prompt and of its text, and its tokens that may be shown.
        self._prompt_lengths: list[int] = []
        self._lengths: Counter[int] = Counter()
        self._shown: dict[int, ShownTokens] = {}

    async def send(
        self, request: Request, wanted: list[TokenRequest], *, num_prompt_tokens: int
    ) -> Response:
        """The answer, streamed or whole.

        Raises:
            RequestError: it can never be given.
            ServiceUnavailableError: not now.
        """
        self._num_prompt_tokens = num_prompt_tokens
        self._prompt_lengths = [len(one.prompt_ids) for one in wanted]
        with contextlib.ExitStack() as until_submitted:
            grammar = await _open_grammar(request, self._model, self._format)
            if grammar is not None:
                until_submitted.callback(request.app.state.grammars.take_back, grammar)
                wanted = [_constrained(one, grammar) for one in wanted]
            exchange = submit(request, self._model, wanted)
            exchange.held = until_submitted.pop_all()
        if self._stream:
            return EventStream(exchange, self._chunk, self._last_chunks)
        with exchange:
            texts = await wait_for_texts(exchange, request)
        texts = [self._with_shown_tokens(*one) for one in enumerate(texts)]
        self._num_new_tokens = sum(text.num_tokens for text in texts)
        return JSONResponse({**self._head, "choices": self.choices(texts), "usage": self._usage()})

    @abstractmethod
    def choices(self, texts: list[Piece]) -> list[dict[str, Any]]:
        """The choices of a whole answer."""

    @abstractmethod
    def streamed_choice(
        self, index: int, text: str, piece: Piece, *, is_first: bool
    ) -> dict[str, Any]:
        """The choice at `index` in a piece of a stream, whose text is `text`."""

    def shown_text(self, index: int, piece: Piece) -> str:
        """The text of a piece that a client sees; asked for once, in the order of the pieces."""
        return piece.text

    def _chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        self._num_new_tokens += piece.num_tokens
        self._lengths[index] += piece.num_tokens
        piece = self._with_shown_tokens(index, piece)
        text = self.shown_text(index, piece)
        is_first = index not in self._begun
        if not (is_first or text or piece.scored or piece.finish_reason):
            return None
        self._begun.add(index)
        choice = self.streamed_choice(index, text, piece, is_first=is_first)
        chunk = {**self._head, "choices": [choice]}
        if not self._includes_usage:
            return chunk
        counts = self._prompt_lengths[index], self._lengths[index]
        return chunk | {"usage": _usage(*counts) if self._counts_each_piece else None}

    def _with_shown_tokens(self, index: int, piece: Piece) -> Piece:
        if piece.scored and index not in self._shown:
            self._shown[index] = ShownTokens(self._model.tokenizer)
        if index not in self._shown:
            return piece
        return dataclasses.replace(piece, scored=self._shown[index].push(piece))

    def _last_chunks(self) -> list[dict[str, Any]]:
        return (
            [{**self._head, "choices": [], "usage": self._usage()}] if self._includes_usage else []
        )

    def _usage(self) -> dict[str, int]:
        return _usage(self._num_prompt_tokens, self._num_new_tokens)


def _usage(num_prompt_tokens: int, num_new_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
    }


async def _open_grammar(
    request: Request, model: ServedModel, response_format: ResponseFormat | None
) -> Grammar | None:
    """The grammar of a format; none where any text will do. The caller gives it back.

    Raises:
        RequestError: the format cannot be followed.
        ServiceUnavailableError: not now.
        ClientGoneError: the client has disconnected.
    """
    if response_format is None or response_format.type == "text":
        return None
    state = request.app.state
    opening = state.grammars.open(
        grammar_of(response_format),
        model.tokenizer,
        client=request.state.facts.client,
        deadline=time.monotonic() + state.request_timeout_seconds,
    )
    grammar: Grammar = await unless_gone(request.receive, opening)
    return grammar


def _constrained(one: TokenRequest, grammar: Grammar) -> TokenRequest:
    """The same continuation, which follows a grammar."""
    forbids = any_of(one.forbids, grammar.constraint(one.stop_ids).forbids)
    return dataclasses.replace(one, forbids=forbids)


# ---------------------------------------------------------------------- streams


class EventStream(Response):
    """Server-sent events: pieces of continuations as they are generated, until the last one or a problem.

    The client's going away ends the continuations at once.

    Args:
        exchange: its continuations; closed at the end, whatever the end is.
        chunk_of: what to send for a piece of a continuation; none for nothing.
        last: asked for after the last piece.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        exchange: Exchange,
        chunk_of: Callable[[int, Piece], dict[str, Any] | None],
        last: Callable[[], list[dict[str, Any]]],
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        # For nginx and its kin, which would collect the pieces.
        self.headers["x-accel-buffering"] = "no"
        self._exchange = exchange
        self._chunk_of = chunk_of
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or nothing more once the client has gone."""
        try:
            await unless_gone(receive, self._send_all(scope, send))
        except ClientGoneError:
            pass
        finally:
            self._exchange.close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            await self._send_pieces(send)
        except FullStackTransformerError as error:
            # The status has been sent already; the stream itself says what happened.
            scope["state"]["facts"].error_kind = "server_error"
            detail = ErrorDetail(message=str(error), type="server_error")
            await _send(send, _event(ErrorResponse(error=detail).model_dump()), more=False)

    async def _send_pieces(self, send: Send) -> None:
        num_open = len(self._exchange.tickets)
        while num_open:
            data: list[bytes] = []
            for index, piece in await self._exchange.take():
                if piece.problem is not None:
                    if data:
                        await _send(send, b"".join(data))
                    raise piece.problem
                num_open -= piece.finish_reason is not None
                chunk = self._chunk_of(index, piece)
                if chunk is not None:
                    data.append(_event(chunk))
            if data:
                await _send(send, b"".join(data))
        data = [*map(_event, self._last()), b"data: [DONE]\n\n"]
        await _send(send, b"".join(data), more=False)


def _event(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
