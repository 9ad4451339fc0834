"""Random schedules: each request gets the tokens that it gets alone, whatever comes and goes beside it.

python -m pytest -m slow tests/generation/test_schedules.py    10,000 schedules: about 25 minutes on one core
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.runners.torch import Runner
from full_stack_transformer.generation.token_requests import TokenEvent, TokenRequest
from tests.generation.small_models import (
    CONTEXT,
    RememberingRunner,
    make_runner,
    run_events,
    token_request,
    tokens_of,
)

LONG = pytest.mark.slow
# Types of weights, and of keys and values.
NATIVE_TYPES = [
    (weights, kv)
    for weights in ("float32", "bfloat16", "int8", "int4")
    for kv in ("float32", "bfloat16", "int8")
]


# ------------------------------------------------------------------ requests


def _ends_with(token_id: int, new_ids: Sequence[int]) -> bool:
    return new_ids[-1] == token_id


def _any_requests(
    numbers: random.Random, count: int, vocab_size: int, max_length: int
) -> Iterator[TokenRequest]:
    """Requests of all kinds; many share their beginning."""
    vocabulary = range(vocab_size)
    shared = [numbers.choice(vocabulary) for _ in range(max_length * 2 // 3)]
    for number in range(count):
        own = [numbers.choice(vocabulary) for _ in range(numbers.randint(1, max_length // 5))]
        prompt = [*shared[: numbers.choice((0, 18, 32, len(shared)))], *own]
        if number % 4 == 0:  # what stood before is guessed
            prompt = (own[:5] * max_length)[: len(prompt)]
        request = token_request(
            prompt_ids=prompt,
            max_new_tokens=numbers.randint(
                (max_length - len(prompt)) // 2, max_length - len(prompt)
            ),
            sampling=SamplingParameters(
                temperature=numbers.choice((0.0, 0.3, 1.0)),
                top_k=numbers.choice((0, 0, 5)),
                repetition_penalty=numbers.choice((1.0, 1.0, 0.8, 1.2)),
            ),
            seed=number,
            stop_ids=frozenset(numbers.sample(vocabulary, numbers.choice((0, 0, 0, 2)))),
            min_new_tokens=numbers.choice((0, 0, 3)),
            forbids=partial(_ends_with, numbers.choice(vocabulary)) if number % 3 == 0 else None,
            num_log_probabilities=numbers.choice((None, None, 1)),
            num_prompt_log_probabilities=1 if number % 5 == 0 else None,
        )
        yield replace(request, shares_with=numbers.choice(("", "", "", "other", None)))


@dataclass(frozen=True)
class _Pool:
    requests: list[TokenRequest]
    alone: list[list[TokenEvent]]
    """The events of each request in an engine of its own, without guesses."""


def _make_pool(runner: Runner, count: int) -> _Pool:
    requests = list(_any_requests(random.Random(11), count, runner.vocab_size, runner.max_length))
    alone = []
    for request in requests:
        engine = Engine(runner, num_slots=1, guesses=False)
        alone += run_events(engine, [replace(request, shares_with=None)])
    return _Pool(requests, alone)


# ------------------------------------------------------------------ a schedule


def _run_schedule(numbers: random.Random, engine: Engine, pool: _Pool) -> Counter[str]:
    """Let requests come and go at random; each event must be the one that the request has alone."""
    waiting = [numbers.randrange(len(pool.requests)) for _ in range(numbers.randint(3, 9))]
    running: dict[int, int] = {}
    events: dict[int, list[TokenEvent]] = {}
    counts: Counter[str] = Counter()
    patience = 10_000
    while waiting or running:
        if waiting and engine.num_free_slots and numbers.random() < 0.5:
            key = engine.add(pool.requests[waiting[-1]])
            running[key], events[key] = waiting.pop(), []
        if running and numbers.random() < 0.01:
            key = numbers.choice(sorted(running))
            engine.cancel(key)
            _check(events.pop(key), pool.alone[running.pop(key)])
            counts["cancelled"] += 1
        for event in engine.step():
            events[event.request_id].append(event)
            if event.finish_reason is not None:
                found, expected = events[event.request_id], pool.alone[running[event.request_id]]
                assert len(found) == len(expected)
                _check(found, expected)
                del running[event.request_id]
                counts["finished"] += 1
        assert engine.num_running == len(running)
        patience -= 1
        assert patience, "nobody makes progress"
    use = engine.block_use
    assert use.num_used == 0
    counts["put back"] += use.num_put_back
    counts["reused"] += use.num_reused_tokens
    return counts


def _check(found: Sequence[TokenEvent], expected: Sequence[TokenEvent]) -> None:
    """Tokens, ends and log-probabilities, bit for bit, as far as they came."""
    assert tokens_of(found) == tokens_of(expected)[: len(tokens_of(found))]
    assert [replace(one, request_id=0) for one in found] == [
        replace(one, request_id=0) for one in expected[: len(found)]
    ]


# ------------------------------------------------------------------ with a runner that remembers


@pytest.mark.parametrize(
    "num_schedules", [40, pytest.param(10_000, marks=LONG)], ids=["short", "long"]
)
def test_schedules_mix_nothing_up(num_schedules: int) -> None:
    """Blocks of any size, pools down to the least that holds one text."""
    numbers = random.Random(12)
    pool = _make_pool(RememberingRunner(), 60)
    counts: Counter[str] = Counter()
    for _ in range(num_schedules):
        block_size = numbers.choice((1, 2, 3, 8, 16, 32, 64))
        least = -(-RememberingRunner.max_length // block_size)
        runner = RememberingRunner(
            least + numbers.choice((0, 1, least // 2, 3 * least)), block_size
        )
        engine = Engine(
            runner,
            num_slots=numbers.randint(1, 6),
            guesses=numbers.random() < 0.7,
            max_chunk_tokens=numbers.choice((1, 9, 30, 256)),
        )
        counts += _run_schedule(numbers, engine, pool)
    assert counts["finished"] > 3 * num_schedules
    assert counts["put back"] > num_schedules / 2
    assert counts["reused"] > 10 * num_schedules


# ------------------------------------------------------------------ on the C++ decoder


@cache
def _native_pool(weights: str, kv: str, shape: str) -> _Pool:
    return _make_pool(make_runner(weights, shape, kv_dtype=kv), 12)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_schedules", [2, pytest.param(417, marks=LONG)], ids=["short", "long"])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize(("weights", "kv"), NATIVE_TYPES, ids=map("-".join, NATIVE_TYPES))
def test_schedules_change_no_bit_on_the_decoder(
    weights: str, kv: str, shape: str, num_schedules: int
) -> None:
    """12 types, 2 shapes."""
    numbers = random.Random(f"{weights} {kv} {shape}")
    pool = _native_pool(weights, kv, shape)
    counts: Counter[str] = Counter()
    for number in range(num_schedules):
        block_size = (16, 32, 64)[number % 3]
        least = CONTEXT // block_size
        runner = make_runner(
            weights,
            shape,
            num_blocks=least + numbers.choice((0, 1, least // 2, 2 * least)),
            block_size=block_size,
            kv_dtype=kv,  # type: ignore[arg-type]
        )
        engine = Engine(
            runner,
            num_slots=numbers.randint(2, 6),
            guesses=numbers.random() < 0.7,
            max_chunk_tokens=numbers.choice((9, 30, 256)),
        )
        counts += _run_schedule(numbers, engine, pool)
    assert counts["finished"] > num_schedules
