"""Server-sent events: pieces of continuations as they are made, until the last one or a problem.

The client's going away ends the continuations at once. Knows nothing of what an event holds.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from full_stack_transformer.errors import FullStackTransformerError
from full_stack_transformer.serving.routes.generation import ClientGoneError, Exchange, unless_gone
from full_stack_transformer.serving.schemas import ErrorDetail, ErrorResponse
from full_stack_transformer.serving.workers.engine_worker import Piece

ChunkOf = Callable[[int, Piece], "dict[str, Any] | None"]


class EventStream(Response):
    """The answer to a request with `stream`.

    Args:
        exchange: its continuations; closed at the end, whatever the end is.
        chunk_of: what to send for a piece of a continuation; none for nothing.
        first: sent before.
        last: asked for after the last piece.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        exchange: Exchange,
        chunk_of: ChunkOf,
        *,
        first: Iterable[dict[str, Any]] = (),
        last: Callable[[], "list[dict[str, Any]]"] = list,
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        # For nginx and its kin, which would collect the pieces.
        self.headers["x-accel-buffering"] = "no"
        self._exchange = exchange
        self._chunk_of = chunk_of
        self._first = first
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
            await _send(send, event(ErrorResponse(error=detail).model_dump()), more=False)

    async def _send_pieces(self, send: Send) -> None:
        before = b"".join(event(chunk) for chunk in self._first)
        num_open = len(self._exchange.tickets)
        if before:
            await _send(send, before)
        while num_open:
            data: list[bytes] = []
            for number, piece in await self._exchange.take():
                if piece.problem is not None:
                    if data:
                        await _send(send, b"".join(data))
                    raise piece.problem
                num_open -= piece.finish_reason is not None
                chunk = self._chunk_of(number, piece)
                if chunk is not None:
                    data.append(event(chunk))
            if data:
                await _send(send, b"".join(data))
        data = [*map(event, self._last()), b"data: [DONE]\n\n"]
        await _send(send, b"".join(data), more=False)


def event(content: dict[str, Any]) -> bytes:
    """One event."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
