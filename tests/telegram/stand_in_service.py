"""A small OpenAI-compatible server: streamed completions and chat, with texts that a test decides.

No model, no FastAPI, no schema of ours: the bot sees HTTP and must not need more. Strict as our own
service is: unknown fields are refused, prompts beyond the context too.
"""

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from full_stack_transformer.serving.client import Turn, WantedAnswer, WantedContinuation

Json = dict[str, Any]
Request = WantedContinuation | WantedAnswer

MODEL = "stand-in-model"
VERSION = "9.8.7"
# Long, because a busy machine is slow; what is expected comes in milliseconds.
_PATIENCE_SECONDS = 300.0
_LOOK_SECONDS = 0.02
_PIECE_CHARACTERS = 7
_MAX_PIECES = 2000


class Hold:
    """Requests that wait at a given piece of their text until the test releases them or the client leaves."""

    def __init__(self, after_pieces: int) -> None:
        self.after_pieces = after_pieces
        self._arrived = threading.Event()
        self._released = threading.Event()

    def wait(self) -> None:
        """Wait until a request has reached that piece."""
        assert self._arrived.wait(_PATIENCE_SECONDS), "no request came so far"

    def release(self) -> None:
        """Release the requests."""
        self._released.set()

    def keep(self, handler: BaseHTTPRequestHandler) -> None:
        """The request's side: wait here."""
        self._arrived.set()
        until = time.monotonic() + _PATIENCE_SECONDS
        while not self._released.wait(_LOOK_SECONDS) and time.monotonic() < until:
            if is_closed(handler):
                return


class StandInService:
    """The service's answers, and the requests that it received."""

    def __init__(self, *, context: int = 1_000_000, chat_template: bool = False) -> None:
        self.url = ""
        self.context = context
        """In characters, which are this server's tokens."""
        self.chat_template = chat_template
        self.more_models: tuple[str, ...] = ()
        self.speaks_native = True
        """Whether it has `/version`, like `fst serve`."""
        self.requests: list[Request] = []
        self.continuations: dict[str, Callable[[], str]] = {}
        """Prompt -> its continuation; other texts are a function of prompt and seed."""
        self.refusals: dict[str, int] = {}
        """Prompt -> status."""
        self.failures: list[str] = []
        """How the next requests fail: unavailable, broken, error, foreign."""
        self.seconds_between_pieces = 0.0
        self.left: dict[str, int] = {}
        """Prompt of a stream that the client left -> pieces that could still be written after that."""
        self.changed = threading.Condition()
        self._holds: dict[str, Hold] = {}

    @contextmanager
    def holding(self, prompt: str, after_pieces: int = 0) -> Iterator[Hold]:
        """Inside, the text for `prompt` stops after this number of pieces; 0: before the response."""
        hold = self._holds[prompt] = Hold(after_pieces)
        try:
            yield hold
        finally:
            del self._holds[prompt]
            hold.release()

    def hold_of(self, prompt: str) -> Hold | None:
        """The hold for a request, if the test set one."""
        return self._holds.get(prompt)

    def wait_until_left(self, prompt: str) -> int:
        """Wait until the client has left a stream; how many pieces were written after that."""
        with self.changed:
            assert self.changed.wait_for(lambda: prompt in self.left, _PATIENCE_SECONDS)
            return self.left[prompt]

    def record(self, request: Request) -> str | None:
        """Record a request; the failure scripted for it."""
        with self.changed:
            self.requests.append(request)
            return self.failures.pop(0) if self.failures else None

    def text_for(self, request: Request) -> str:
        """The text of a request: the same for the same prompt and seed."""
        prompt = prompt_of(request)
        if prompt in self.continuations:
            return self.continuations[prompt]()
        if isinstance(request, WantedAnswer):
            return f"You said {prompt!r}, turn {len(request.messages)}, seed {request.seed}."
        return f" goes on, seed {request.seed}"

    def description(self) -> Json:
        """The answer of `/version`."""
        facts = [
            {"model": name, "has_chat_template": self.chat_template}
            for name in (MODEL, *self.more_models)
        ]
        return {"package_version": VERSION, "model": MODEL, "description": {}, "models": facts}


def request_of(body: Json) -> Request:
    """A request from its body.

    Raises:
        TypeError: the body has a field too much or too few.
    """
    if "messages" in body:
        turns = tuple(Turn(**turn) for turn in body["messages"])
        return WantedAnswer(**{**body, "messages": turns})
    return WantedContinuation(**body)


