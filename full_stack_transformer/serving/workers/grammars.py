"""Grammars in processes of their own: a small one can take gigabytes and hours.

    route --open--> Grammars: a place to compile --Grammar--> Constraint of each text --step--> child process

See `grammar_process` for the other end. Each process has bounds and ends with its request, or is kept for the
next one with an equal grammar. Belongs to the extra `constraints`. Knows nothing of HTTP.
"""

import array
import asyncio
import contextlib
import hashlib
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path

from full_stack_transformer.errors import (
    MissingExtraError,
    RequestError,
    ServiceUnavailableError,
    install_command,
)
from full_stack_transformer.serving.workers import grammar_process
from full_stack_transformer.serving.workers.constraints import Constraint, Wanted
from full_stack_transformer.serving.workers.grammar_process import (
    ANSWER,
    CONTROL,
    DEATH,
    END,
    MAX_MEGABYTES,
    REFUSAL,
    SECONDS_OF_STEP,
    SECONDS_OF_TEXT,
    SECONDS_TO_COMPILE,
    START,
    TOO_LARGE,
    TOO_SLOW,
)
from full_stack_transformer.serving.workers.thread import check_share
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

logger = logging.getLogger(__name__)

# Requests with a grammar that have a process, and those whose grammar is compiled now.
_MAX_GRAMMARS = 24
_MAX_COMPILING = max(1, (os.cpu_count() or 1) // 4)
# Grammars whose process is kept for the next request with the same one.
_MAX_KEPT = 4
_MAX_VOCABULARIES = 8
_SECONDS_TO_START = 60
# Far more than the bounds on processor time: for a machine that is overloaded.
_SECONDS_TO_WAIT_FOR_COMPILER = 30.0
_SECONDS_TO_WAIT_FOR_STEP = 2.0
_SECONDS_TO_REMEMBER_REFUSALS = 300.0
_MAX_REFUSALS = 1024
_SECONDS_TO_STOP = 0.5
# How a child ends for which there is no memory: Rust aborts, a stack that cannot grow is a bad address.
_SIGNALS_OF_MEMORY = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)


class _Vocabulary:
    """The process that knows a vocabulary and has the children; see `grammar_process`."""

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        """Start it."""
        self._directory = tempfile.TemporaryDirectory()
        file = Path(self._directory.name) / "tokenizer.json"
        tokenizer.backend.save(str(file))
        self.control, other = socket.socketpair()
        with other:
            numbers = map(str, (other.fileno(), file, tokenizer.vocab_size, tokenizer.end_id))
            self._process = subprocess.Popen(
                # -P: nothing is imported from where the service was started, nor from beside the file.
                [sys.executable, "-P", grammar_process.__file__, *numbers],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,
                env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # others would count as memory
            )

    async def wait_until_ready(self) -> None:
        """Return when children can be started.

        Raises:
            RequestError: llguidance cannot read this kind of vocabulary.
            ServiceUnavailableError: the process did not start.
        """
        message = b""
        if await _is_readable(self.control, _SECONDS_TO_START):
            message = self.control.recv(4096)
        self._directory.cleanup()
        if message == ANSWER:
            return
        self.close()
        if message[:1] == REFUSAL:
            logger.warning("response_format cannot be had with this tokenizer: %s", message[1:])
            raise RequestError(
                "response_format: this model's tokenizer cannot be constrained; ask for plain text"
            )
        raise ServiceUnavailableError("the process for response_format did not start; see the log")

    @property
    def is_alive(self) -> bool:
        """Whether it can start children."""
        return self._process.poll() is None

    def start(self, number: int) -> Connection:
        """Start a child; how to talk to it."""
        mine, other = socket.socketpair()
        with other:
            socket.send_fds(self.control, [CONTROL.pack(START, number)], [other.fileno()])
        return Connection(mine.detach())

    def end(self, number: int) -> None:
        """End a child; one that has ended already stays so."""
        with contextlib.suppress(OSError):
            self.control.send(CONTROL.pack(END, number))

    def close(self) -> None:
        """End it with all children."""
        self.control.close()
        self._process.kill()
        self._process.wait()


