"""One replica: the application of `fst serve`, asked through Ray instead of a socket.

ForwardedRequest ──> scope, receive ──> application ──send──> batches of ASGI messages ──> front
"""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import generate_latest
from starlette.types import ASGIApp, Message

from full_stack_transformer.arguments.serving import ServeArguments
from full_stack_transformer.serving.replicas.nodes import ReplicaState, read_same_keys, whereabouts
from full_stack_transformer.serving.replicas.requests import ForwardedRequest
from full_stack_transformer.serving.service import find_sources, open_service

logger = logging.getLogger(__name__)


class Replica:
    """The class that Ray Serve runs; a failed constructor shows its error in the deployment's status.

    Args:
        arguments: of the command.
        num_keys: keys of clients and of admins that the command found.

    Raises:
        FullStackTransformerError: a model cannot be served here, or keys are missing here.
    """

    def __init__(self, arguments: ServeArguments, num_keys: tuple[int, int]) -> None:
        keys = read_same_keys(arguments, num_keys)
        # The front has looked at the host already, by the names of its own node.
        arguments = dataclasses.replace(arguments, allowed_hosts=("*",))
        self._service = open_service(arguments, find_sources(arguments), keys)
        self._lifespan: asyncio.Task[None] | None = None

    async def __call__(self, request: ForwardedRequest) -> AsyncIterator[list[Message]]:
        """The messages of an answer, as many at a time as there are; ended early, it ends the request."""
        if self._lifespan is None:
            self._lifespan = asyncio.create_task(_live(self._service.app))
        outbox = _Outbox()
        answering = asyncio.create_task(outbox.answer(self._service.app, request))
        try:
            while (messages := await outbox.take()) is not None:
                yield messages
        finally:
            outbox.has_gone.set()
            await asyncio.wait({answering})

    async def state(self) -> ReplicaState:
        """For `/ready` of the fronts."""
        name, node = whereabouts()
        worker, others = self._service.worker, self._service.task_worker
        return ReplicaState(
            name=name,
            node=node,
            num_running=worker.num_running + others.num_running,
            num_waiting=worker.num_waiting + others.num_waiting,
        )

    async def metrics(self) -> tuple[ReplicaState, bytes]:
        """In Prometheus' form, for `/metrics` of the front of its node."""
        return await self.state(), generate_latest(self._service.registry)

    def check_health(self) -> None:
        """Called by Ray Serve; what raises is replaced.

        Raises:
            RuntimeError: the thread that computes has ended.
        """
        if self._service.worker.is_stopping:
            raise RuntimeError("the service is stopping")

    def __del__(self) -> None:
        """Called by Ray Serve when nothing is under way any more."""
        service = getattr(self, "_service", None)
        if service is not None:
            service.drain(0)
            service.grammars.close()


class _Outbox:
    """Messages of an application on their way; what is sent while nobody takes leaves together."""

    def __init__(self) -> None:
        self.has_gone = asyncio.Event()
        self._messages: list[Message] = []
        self._has_ended = False
        self._grown = asyncio.Event()

    async def answer(self, app: ASGIApp, request: ForwardedRequest) -> None:
        """Let the application answer; a bug of it is logged, and ends the answer where it is."""
        body: list[bytes] = [request.body]

        async def receive() -> Message:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await self.has_gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self._messages.append(message)
            self._grown.set()

        try:
            await app({**request.scope, "state": {}}, receive, send)
        except Exception:
            logger.exception("the service failed on a request")
        finally:
            self._has_ended = True
            self._grown.set()

    async def take(self) -> list[Message] | None:
        """What was sent since the last time; none at the end."""
        await self._grown.wait()
        self._grown.clear()
        messages, self._messages = self._messages, []
        if messages and self._has_ended:
            self._grown.set()  # so that the next call sees the end
        return messages or None


async def _live(app: ASGIApp) -> None:
    """Start what the application does beside requests, such as watching its models."""
    forever = asyncio.Event()
    messages: list[Any] = [{"type": "lifespan.startup"}]

    async def receive() -> Message:
        if not messages:
            await forever.wait()
        return dict(messages.pop())

    async def send(message: Message) -> None:
        pass

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
