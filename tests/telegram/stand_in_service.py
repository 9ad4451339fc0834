"""An OpenAI-compatible server in small: streamed completions and chat, with texts that a test decides.

No model, and no FastAPI: the bot sees HTTP and must not need more. Strict as our own service is:
unknown fields are refused, prompts beyond the context too.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import BaseModel, ValidationError

from full_stack_transformer.serving.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    ErrorDetail,
    ErrorResponse,
    GeneratedTextsRequest,
    GeneratedTextsResponse,
    Health,
    ModelCard,
    ModelList,
    Version,
)

MODEL = "stand-in-model"
VERSION = "9.8.7"
_MAX_HOLD_SECONDS = 30
_PIECE_CHARACTERS = 7
_MAX_PIECES = 2000

Request = CompletionRequest | ChatCompletionRequest


class StandInService:
    """What the service answers, and what it was asked."""

    def __init__(self, *, context: int = 1_000_000, chat_template: bool = False) -> None:
        self.url = ""
        self.context = context
        """Characters, which are this server's tokens."""
        self.chat_template = chat_template
        self.speaks_native = True
        """Whether it is ours: `/version` exists."""
        self.requests: list[Request] = []
        self.texts: list[tuple[str, int, str]] = []
        """(prompt, seed, text) of every text that was streamed to its end."""
        self.continuations: dict[str, Callable[[], str]] = {}
        """Prompt -> what continues it; other texts are a function of prompt and seed."""
        self.refusals: dict[str, int] = {}
        """Prompt -> status."""
        self.failures: list[str] = []
        """What goes wrong with the next requests: unavailable, broken, error, foreign."""
        self.seconds_between_pieces = 0.0
        self.num_pieces_after_close = 0
        """Pieces that could still be written after the client had gone, in the last broken stream."""
        self.num_running = 0
        self.num_broken = 0
        """Streams that the client left before their end."""
        self._lock = threading.Lock()
        self._held: dict[str, tuple[threading.Event, threading.Event]] = {}

    @contextmanager
    def holding(self, prompt: str) -> Iterator[threading.Event]:
        """Inside, `prompt` is not answered; the event tells that it arrived."""
        arrived, released = threading.Event(), threading.Event()
        self._held[prompt] = (arrived, released)
        try:
            yield arrived
        finally:
            del self._held[prompt]
            released.set()

    def wait_if_held(self, prompt: str) -> None:
        """Wait for the test, where it holds this prompt."""
        if prompt in self._held:
            arrived, released = self._held[prompt]
            arrived.set()
            released.wait(_MAX_HOLD_SECONDS)

    def record(self, request: Request) -> str | None:
        """Remember a request; the failure that it meets."""
        with self._lock:
            self.requests.append(request)
            return self.failures.pop(0) if self.failures else None

    def text_for(self, request: Request) -> str:
        """The text of a request: the same for the same prompt and seed."""
        prompt = prompt_of(request)
        if prompt in self.continuations:
            return self.continuations[prompt]()
        if isinstance(request, ChatCompletionRequest):
            return f"You said {prompt!r}, turn {len(request.messages)}, seed {request.seed}."
        return f" goes on, seed {request.seed}"


def prompt_of(request: Request) -> str:
    """What the user wrote last."""
    if isinstance(request, ChatCompletionRequest):
        return request.messages[-1].content
    return request.prompt


def _size(request: Request) -> int:
    if isinstance(request, ChatCompletionRequest):
        return sum(len(message.content) for message in request.messages)
    return len(request.prompt)


def _error(status: int, message: str) -> tuple[int, BaseModel]:
    return status, ErrorResponse(error=ErrorDetail(message=message, type="error"))


@contextmanager
def serving(service: StandInService, port: int = 0) -> Iterator[StandInService]:
    """Serve on a free port, or on the one of an earlier time."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            description = {"chat_template": True} if service.chat_template else {}
            version = Version(package_version=VERSION, model=MODEL, description=description)
            bodies: dict[str, BaseModel] = {
                "/health": Health(),
                "/v1/models": ModelList(data=[ModelCard(id=MODEL, created=0)]),
            }
            if service.speaks_native:
                bodies["/version"] = version
            if self.path in bodies:
                self._answer(200, bodies[self.path])
            else:
                self._answer(*_error(404, "Not Found"))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            try:
                if self.path == "/generated_texts/":
                    self._generate(GeneratedTextsRequest.model_validate_json(body))
                elif self.path == "/v1/chat/completions":
                    self._complete(ChatCompletionRequest.model_validate_json(body))
                else:
                    self._complete(CompletionRequest.model_validate_json(body))
            except ValidationError:
                self._answer(*_error(422, "the body does not fit"))

        def _generate(self, request: GeneratedTextsRequest) -> None:
            self._answer(200, GeneratedTextsResponse(texts=[" goes on"]))

        def _complete(self, request: Request) -> None:
            failure = service.record(request)
            prompt = prompt_of(request)
            service.wait_if_held(prompt)
            if failure == "unavailable":
                self._answer(*_error(503, "busy"))
            elif prompt in service.refusals:
                self._answer(*_error(service.refusals[prompt], f"cannot serve {prompt!r}"))
            elif _size(request) + (request.max_tokens or 0) > service.context:
                self._answer(*_error(400, f"the context is {service.context} tokens"))
            else:
                self._stream(request, failure)

        def _stream(self, request: Request, failure: str | None) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            self.close_connection = True
            text = service.text_for(request)
            size = max(_PIECE_CHARACTERS, len(text) // _MAX_PIECES)
            pieces = [text[start : start + size] for start in range(0, len(text), size)]
            service.num_running += 1
            num_after_close = 0
            try:
                for number, piece in enumerate(pieces):
                    if number == len(pieces) // 2 and failure is not None:
                        if failure == "error":
                            self._event({"error": {"message": "failed", "type": "server_error"}})
                        elif failure == "foreign":
                            self._event({"something": "else"})
                        return
                    if service.seconds_between_pieces:
                        time.sleep(service.seconds_between_pieces)
                    num_after_close += _is_closed(self)
                    self._event(_chunk(request, piece, None))
                self._event(_chunk(request, "", "stop" if failure is None else None))
                self.wfile.write(b"data: [DONE]\n\n")
                with service._lock:
                    service.texts.append((prompt_of(request), request.seed or 0, text))
            except OSError:
                service.num_pieces_after_close = num_after_close
                service.num_broken += 1
            finally:
                service.num_running -= 1

        def _event(self, content: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
            self.wfile.flush()

        def _answer(self, status: int, body: BaseModel) -> None:
            content = body.model_dump_json().encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that goes away is what many tests are about."""

    with Server(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        service.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()


def _is_closed(handler: BaseHTTPRequestHandler) -> bool:
    """Whether the client has closed its side, without waiting."""
    connection = handler.connection
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    finally:
        connection.setblocking(True)


def _chunk(request: Request, text: str, finish_reason: str | None) -> dict[str, Any]:
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": 0, "model": request.model}
    if isinstance(request, ChatCompletionRequest):
        delta = {"content": text} if text else {}
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {**head, "object": "chat.completion.chunk", "choices": [choice]}
    choice = {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}
    return {**head, "object": "text_completion", "choices": [choice]}