async def _is_readable(source: socket.socket | Connection, seconds: float) -> bool:
    """Wait until something arrives; false when the time has passed."""
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    loop.add_reader(source.fileno(), arrived.set)
    try:
        async with asyncio.timeout(seconds):
            await arrived.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(source.fileno())
    return True


class Grammar:
    """A compiled grammar in its process, for the texts of one request."""

    def __init__(
        self, pool: "Grammars", wanted: Wanted, vocabulary: _Vocabulary, number: int
    ) -> None:
        self.wanted = wanted
        self.vocabulary = vocabulary
        self.number = number
        self.is_broken = False
        self._pool = pool
        self._connection = vocabulary.start(number)
        # A cancelled text may still be in a step when the next request has the process.
        self._lock = threading.Lock()
        self._num_texts = 0

    def release(self) -> None:
        """The request is over; on the event loop."""
        self._pool.take_back(self)

    def end(self) -> None:
        """End the process."""
        self.is_broken = True
        self.vocabulary.end(self.number)

    def constraint(self, stop_ids: frozenset[int]) -> Constraint:
        """What one more text has to follow."""
        self._num_texts += 1
        return Constraint(partial(self.step, self._num_texts), stop_ids)

    async def compile(self) -> None:
        """Wait for the process to have compiled it.

        Raises:
            RequestError: it is invalid or passes a bound.
            ServiceUnavailableError: the process has ended otherwise.
        """
        order = f"{self.wanted.kind} {self.wanted.text}"
        with contextlib.suppress(OSError):
            self._connection.send_bytes(order.encode("utf-8", "replace"))
        arrived = await _is_readable(self._connection, _SECONDS_TO_WAIT_FOR_COMPILER)
        self._receive("compiling it", SECONDS_TO_COMPILE, has_arrived=arrived)

    def step(self, number: int, token_ids: Sequence[int]) -> tuple[bool, bytes]:
        """Whether a text may end after some more tokens, and the mask of those that may come; in any thread.

        Raises:
            RequestError: this step passes a bound.
            ServiceUnavailableError: the process has ended otherwise.
        """
        with self._lock:
            self._send(number, token_ids)
            arrived = self._connection.poll(_SECONDS_TO_WAIT_FOR_STEP)
            answer = self._receive("a token of its text", SECONDS_OF_TEXT, has_arrived=arrived)
        return bool(answer[0]), answer[1:]

    def forget_texts(self) -> None:
        """Make room for the texts of another request."""
        self._send(-1, [])

    def _send(self, number: int, token_ids: Sequence[int]) -> None:
        # Where nobody listens any more, the answer says why.
        with contextlib.suppress(OSError):
            self._connection.send_bytes(array.array("q", [number, *token_ids]).tobytes())

    def _receive(self, what: str, seconds: float, *, has_arrived: bool) -> bytes:
        message = b""
        if has_arrived:
            with contextlib.suppress(OSError, EOFError):
                message = self._connection.recv_bytes()
        kind, rest = message[:1], message[1:]
        if kind == ANSWER:
            return rest
        self.is_broken = True
        if kind == REFUSAL:
            raise RequestError(_refusal(self.wanted, rest.decode(), what))
        if kind == DEATH and int(rest) == signal.SIGPROF:
            raise RequestError(_refusal(self.wanted, TOO_SLOW, what, seconds))
        if kind == DEATH and int(rest) in _SIGNALS_OF_MEMORY:
            raise RequestError(_refusal(self.wanted, TOO_LARGE, what))
        raise ServiceUnavailableError("the process for response_format has ended; try again")


