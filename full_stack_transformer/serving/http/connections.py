"""One HTTP connection: uvicorn's h11 protocol with deadlines, and ends that lose no answer.

    connected ── head by a deadline ── body by a deadline ── answer ── idle ── next head …

What is late or malformed gets a short JSON answer. Before a connection is closed whose client may still be
sending, its bytes are read and dropped for a moment: closing at once would reset the connection and with it
the answer under way. Knows nothing of the application.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_SECONDS_TO_LINGER = 5.0
_MAX_LINGERING_BYTES = 256 << 20
# h11 takes 20 us for a chunk, and a chunk may be one byte long: others must not wait for many of them.
_READ_BYTES, _LINGERING_READ_BYTES = 8 << 10, 256 << 10
# A client that reads nothing of its answer for so long has gone.
_SECONDS_TO_READ_ANSWER = 60.0

_Waiting = Literal["head", "body"]


class _LingeringTransport:
    """A transport whose `close` is the protocol's `linger`."""

    def __init__(self, transport: asyncio.Transport, protocol: "DeadlineProtocol") -> None:
        self._transport = transport
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._protocol.is_lingering or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        self._protocol.linger()


class DeadlineProtocol(H11Protocol):
    """See the module; `max_connections` and the deadlines are set on a subclass by `protocol_with`."""

    head_seconds = 10.0
    body_seconds = 30.0
    max_connections = 4096

    is_lingering = False
    _num_lingering_bytes = 0
    _inner: asyncio.Transport
    _waiting: tuple[_Waiting, int] | None = None
    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _has_bytes = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        self._inner = transport
        self._read_at_once(_READ_BYTES)
        super().connection_made(_LingeringTransport(transport, self))  # type: ignore[arg-type]
        if len(self.connections) > self.max_connections:
            self._answer(503, "too many connections are open; try again later")
            return
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget all timers."""
        self._clear_deadline()
        self._clear_stall()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request, or drop those that come after the end."""
        if self.is_lingering:
            self._num_lingering_bytes += len(data)
            if self._num_lingering_bytes > _MAX_LINGERING_BYTES:
                self._inner.abort()
            return
        self._has_bytes = True
        super().data_received(data)

    def handle_events(self) -> None:
        """Take the events of h11, then wait for what must come next."""
        super().handle_events()
        self._set_deadline()

    def on_response_complete(self) -> None:
        """Go on to the next request of this connection."""
        if self.conn.their_state is h11.SEND_BODY:
            # An early answer, such as 401 or 413: whatever else of the body comes is not worth parsing.
            self.server_state.total_requests += 1
            self.linger()
            return
        super().on_response_complete()
        self._set_deadline()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP."""
        self._answer(400, "not an HTTP/1.1 request, or its header is too large")

    def _unsupported_upgrade_warning(self) -> None:
        """Not worth a line in the log; the request is served as it is."""

    def _should_upgrade(self) -> bool:
        return False

    def shutdown(self) -> None:
        """The service ends: an idle connection is closed at once, another after its answer."""
        if self.cycle is None or self.cycle.response_complete:
            self._inner.close()
        else:
            self.cycle.keep_alive = False

    # ------------------------------------------------------------------ deadlines

    def _set_deadline(self) -> None:
        """Start the clock of what is awaited now; a clock that runs already goes on."""
        waiting = self._awaited()
        if waiting == self._waiting:
            return
        self._clear_deadline()
        self._waiting = waiting
        if waiting is not None:
            seconds = self.head_seconds if waiting[0] == "head" else self.body_seconds
            self._deadline = self.loop.call_later(seconds, self._on_deadline)

    def _awaited(self) -> tuple[_Waiting, int] | None:
        number = 0 if self.cycle is None else id(self.cycle)
        if self.is_lingering or self._inner.is_closing():
            return None
        if self.conn.their_state is h11.SEND_BODY:
            return ("body", number)
        if self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None:
            return ("head", number)
        return None

    def _on_deadline(self) -> None:
        waiting, self._waiting, self._deadline = self._waiting, None, None
        if waiting is None or self.is_lingering:
            return
        if waiting[0] == "head" and not self._has_bytes:
            self._inner.close()
            return
        self._answer(408, f"the {waiting[0]} of the request took too long to arrive")

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._waiting = self._deadline = None

    # ------------------------------------------------------------------ writing

    def pause_writing(self) -> None:
        """The client reads slowly."""
        super().pause_writing()
        self._clear_stall()
        self._stall = self.loop.call_later(_SECONDS_TO_READ_ANSWER, self._inner.abort)

    def resume_writing(self) -> None:
        """The client has read on."""
        self._clear_stall()
        super().resume_writing()

    def _clear_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        self._stall = None

    # ------------------------------------------------------------------ the end

    def _answer(self, status: int, message: str) -> None:
        """End the connection with an error, where the application has not begun to answer."""
        has_begun = False
        if self.cycle is not None and not self.cycle.response_complete:
            has_begun = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not has_begun and not self.is_lingering:
            detail = {
                "message": message,
                "type": "invalid_request_error",
                "code": None,
                "param": None,
            }
            body = json.dumps({"error": detail}).encode()
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nx-content-type-options: nosniff\r\n"
                "connection: close\r\n\r\n"
            )
            self._inner.write(head.encode() + body)
        self.linger()

    def linger(self) -> None:
        """Send what is left, say that no more comes, and close when the client has done so too."""
        if self.is_lingering or self._inner.is_closing():
            return
        if self._client_has_said_all():
            self._inner.close()
            return
        self.is_lingering = True
        self._clear_deadline()
        self._unset_keepalive_if_required()
        self._inner.resume_reading()
        self._read_at_once(_LINGERING_READ_BYTES)
        try:
            self._inner.write_eof()
        except OSError:  # the client has closed both ways already
            self._inner.close()
        self._deadline = self.loop.call_later(_SECONDS_TO_LINGER, self._end_lingering)

    def _client_has_said_all(self) -> bool:
        """Whether the client announced that nothing follows this request, and all of it was read.

        Then closing at once resets nothing. Lingering takes a quarter of the time of a refused request.
        """
        if self.conn.their_state is not h11.MUST_CLOSE or self.conn.trailing_data[0]:
            return False
        return any(
            name == b"connection" and value.lower() == b"close" for name, value in self.headers
        )

    def _read_at_once(self, num_bytes: int) -> None:
        # Read by asyncio's transport for sockets; one that lacks it reads as it likes.
        self._inner.max_size = num_bytes  # type: ignore[attr-defined]

    def _end_lingering(self) -> None:
        if (
            self._inner.get_write_buffer_size()
        ):  # a slow reader; one that has stopped is ended elsewhere
            self._deadline = self.loop.call_later(_SECONDS_TO_LINGER, self._end_lingering)
        else:
            self._inner.abort()


def protocol_with(
    *, head_seconds: float, body_seconds: float, max_connections: int
) -> type[DeadlineProtocol]:
    """A protocol class with these limits, for uvicorn's `http`."""
    limits = {
        "head_seconds": head_seconds,
        "body_seconds": body_seconds,
        "max_connections": max_connections,
    }
    return type("LimitedProtocol", (DeadlineProtocol,), limits)
