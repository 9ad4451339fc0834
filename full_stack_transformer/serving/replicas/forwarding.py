"""From HTTP to a replica and back, so that the death of a replica is an answer too.

    request -> whole body, bounded -> replica by Ray Serve's handle -> messages -> client
                                        │ dies before its first piece: once more, on another replica
                                        └ dies later: an error event ends the stream

Knows no model. Pure ASGI, below the guard.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.serve import exceptions as serve_exceptions
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from full_stack_transformer.errors import (
    BodyEncodingError,
    BodyTooLargeError,
    RequestError,
    ServiceUnavailableError,
)
from full_stack_transformer.serving.http.bodies import read_body
from full_stack_transformer.serving.http.guard import error_response
from full_stack_transformer.serving.replicas.requests import ForwardedRequest, forwarded
from full_stack_transformer.serving.schemas import ErrorDetail, ErrorResponse

logger = logging.getLogger(__name__)

# A request that kills each replica which tries it must not end them all.
_MAX_TRIES = 2
_SECONDS_TO_RETRY = 2
# A replica ends late requests itself; this is for those that wait for a replica.
_SECONDS_BEYOND_TIMEOUT = 5.0
# What the front's own guard says of each answer.
_OWN_HEADERS = frozenset(
    (b"x-request-id", b"access-control-allow-origin", b"access-control-expose-headers")
)


@dataclass
class _Answer:
    """What a client has been sent."""

    has_begun: bool = False
    is_stream: bool = False
    is_complete: bool = False
    held: list[Message] = field(default_factory=list)
    """The head, until there is something after it."""


class Forwarding:
    """An ASGI application without models.

    Args:
        ask: the handle's `remote`, of a handle that streams.
        max_body_bytes: of a request.
        request_timeout_seconds: of a request, for those that find no replica.
    """

    def __init__(
        self,
        ask: Callable[[ForwardedRequest], Any],
        *,
        max_body_bytes: int,
        request_timeout_seconds: float,
    ) -> None:
        self._ask = ask
        self._max_body_bytes = max_body_bytes
        self._timeout_seconds = request_timeout_seconds + _SECONDS_BEYOND_TIMEOUT
        self._end = asyncio.Event()

    def end_all(self) -> None:
        """Requests under way end with an error; called on the event loop."""
        self._end.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            body = await read_body(Request(scope, receive), self._max_body_bytes)
        except RequestError as error:
            await _refuse(error)(scope, receive, send)
            return
        request = forwarded(scope, body, scope["state"]["facts"].request_id)
        answer = _Answer()
        relaying = asyncio.ensure_future(self._relay(request, answer, send))
        leaving = asyncio.ensure_future(receive())  # the body has been read: this is the end
        ending = asyncio.ensure_future(self._end.wait())
        try:
            await asyncio.wait({relaying, leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if relaying.done():
                relaying.result()
            elif not leaving.done():
                await _cancel(relaying)
                await _end(answer, "the service is stopping", scope, receive, send)
        except ServiceUnavailableError as error:
            await _end(answer, str(error), scope, receive, send)
        finally:
            ending.cancel()
            leaving.cancel()
            await _cancel(relaying)

    async def _relay(self, request: ForwardedRequest, answer: _Answer, send: Send) -> None:
        """Send what a replica answers.

        Raises:
            ServiceUnavailableError: none answers to the end.
        """
        for number in range(1, _MAX_TRIES + 1):
            try:
                await self._try(request, answer, send)
            except asyncio.CancelledError:
                raise
            except (
                ray.exceptions.RayTaskError
            ) as error:  # a bug of ours; asking again would not help
                logger.error("a replica failed on a request: %s", error)
                raise ServiceUnavailableError("the service failed on this request") from None
            except serve_exceptions.BackPressureError:
                raise ServiceUnavailableError(
                    "every replica is busy and the queue before them is full; try again later"
                ) from None
            except (ray.exceptions.RayError, serve_exceptions.RayServeException) as error:
                name = type(error).__name__
                if answer.has_begun:
                    logger.warning("a replica ended within an answer (%s)", name)
                    raise ServiceUnavailableError("the replica that generated has ended") from None
                if number == _MAX_TRIES:
                    raise ServiceUnavailableError("no replica answers; try again later") from None
                logger.warning("a replica ended before an answer (%s); asking another", name)
                answer.held.clear()
            else:
                return

    async def _try(self, request: ForwardedRequest, answer: _Answer, send: Send) -> None:
        response = self._ask(request)
        try:
            batches = response.__aiter__()
            try:
                batch = await asyncio.wait_for(anext(batches), self._timeout_seconds)
            except TimeoutError:
                raise ServiceUnavailableError("the request took too long") from None
            while True:
                for message in batch:
                    await _pass_on(message, answer, send)
                batch = await anext(batches)
        except StopAsyncIteration:
            if not answer.is_complete:  # a bug of the application, which the replica's log has
                raise ServiceUnavailableError("the service failed on this request") from None
        finally:
            if not answer.is_complete:
                response.cancel()


async def _pass_on(message: Message, answer: _Answer, send: Send) -> None:
    """Send a message, but a head only with what follows: without it the request can be tried again."""
    if message["type"] == "http.response.start":
        headers = [pair for pair in message["headers"] if not _is_own(*pair)]
        answer.is_stream = any(
            name == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in headers
        )
        answer.held.append({**message, "headers": headers})
        return
    answer.has_begun = True
    held, answer.held = answer.held, []
    for one in (*held, message):
        await send(one)
    answer.is_complete = not message.get("more_body", False)


def _is_own(name: bytes, value: bytes) -> bool:
    return name in _OWN_HEADERS or (name, value) == (b"vary", b"origin")


async def _cancel(task: "asyncio.Future[None]") -> None:
    """End a task and wait until it has."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


async def _end(answer: _Answer, text: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Say that no more comes: as an answer, or as an event of the stream that has begun."""
    scope["state"]["facts"].error_kind = "server_error"
    if not answer.has_begun:
        await unavailable(text)(scope, receive, send)
    elif answer.is_stream and not answer.is_complete:
        detail = ErrorDetail(message=text, type="server_error")
        event = b"data: " + ErrorResponse(error=detail).model_dump_json().encode() + b"\n\n"
        await send({"type": "http.response.body", "body": event, "more_body": False})
    elif not answer.is_complete:
        raise ServiceUnavailableError(
            text
        )  # the server cuts the connection: the answer is a half one


def unavailable(text: str) -> Response:
    """503, to be tried again soon."""
    headers = {"retry-after": str(_SECONDS_TO_RETRY)}
    return error_response(503, "server_error", ServiceUnavailableError(text), headers=headers)


def _refuse(error: RequestError) -> Response:
    status = 400
    if isinstance(error, BodyTooLargeError):
        status = 413
    elif isinstance(error, BodyEncodingError):
        status = 415
    return error_response(status, "invalid_request_error", error)