class Grammars:
    """Compiles grammars in processes of their own, few at a time; used on the event loop.

    Args:
        max_queue_size: requests of one client that may wait for it.
    """

    def __init__(self, *, max_queue_size: int) -> None:
        self._max_queue_size = max_queue_size
        self._vocabularies: OrderedDict[str, asyncio.Task[_Vocabulary]] = OrderedDict()
        self._waiting: list[_Place] = []
        self._compiling: set[Grammar] = set()
        self._num_compiling = 0
        self._num_live = 0
        # Clients that wait and have had a turn, the latest at the end.
        self._turns: list[str] = []
        self._kept: list[Grammar] = []
        self._refusals: OrderedDict[tuple[DocumentTokenizer, Wanted], tuple[float, str]] = (
            OrderedDict()
        )
        self._last_number = 0
        self._is_stopping = False

    async def open(
        self, wanted: Wanted, tokenizer: DocumentTokenizer, *, client: str = "", deadline: float
    ) -> Grammar:
        """A compiled grammar; who is cancelled meanwhile ends its process.

        Args:
            wanted: what to compile.
            tokenizer: of the model whose texts follow it.
            client: who asks.
            deadline: by time.monotonic().

        Raises:
            RequestError: the grammar is invalid or passes a bound.
            MissingExtraError: llguidance is not installed.
            ServiceBusyError: the client's share of the queue is full.
            ServiceUnavailableError: the service is stopping, or the deadline has passed.
        """
        if importlib.util.find_spec("llguidance") is None:
            raise MissingExtraError(
                "response_format needs the package llguidance on the service's machine; install it with: "
                f"{install_command('constraints')}"
            )
        key = tokenizer, wanted
        self._repeat_refusal(key)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                vocabulary = await self._vocabulary(tokenizer)
                kept = self._take_kept(wanted, vocabulary)
                return kept or await self._compile(wanted, vocabulary, client)
        except TimeoutError:
            raise ServiceUnavailableError(
                "the request took longer than the service allows"
            ) from None
        except RequestError as error:
            self._refusals[key] = time.monotonic(), str(error)
            if len(self._refusals) > _MAX_REFUSALS:
                self._refusals.popitem(last=False)
            raise

    def _repeat_refusal(self, key: tuple[DocumentTokenizer, Wanted]) -> None:
        """Refuse what was refused a moment ago, without trying again."""
        refused_at, message = self._refusals.get(key, (-_SECONDS_TO_REMEMBER_REFUSALS, ""))
        if time.monotonic() - refused_at < _SECONDS_TO_REMEMBER_REFUSALS and message:
            raise RequestError(message)

    async def _vocabulary(self, tokenizer: DocumentTokenizer) -> _Vocabulary:
        """The process that knows a vocabulary, started for the first request that needs it."""
        # The models that --watch opens one after the other have the same one.
        digest = await asyncio.to_thread(_digest, tokenizer)
        task = self._vocabularies.get(digest)
        if task is not None and task.done() and not _is_alive(task):
            _close(task)
            task = None
        if task is None:
            task = asyncio.create_task(_start(tokenizer))
            self._vocabularies[digest] = task
        self._vocabularies.move_to_end(digest)
        while len(self._vocabularies) > _MAX_VOCABULARIES:
            _, oldest = self._vocabularies.popitem(last=False)
            oldest.add_done_callback(_close)
        # Others wait for it too.
        return await asyncio.shield(task)

    def _take_kept(self, wanted: Wanted, vocabulary: _Vocabulary) -> Grammar | None:
        for grammar in self._kept:
            if grammar.wanted == wanted and grammar.vocabulary is vocabulary:
                self._kept.remove(grammar)
                grammar.forget_texts()
                return grammar
        return None

    async def _compile(self, wanted: Wanted, vocabulary: _Vocabulary, client: str) -> Grammar:
        await self._wait_for_place(client)
        try:
            self._last_number += 1
            grammar = Grammar(self, wanted, vocabulary, self._last_number)
        except OSError as error:
            self._free(was_compiling=True, was_live=True)
            raise ServiceUnavailableError(
                "the process for response_format has ended; try again"
            ) from error
        self._compiling.add(grammar)
        try:
            await grammar.compile()
        except BaseException as error:  # cancelled with its client, too
            grammar.is_broken = True
            self.take_back(grammar)
            if self._is_stopping and isinstance(error, Exception):
                raise ServiceUnavailableError("the service is stopping") from None
            raise
        finally:
            self._compiling.discard(grammar)
            self._free(was_compiling=True)
        return grammar

    def take_back(self, grammar: Grammar) -> None:
        """The request of a grammar is over: its process is kept for the next one, or ended."""
        if not (grammar.is_broken or self._is_stopping):
            self._kept.append(grammar)
            if len(self._kept) <= _MAX_KEPT:
                self._fill_places()
                return
            grammar = self._kept.pop(0)
        self._end(grammar)

    # ------------------------------------------------------------------ places

    async def _wait_for_place(self, client: str) -> None:
        if self._is_stopping:
            raise ServiceUnavailableError("the service is stopping")
        num_own = sum(1 for one in self._waiting if one.client == client)
        check_share(
            *(num_own + 1, len(self._waiting) - num_own),
            max_own=self._max_queue_size,
            seconds=(len(self._waiting) + 1) * SECONDS_TO_COMPILE / _MAX_COMPILING,
        )
        place = _Place(client)
        self._waiting.append(place)
        self._fill_places()
        try:
            await place.granted
        except BaseException:
            if place in self._waiting:
                self._waiting.remove(place)
            elif not place.granted.cancelled() and place.granted.exception() is None:
                self._free(was_compiling=True, was_live=True)
            raise

    def _fill_places(self) -> None:
        """Give places to those who wait, each client in turn."""
        # Who has been cancelled leaves in its turn of the event loop.
        self._waiting = [one for one in self._waiting if not one.granted.done()]
        while self._waiting and self._num_compiling < _MAX_COMPILING:
            if self._num_live >= _MAX_GRAMMARS:
                if not self._kept:
                    return
                self._end(self._kept.pop(0))
            waiting = {one.client for one in self._waiting}
            self._turns = [one for one in self._turns if one in waiting]
            place = min(
                self._waiting,
                key=lambda one: self._turns.index(one.client) if one.client in self._turns else -1,
            )
            self._turns = [*(one for one in self._turns if one != place.client), place.client]
            self._waiting.remove(place)
            self._num_compiling += 1
            self._num_live += 1
            place.granted.set_result(None)

    def _free(self, *, was_compiling: bool = False, was_live: bool = False) -> None:
        self._num_compiling -= was_compiling
        self._num_live -= was_live
        self._fill_places()

    def _end(self, grammar: Grammar) -> None:
        grammar.end()
        self._free(was_live=True)

    # ------------------------------------------------------------------ the end

    def drain(self, seconds: float) -> None:
        """Take nothing new: those who wait are refused, what is compiled has a moment to become ready."""
        self._is_stopping = True
        for place in self._waiting:
            if not place.granted.done():
                place.granted.set_exception(ServiceUnavailableError("the service is stopping"))
        self._waiting.clear()
        asyncio.get_running_loop().call_later(min(seconds, _SECONDS_TO_STOP), self._end_compiling)

    def _end_compiling(self) -> None:
        for grammar in self._compiling:
            grammar.end()

    def close(self) -> None:
        """End all processes."""
        for task in self._vocabularies.values():
            task.add_done_callback(_close)


