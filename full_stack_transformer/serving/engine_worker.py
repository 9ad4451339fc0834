"""The one thread that owns the engine: a bounded queue in front, events out to asyncio.

    handlers --submit--> queue --> thread: add, step, cancel --call_soon_threadsafe--> handlers

Each request has its own asyncio queue of text pieces. Knows nothing of HTTP.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from full_stack_transformer.errors import ServiceUnavailableError
from full_stack_transformer.generation.continuation import Continuation, TextPiece
from full_stack_transformer.generation.engine import Engine, TokenRequest
from full_stack_transformer.generation.text_generator import GenerationOptions, as_token_request
from full_stack_transformer.modelling.model_directory import OpenedModel

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """One request on its way through the worker; made and read on the event loop."""

    token_request: TokenRequest
    continuation: Continuation
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[TextPiece] = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False

    def deliver(self, piece: TextPiece) -> None:
        """Called by the worker's thread."""
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    async def read(self) -> AsyncIterator[TextPiece]:
        """Pieces until the last one, which has a finish reason."""
        while True:
            piece = await self.pieces.get()
            yield piece
            if piece.finish_reason is not None:
                return


class EngineWorker:
    """Owns a model and its engine; every method may be called from any thread."""

    def __init__(self, model: OpenedModel, engine: Engine, *, max_queue_size: int) -> None:
        self.model = model
        self._engine = engine
        self._max_queue_size = max_queue_size
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._wake = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def token_request(self, prompt: str, options: GenerationOptions) -> TokenRequest:
        """Tokens of a prompt, checked against the context.

        Raises:
            RequestError: it can never be generated.
        """
        request = as_token_request(prompt, options, self.model, self._engine.max_length)
        self._engine.check(request)
        return request

    def submit(self, requests: list[tuple[TokenRequest, GenerationOptions]]) -> list[Ticket]:
        """Queue requests, all of them or none.

        Raises:
            ServiceUnavailableError: the queue is full, or the service is stopping.
        """
        loop = asyncio.get_running_loop()
        tickets = [
            Ticket(request, Continuation(self.model.tokenizer, options.stop), loop)
            for request, options in requests
        ]
        with self._wake:
            if self._is_stopping:
                raise ServiceUnavailableError("the service is stopping")
            num_ahead = len(self._waiting) + len(self._running)
            if num_ahead + len(tickets) > self._max_queue_size + self._engine.num_slots:
                raise ServiceUnavailableError(
                    f"{num_ahead} requests are under way or waiting; try again later"
                )
            self._waiting.extend(tickets)
            self._wake.notify()
        return tickets

    def cancel(self, tickets: list[Ticket]) -> None:
        """End requests nobody waits for; they free their slots before the next step."""
        with self._wake:
            for ticket in tickets:
                ticket.is_cancelled = True
            self._wake.notify()

    def stop(self) -> None:
        """Finish what is under way, refuse the rest, and end the thread."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._take_in():
            try:
                self._step()
            except Exception:
                # One broken step must not leave every later client waiting for ever.
                logger.exception("a generation step failed; its requests are ended")
                for key in list(self._running):
                    self._finish(key, TextPiece("", "error"))

    def _take_in(self) -> bool:
        """Wait for work, move it into free slots, drop what was cancelled; false when it is time to end."""
        with self._wake:
            while not (self._waiting or self._running):
                if self._is_stopping:
                    return False
                self._wake.wait()
            for key in [key for key, ticket in self._running.items() if ticket.is_cancelled]:
                self._engine.cancel(key)
                del self._running[key]
            while self._waiting and self._engine.num_free_slots:
                ticket = self._waiting.popleft()
                if not ticket.is_cancelled:
                    self._running[self._engine.add(ticket.token_request)] = ticket
        return True

    def _step(self) -> None:
        for event in self._engine.step():
            ticket = self._running.get(event.request_id)
            if ticket is None:
                continue  # it ended at a stop string earlier in this step
            piece = ticket.continuation.push(event)
            if piece.finish_reason is not None:
                self._finish(event.request_id, piece)
            elif piece.text:
                ticket.deliver(piece)

    def _finish(self, key: int, piece: TextPiece) -> None:
        self._engine.cancel(key)
        self._running.pop(key).deliver(piece)
