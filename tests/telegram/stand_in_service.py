"""The generation service in small: its routes and schemas, with answers that a test decides.

No model, and no FastAPI: the bot sees HTTP and must not need more.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pydantic import BaseModel, ValidationError

from full_stack_transformer.serving.schemas import (
    ErrorDetail,
    ErrorResponse,
    GeneratedTextsRequest,
    GeneratedTextsResponse,
    Health,
    Version,
)

MODEL = "stand-in-model"
VERSION = "9.8.7"
_MAX_HOLD_SECONDS = 30


class StandInService:
    """What the service answers, and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[GeneratedTextsRequest] = []
        self.continuations: dict[str, Callable[[], str]] = {}
        """Prompt -> what continues it; other prompts are continued with a number, never the same."""
        self.refusals: dict[str, int] = {}
        """Prompt -> status."""
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

    def generate(self, request: GeneratedTextsRequest) -> tuple[int, BaseModel]:
        """Status and body of the answer."""
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
        prompt = request.seed_text
        if prompt in self._held:
            arrived, released = self._held[prompt]
            arrived.set()
            released.wait(_MAX_HOLD_SECONDS)
        if prompt in self.refusals:
            return _error(self.refusals[prompt], f"cannot serve {prompt!r}")
        continued = self.continuations.get(prompt, lambda: f" goes on, number {number}")()
        return 200, GeneratedTextsResponse(texts=[continued])


def _error(status: int, message: str) -> tuple[int, BaseModel]:
    return status, ErrorResponse(error=ErrorDetail(message=message, type="error"))


@contextmanager
def serving(service: StandInService, port: int = 0) -> Iterator[StandInService]:
    """Serve on a free port, or on the one of an earlier time."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            version = Version(package_version=VERSION, model=MODEL, description={})
            bodies: dict[str, BaseModel] = {"/version": version, "/health": Health()}
            self._answer(200, bodies[self.path])

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            try:
                request = GeneratedTextsRequest.model_validate_json(body)
            except ValidationError:
                self._answer(*_error(422, "the body does not fit"))
            else:
                self._answer(*service.generate(request))

        def _answer(self, status: int, body: BaseModel) -> None:
            content = body.model_dump_json().encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        service.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()
