"""Which grammars are compiled now, which wait, and which are kept for the next request with an equal one.

    route --open--> waiting, by clients --place--> compiling --Grammar--> route --take_back--> kept or ended

Knows nothing of HTTP.
"""

import asyncio
import hashlib
import importlib.util
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache

from full_stack_transformer.errors import (
    MissingExtraError,
    RequestError,
    ServiceUnavailableError,
    install_command,
)
from full_stack_transformer.serving.workers.constraints import (
    HAS_ENDED,
    Grammar,
    Vocabulary,
    Wanted,
)
from full_stack_transformer.serving.workers.thread import check_share
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

# Requests with a grammar that have a process, and those whose grammar is compiled now.
_MAX_GRAMMARS = 24
_MAX_COMPILING = max(1, (os.cpu_count() or 1) // 4)
# Grammars whose process is kept for the next request with the same one.
_MAX_KEPT = 4
_MAX_VOCABULARIES = 8
_SECONDS_TO_REMEMBER_REFUSALS = 300.0
_MAX_REFUSALS = 1024
_SECONDS_TO_STOP = 0.5


class Grammars:
    """Compiles grammars in processes of their own, few at a time; used on the event loop.

    Args:
        max_queue_size: requests of one client that may wait for it.
    """

    def __init__(self, *, max_queue_size: int) -> None:
        self._max_queue_size = max_queue_size
        self._vocabularies: OrderedDict[str, asyncio.Task[Vocabulary]] = OrderedDict()
        self._waiting: list[_Place] = []
        self._compiling: set[Grammar] = set()
        self._num_compiling = 0
        self._num_live = 0
        # Clients that wait and have had a turn, the latest at the end.
        self._turns: list[str] = []
        self._kept: list[Grammar] = []
        # When and why, by digests of vocabulary and grammar.
        self._refusals: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._last_number = 0
        self._seconds_per_grammar = 0.1
        self._is_stopping = False

    async def open(
        self, wanted: Wanted, tokenizer: DocumentTokenizer, *, client: str = "", deadline: float
    ) -> Grammar:
        """A compiled grammar, for `take_back` in the end; who is cancelled meanwhile ends its process.

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
        # The models that --watch opens one after the other have the same vocabulary.
        digest = await asyncio.to_thread(_digest, tokenizer)
        key = _sha256(f"{digest} {wanted.kind} {wanted.text}")
        self._repeat_refusal(key)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                vocabulary = await self._vocabulary(digest, tokenizer)
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

    def _repeat_refusal(self, key: str) -> None:
        """Refuse what was refused a moment ago, without trying again."""
        refused_at, message = self._refusals.get(key, (-_SECONDS_TO_REMEMBER_REFUSALS, ""))
        if time.monotonic() - refused_at < _SECONDS_TO_REMEMBER_REFUSALS and message:
            raise RequestError(message)

    async def _vocabulary(self, digest: str, tokenizer: DocumentTokenizer) -> Vocabulary:
        """The process that knows a vocabulary, started for the first request that needs it."""
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

    def _take_kept(self, wanted: Wanted, vocabulary: Vocabulary) -> Grammar | None:
        for grammar in self._kept:
            if grammar.wanted == wanted and grammar.vocabulary is vocabulary:
                self._kept.remove(grammar)
                grammar.forget_texts()
                return grammar
        return None

    async def _compile(self, wanted: Wanted, vocabulary: Vocabulary, client: str) -> Grammar:
        await self._wait_for_place(client)
        try:
            self._last_number += 1
            grammar = Grammar(wanted, vocabulary, self._last_number)
        except OSError as error:
            self._free(was_compiling=True, was_live=True)
            raise ServiceUnavailableError(HAS_ENDED) from error
        self._compiling.add(grammar)
        begun = time.monotonic()
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
            taken = time.monotonic() - begun
            self._seconds_per_grammar += 0.1 * (taken - self._seconds_per_grammar)
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
            seconds=(len(self._waiting) + 1) * self._seconds_per_grammar / _MAX_COMPILING,
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
    return _sha256(f"{tokenizer.vocab_size} {tokenizer.end_id} {tokenizer.backend.to_str()}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


async def _start(tokenizer: DocumentTokenizer) -> Vocabulary:
    # Writing a large vocabulary takes a moment.
    vocabulary = await asyncio.to_thread(Vocabulary, tokenizer)
    await vocabulary.wait_until_ready()
    return vocabulary


def _is_alive(started: "asyncio.Task[Vocabulary]") -> bool:
    has_started = not started.cancelled() and started.exception() is None
    return has_started and started.result().is_alive


def _close(started: "asyncio.Task[Vocabulary]") -> None:
    if not started.cancelled() and started.exception() is None:
        started.result().close()