@dataclass(eq=False)
class _Place:
    """A request that waits for its turn to be compiled."""

    client: str
    granted: "asyncio.Future[None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@lru_cache(maxsize=_MAX_VOCABULARIES)
def _digest(tokenizer: DocumentTokenizer) -> str:
    """The same for equal vocabularies; takes a moment."""
    text = f"{tokenizer.vocab_size} {tokenizer.end_id} {tokenizer.backend.to_str()}"
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


async def _start(tokenizer: DocumentTokenizer) -> _Vocabulary:
    # Writing a large vocabulary takes a moment.
    vocabulary = await asyncio.to_thread(_Vocabulary, tokenizer)
    await vocabulary.wait_until_ready()
    return vocabulary


def _is_alive(started: "asyncio.Task[_Vocabulary]") -> bool:
    has_started = not started.cancelled() and started.exception() is None
    return has_started and started.result().is_alive


def _close(started: "asyncio.Task[_Vocabulary]") -> None:
    if not started.cancelled() and started.exception() is None:
        started.result().close()


def _refusal(wanted: Wanted, reason: str, what: str, seconds: float = SECONDS_OF_STEP) -> str:
    """Why a grammar is not followed, with the bound that it passes."""
    if reason == TOO_SLOW:
        most = f"{seconds:g} seconds" if seconds > SECONDS_OF_STEP else f"{1000 * seconds:g} ms"
        each = " on average" if seconds == SECONDS_OF_STEP else ""
        why = f"is too complex: {what} takes more than {most} of processor time{each}"
    elif reason == TOO_LARGE:
        why = f"is too large: {what} takes more than {MAX_MEGABYTES} MB or too many states"
    else:
        return f"response_format: {wanted.name} cannot be followed"
    return f"response_format: {wanted.name} {why}; simplify it"
