"""Grammars in processes of their own, without the service: bounds, places, ends."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.errors import RequestError, ServiceBusyError, ServiceUnavailableError
from full_stack_transformer.serving.workers.constraints import Grammar, Wanted
from full_stack_transformer.serving.workers.grammars import Grammars
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    open_saved_tokenizer,
)
from tests.serving.processes import descendants, has_ended, wait_for

DIGITS = Wanted("regex", "[0-9]{2}")
# A prime: its multiples have as many states.
BOMB = Wanted("json_schema", '{"type": "integer", "multipleOf": 62615533}')
QUEUE = 2


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> DocumentTokenizer:
    return open_saved_tokenizer(model_dir)


def _processes() -> list[int]:
    """Those that are tested here, without those of a service that other tests have started."""
    services = descendants(os.getpid(), "full_stack_transformer serve")
    others = {one for service in services for one in descendants(service)}
    return [one for one in descendants(os.getpid(), "grammar_process") if one not in others]


@asynccontextmanager
async def _grammars() -> AsyncIterator[Grammars]:
    grammars = Grammars(max_queue_size=QUEUE)
    try:
        yield grammars
    finally:
        grammars.close()
        await asyncio.sleep(0)
        wait_for(lambda: not _processes())


def _run(trial: Callable[[Grammars], Any]) -> None:
    async def run() -> None:
        async with _grammars() as grammars:
            await trial(grammars)

    asyncio.run(run())


def _open(
    grammars: Grammars, tokenizer: DocumentTokenizer, wanted: Wanted = DIGITS, client: str = ""
) -> "asyncio.Task[Grammar]":
    deadline = time.monotonic() + 60
    return asyncio.create_task(grammars.open(wanted, tokenizer, client=client, deadline=deadline))


def test_an_equal_grammar_finds_its_process_and_texts_begin_anew(
    tokenizer: DocumentTokenizer,
) -> None:
    [digit] = tokenizer.encode_text("7")

    async def trial(grammars: Grammars) -> None:
        grammar = await _open(grammars, tokenizer)
        stop = tokenizer.end_id
        forbids = grammar.constraint(frozenset({stop})).forbids
        other = grammar.constraint(frozenset({stop})).forbids
        assert [forbids([digit]), forbids([stop]), forbids([digit, digit])] == [False, True, False]
        assert [forbids([digit, digit, stop]), forbids([digit, digit, digit])] == [False, True]
        assert not other([digit, digit])
        grammars.take_back(grammar)
        before = _processes()
        again = await _open(grammars, tokenizer)
        assert _processes() == before
        assert again.constraint(frozenset({stop})).forbids([stop])
        grammars.take_back(again)

    _run(trial)


def test_a_child_has_one_socket_and_bounds(tokenizer: DocumentTokenizer) -> None:
    async def trial(grammars: Grammars) -> None:
        await _open(grammars, tokenizer)
        child = _processes()[-1]
        places = [str(one.readlink()) for one in Path(f"/proc/{child}/fd").iterdir()]
        assert sum(place.startswith("socket:") for place in places) == 1
        assert {place for place in places if not place.startswith("socket:")} == {"/dev/null"}
        limits = Path(f"/proc/{child}/limits").read_text()
        [line] = [line for line in limits.splitlines() if line.startswith("Max address space")]
        assert int(line.split()[3]) < 400_000_000

    _run(trial)


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (signal.SIGPROF, RequestError, "too complex: a token of its text takes more than 0.1 sec"),
        (signal.SIGABRT, RequestError, "too large: a token of its text takes more than 64 MB"),
        (signal.SIGKILL, ServiceUnavailableError, "has ended; try again"),
    ],
)
def test_a_child_that_dies_says_why_and_the_next_one_lives(
    tokenizer: DocumentTokenizer, number: int, error: type[Exception], words: str
) -> None:
    async def trial(grammars: Grammars) -> None:
        grammar = await _open(grammars, tokenizer)
        os.kill(_processes()[-1], number)
        with pytest.raises(error, match=words):
            grammar.constraint(frozenset()).forbids([1])
        grammars.take_back(grammar)
        grammars.take_back(await _open(grammars, tokenizer))

    _run(trial)


def test_a_vocabulary_whose_process_died_is_started_again(tokenizer: DocumentTokenizer) -> None:
    async def trial(grammars: Grammars) -> None:
        grammar = await _open(grammars, tokenizer)
        parent, child = _processes()
        os.kill(parent, signal.SIGKILL)
        wait_for(lambda: has_ended(child))
        with pytest.raises(ServiceUnavailableError, match="try again"):
            grammar.constraint(frozenset()).forbids([1])
        grammars.take_back(grammar)
        grammars.take_back(await _open(grammars, tokenizer))

    _run(trial)


def test_who_is_cancelled_ends_his_process_and_frees_his_place(
    tokenizer: DocumentTokenizer,
) -> None:
    async def trial(grammars: Grammars) -> None:
        grammars.take_back(await _open(grammars, tokenizer))
        bombs = [_open(grammars, tokenizer, BOMB) for _ in range(2)]
        await asyncio.sleep(0.1)
        for bomb in bombs:
            bomb.cancel()
        await asyncio.wait(bombs)
        other = Wanted("regex", "[a-z]{3}")
        grammars.take_back(await asyncio.wait_for(_open(grammars, tokenizer, other), 30))
        wait_for(lambda: len(_processes()) == 3)

    _run(trial)


def test_a_full_queue_refuses_and_clients_take_turns(tokenizer: DocumentTokenizer) -> None:
    async def trial(grammars: Grammars) -> None:
        grammars.take_back(await _open(grammars, tokenizer))
        first = [
            _open(grammars, tokenizer, Wanted("regex", f"{'a|' * number}b"), "first")
            for number in range(20)
        ]
        other = _open(grammars, tokenizer, Wanted("regex", "c"), "other")
        await asyncio.wait([*first, other])
        refused = [one for one in first if isinstance(one.exception(), ServiceBusyError)]
        assert 0 < len(refused) < len(first)
        error = refused[0].exception()
        assert isinstance(error, ServiceBusyError)
        assert error.retry_after_seconds >= 1
        grammars.take_back(other.result())

    _run(trial)


def test_draining_refuses_who_waits_and_ends_who_is_compiled(tokenizer: DocumentTokenizer) -> None:
    async def trial(grammars: Grammars) -> None:
        grammars.take_back(await _open(grammars, tokenizer))
        endless = Wanted("json_schema", '{"type": "integer", "multipleOf": 99991}')
        bombs = [_open(grammars, tokenizer, one) for one in (BOMB, endless)]
        await asyncio.sleep(0.05)
        grammars.drain(30)
        begun = time.monotonic()
        await asyncio.wait(bombs)
        assert time.monotonic() - begun < 5
        assert all(isinstance(bomb.exception(), ServiceUnavailableError) for bomb in bombs)

    _run(trial)


_OWNER = """
import asyncio, sys, time
from pathlib import Path
from full_stack_transformer.serving.workers.constraints import Wanted
from full_stack_transformer.serving.workers.grammars import Grammars
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer

async def main():
    grammars, tokenizer = Grammars(max_queue_size=2), open_saved_tokenizer(Path(sys.argv[1]))
    grammar = await grammars.open(Wanted("regex", "a*"), tokenizer, deadline=time.monotonic() + 60)
    print("ready", flush=True)
    await asyncio.sleep(300)

asyncio.run(main())
"""


def test_no_process_outlives_a_service_that_is_killed(model_dir: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(model_dir)], stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        children = descendants(owner.pid, "grammar_process")
        assert len(children) == 2
        owner.kill()
    wait_for(lambda: all(map(has_ended, children)))