def prompt_of(request: Request) -> str:
    """What the user wrote last."""
    if isinstance(request, WantedAnswer):
        return request.messages[-1].content
    return request.prompt


def _size(request: Request) -> int:
    if isinstance(request, WantedAnswer):
        return sum(len(turn.content) for turn in request.messages)
    return len(request.prompt)


class _Handler(BaseHTTPRequestHandler):
    """One connection; `service` is set by `serving`."""

    service: StandInService

    def do_GET(self) -> None:
        bodies: dict[str, Json] = {
            "/health": {"status": "ok"},
            "/v1/models": {
                "object": "list",
                "data": [
                    {"id": name, "object": "model"} for name in (MODEL, *self.service.more_models)
                ],
            },
        }
        if self.service.speaks_native:
            bodies["/version"] = self.service.description()
        if self.path in bodies:
            self._answer(200, bodies[self.path])
        else:
            self._refuse(404, "Not Found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        is_streamed = body.pop("stream", False)
        try:
            request = request_of(body)
        except TypeError:
            self._refuse(422, "the body does not fit")
            return
        if is_streamed:
            self._complete(request)
        elif self.service.chat_template:
            self._answer(200, {"choices": []})
        else:
            self._refuse(400, "this model has no chat template")

    def _complete(self, request: Request) -> None:
        service, prompt = self.service, prompt_of(request)
        failure = service.record(request)
        hold = service.hold_of(prompt) if failure is None else None
        if hold is not None and hold.after_pieces == 0:
            hold.keep(self)
        if failure == "unavailable":
            self._refuse(503, "busy")
        elif prompt in service.refusals:
            self._refuse(service.refusals[prompt], f"cannot serve {prompt!r}")
        elif _size(request) + (request.max_tokens or 0) > service.context:
            self._refuse(400, f"the context is {service.context} tokens")
        else:
            self._stream(request, failure, hold)

    def _stream(self, request: Request, failure: str | None, hold: Hold | None) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        text = self.service.text_for(request)
        size = max(_PIECE_CHARACTERS, len(text) // _MAX_PIECES)
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        num_after_close = 0
        try:
            for number, piece in enumerate(pieces):
                if number == len(pieces) // 2 and failure is not None:
                    self._fail(failure)
                    return
                if hold is not None and number == hold.after_pieces:
                    hold.keep(self)
                if self.service.seconds_between_pieces:
                    time.sleep(self.service.seconds_between_pieces)
                num_after_close += is_closed(self)
                self._event(_chunk(request, piece, None))
            self._event(_chunk(request, "", "stop" if failure is None else None))
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            with self.service.changed:
                self.service.left[prompt_of(request)] = num_after_close
                self.service.changed.notify_all()

    def _fail(self, failure: str) -> None:
        if failure == "error":
            self._event({"error": {"message": "failed", "type": "server_error"}})
        elif failure == "foreign":
            self._event({"something": "else"})

    def _event(self, content: Json) -> None:
        # As our own service writes it: characters beyond ASCII as they are.
        self.wfile.write(f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, {"error": {"message": message, "type": "error"}})

    def _answer(self, status: int, body: Json) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not log clients that go away: many tests do that."""


def bound_socket() -> socket.socket:
    """A reserved port that refuses connections until `serving` uses it."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    return bound


@contextmanager
def serving(
    service: StandInService, bound: socket.socket | None = None
) -> Iterator[StandInService]:
    """Serve on a free port, or on one that is bound already."""
    handler = type("Handler", (_Handler,), {"service": service})
    with _Server(("127.0.0.1", 0), handler, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = bound_socket() if bound is None else bound
        service.url = url_of(server.socket)
        server.server_activate()
        thread = threading.Thread(target=server.serve_forever, args=(_LOOK_SECONDS,))
        thread.start()
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()


def url_of(bound: socket.socket) -> str:
    """The address of a bound port."""
    return f"http://127.0.0.1:{bound.getsockname()[1]}"


def is_closed(handler: BaseHTTPRequestHandler) -> bool:
    """Whether the client has closed its side, without waiting."""
    connection = handler.connection
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)


def _chunk(request: Request, text: str, finish_reason: str | None) -> Json:
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": 0, "model": request.model}
    if isinstance(request, WantedAnswer):
        delta = {"content": text} if text else {}
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {**head, "object": "chat.completion.chunk", "choices": [choice]}
    choice = {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}
    return {**head, "object": "text_completion", "choices": [choice]}
