"""What texts must look like: JSON, a schema's JSON, or what matches a regular expression.

    Grammar, in a child process of its own <--step-- Constraint of each text <--forbids-- the engine's thread

llguidance (MIT; what vLLM, SGLang and llama.cpp use) computes for each state which tokens the grammar
allows; the engine asks here before it takes a token. A grammar of 100 bytes can take gigabytes and hours, so
each has a process with bounds: see `grammar_process` for its other end. Belongs to the extra `constraints`.
Knows nothing of HTTP.
"""

import array
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from full_stack_transformer.errors import RequestError, ServiceUnavailableError
from full_stack_transformer.serving.schemas import ResponseFormat
from full_stack_transformer.serving.workers import grammar_process
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
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

logger = logging.getLogger(__name__)

_MAX_SCHEMA_BYTES = 100_000
# Far more than the bounds on processor time: for a machine that is overloaded.
_SECONDS_TO_WAIT_FOR_COMPILER = 30.0
_SECONDS_TO_WAIT_FOR_STEP = 2.0
_SECONDS_TO_START = 60
HAS_ENDED = "the process for response_format has ended; try again"
# How a child ends for which there is no memory: Rust aborts, a stack that cannot grow is a bad address.
_SIGNALS_OF_MEMORY = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)

Forbids = Callable[[Sequence[int]], bool]
Step = Callable[[Sequence[int]], tuple[bool, bytes]]


@dataclass(frozen=True)
class Wanted:
    """A grammar that a body asks for."""

    kind: str
    """regex or json_schema."""
    text: str

    @property
    def name(self) -> str:
        """For people."""
        return "the regular expression" if self.kind == "regex" else "the schema"


def grammar_of(wanted: ResponseFormat) -> Wanted:
    """The grammar that a body asks for, not yet compiled.

    Raises:
        RequestError: the body lacks it, or it is too long.
    """
    if wanted.type == "regex":
        if wanted.regex is None:
            raise RequestError("response_format: the type regex needs the field regex")
        return Wanted("regex", wanted.regex)
    schema: Any = {"type": "object"}
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise RequestError("response_format: the type json_schema needs the field json_schema")
        schema = wanted.json_schema.json_schema
        if schema is True:  # llguidance reads objects only
            schema = {}
    text = json.dumps(schema)
    if len(text) > _MAX_SCHEMA_BYTES:
        raise RequestError(
            f"response_format: the schema has {len(text):,} bytes; at most {_MAX_SCHEMA_BYTES:,} are allowed"
        )
    return Wanted("json_schema", text)


class Constraint:
    """Follows one text and says which tokens may not come next.

    Args:
        step: told of some more tokens of the text, says whether it may end there, and in a bit for each token
            whether that may come next.
        stop_ids: allowed where the text may end.
    """

    def __init__(self, step: Step, stop_ids: frozenset[int]) -> None:
        self._step = step
        self._stop_ids = stop_ids
        self._num_consumed = 0
        self._mask: bytes | None = None
        self._may_end = False

    def forbids(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of the new tokens may not follow the others.

        Called by the engine in the order of the text; a text that cannot go on may only end.

        Raises:
            RequestError: the grammar takes too much time or memory here.
            ServiceUnavailableError: its process has ended.
        """
        *before, candidate = token_ids
        if len(before) > self._num_consumed or self._mask is None:
            new_ids = before[self._num_consumed :]
            self._num_consumed = len(before)
            self._may_end, self._mask = self._step(new_ids)
        if candidate in self._stop_ids:
            return not self._may_end
        place, bit = divmod(candidate, 8)
        return place >= len(self._mask) or not self._mask[place] >> bit & 1


def any_of(first: Forbids | None, second: Forbids) -> Forbids:
    """What either forbids."""
    if first is None:
        return second
    return lambda token_ids: first(token_ids) or second(token_ids)


# ---------------------------------------------------------------------- the processes


class Vocabulary:
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

    def __init__(self, wanted: Wanted, vocabulary: Vocabulary, number: int) -> None:
        self.wanted = wanted
        self.vocabulary = vocabulary
        self.number = number
        self.is_broken = False
        self._has_ended = False
        self._connection = vocabulary.start(number)
        # A cancelled text may still be in a step when the next request has the process.
        self._lock = threading.Lock()
        self._num_texts = 0

    def end(self) -> None:
        """End the process."""
        self.is_broken = self._has_ended = True
        self.vocabulary.end(self.number)
        # A step under way, or the compiling, ends at once and does it then.
        if self._lock.acquire(blocking=False):
            self._connection.close()
            self._lock.release()

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
        with self._lock:
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
            if self._connection.closed:
                raise ServiceUnavailableError(HAS_ENDED)
            try:
                self._send(number, token_ids)
                arrived = self._connection.poll(_SECONDS_TO_WAIT_FOR_STEP)
                answer = self._receive("a token of its text", SECONDS_OF_TEXT, has_arrived=arrived)
            finally:
                if self._has_ended:
                    self._connection.close()
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
        raise ServiceUnavailableError(HAS_ENDED)


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
