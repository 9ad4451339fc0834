"""The front of a node: an HTTP server with the service's guard, and replicas behind it.

It stands where Ray Serve has a proxy. That one reads bodies and headers of any size for as long as it takes,
answers a dead replica by cutting the stream, and obeys headers of strangers; this one keeps what `fst serve`
promises. It also sees the whole body before it chooses a replica, so that the beginning of a text can decide.
"""

import asyncio
import contextlib
import logging
import os
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from ray import serve
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from full_stack_transformer.arguments.serving import ServeArguments
from full_stack_transformer.errors import FullStackTransformerError
from full_stack_transformer.machine import listen
from full_stack_transformer.serving.http.guard import AllowedHosts, Guard, HttpMetrics, RequestFacts
from full_stack_transformer.serving.http.server import Server
from full_stack_transformer.serving.logs import log_json_lines
from full_stack_transformer.serving.replicas.forwarding import Forwarding
from full_stack_transformer.serving.replicas.metrics import merged
from full_stack_transformer.serving.replicas.nodes import ReplicaState, read_same_keys, whereabouts
from full_stack_transformer.serving.schemas import Health, Readiness

logger = logging.getLogger(__name__)

_SECONDS_FOR_STATES = 3.0
_ROUTE = SimpleNamespace(path="forwarded")


@dataclass(frozen=True, kw_only=True)
class FrontOptions:
    """What a front must know; no secrets, as Ray shows arguments of actors."""

    arguments: ServeArguments
    application: str
    """Of Ray Serve."""
    deployment: str
    port: int
    num_keys: tuple[int, int]
    open_paths: tuple[str, ...]
    """Paths that need no key."""


class Front:
    """An actor of Ray; its server has a thread and an event loop of its own."""

    def __init__(self, options: FrontOptions) -> None:
        self._options = options
        self._problem: str | None = None
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        try:
            self._start()
        except FullStackTransformerError as error:  # restarting would not help
            self._problem = str(error)

    def problem(self) -> str | None:
        """Why it does not serve, in a sentence; none if it does."""
        if self._problem is None and not (self._thread and self._thread.is_alive()):
            return "the HTTP server of a front has ended"
        return self._problem

    def stop(self) -> None:
        """Take nothing new, wait for the requests under way, and end."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()

    def process(self) -> int:
        """Its number, for tests and operators."""
        return os.getpid()

    def _start(self) -> None:
        arguments = self._options.arguments
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
        if arguments.log_format == "json":
            log_json_lines()
        keys = read_same_keys(arguments, self._options.num_keys)
        registry = CollectorRegistry()
        leaving = threading.Event()
        app = _FrontApp(self._options, registry, leaving)
        guard = Guard(
            app,
            keys=keys.clients,
            admin_keys=keys.admins,
            hosts=AllowedHosts(arguments.host, arguments.allowed_hosts, arguments.allowed_origins),
            allowed_origins=arguments.allowed_origins,
            open_paths=self._options.open_paths,
            metrics=HttpMetrics(registry, prefix="fst_front"),
            at_end=lambda tickets: {},
            early_answer=lambda path, facts: None,
            known_path=lambda path: path,
            is_leaving=leaving.is_set,
        )
        listener = listen(arguments.host, self._options.port, shares=True)
        self._server = Server(guard, arguments, leaving=leaving, drain=app.drain)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="http", daemon=True
        )
        self._thread.start()


class _FrontApp:
    """What is answered here, and what by a replica."""

    def __init__(
        self, options: FrontOptions, registry: CollectorRegistry, leaving: threading.Event
    ) -> None:
        self._options = options
        self._registry = registry
        self._leaving = leaving
        handle = serve.get_deployment_handle(options.deployment, options.application)
        self._handle = handle
        self._forwarding = Forwarding(
            handle.options(stream=True).remote,
            max_body_bytes=options.arguments.max_body_bytes,
            request_timeout_seconds=options.arguments.request_timeout_seconds,
        )

    def drain(self, seconds: float) -> None:
        """What is not finished after `seconds` ends with an error; called on the event loop."""
        asyncio.get_running_loop().call_later(seconds, self._forwarding.end_all)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the server's start and end."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        answer = await self._own_answer(scope) if scope["method"] == "GET" else None
        if answer is None:
            scope["route"] = _ROUTE
        app: ASGIApp = self._forwarding if answer is None else answer
        await app(scope, receive, send)

    async def _own_answer(self, scope: Scope) -> Response | None:
        """The answer to a question about this front; none for other questions."""
        match scope["path"].rstrip("/"):
            case "/health" | "/health_check":
                return JSONResponse(Health().model_dump())
            case "/ready":
                return await self._ready(scope["state"]["facts"])
            case "/metrics":
                return await self._metrics()
            case _:
                return None

    async def _ready(self, facts: RequestFacts) -> Response:
        try:
            states = [] if self._leaving.is_set() else await self._ask_all("state")
        except TimeoutError:  # one of them hangs, until Ray Serve replaces it; others may answer
            return JSONResponse(Readiness(status="ready").model_dump(exclude_none=True))
        readiness = Readiness(status="ready" if states else "stopping")
        if self._options.num_keys[0] == 0 or facts.key is not None:
            readiness.num_running = sum(state.num_running for state in states)
            readiness.num_waiting = sum(state.num_waiting for state in states)
        return JSONResponse(readiness.model_dump(exclude_none=True), 200 if states else 503)

    async def _metrics(self) -> Response:
        """Of this front and of the replicas of its node, so that scraping every front counts each once."""
        _, node = whereabouts()
        found: list[tuple[ReplicaState, bytes]] = []
        with contextlib.suppress(TimeoutError):
            found = await self._ask_all("metrics")
        texts = [(state.name, text) for state, text in found if state.node == node]
        text = generate_latest(self._registry) + merged(texts)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def _ask_all(self, method: str) -> list[Any]:
        """What the replicas answer that do; a dead one among them is left out.

        Raises:
            TimeoutError: one of them does not answer in time; Ray Serve then tells nothing of the others.
        """
        try:
            answers = await self._handle.broadcast(method).results_async(
                timeout_s=_SECONDS_FOR_STATES, return_exceptions=True
            )
        except TimeoutError:
            logger.warning("a replica does not say %s in time", method)
            raise
        except Exception as error:  # Ray has one for each way in which there is no replica
            logger.warning("no replica says %s: %s", method, type(error).__name__)
            return []
        return [one for one in answers if not isinstance(one, BaseException)]


async def _live(receive: Receive, send: Send) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0; closed again.

    Raises:
        MachineError: it is in use or forbidden.
    """
    with contextlib.closing(listen(host, port)) as listener:
        number: int = listener.getsockname()[1]
    return number
