"""Guesses change nothing but time: they are right where they can be, and left out where they lose."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from full_stack_transformer.generation import draft as draft_module
from full_stack_transformer.generation.blocks import KeyValueMemory
from full_stack_transformer.generation.draft import Draft
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.guesses import MAX_GUESSES, Guesses, look_up
from full_stack_transformer.generation.runners.torch import Runner, SequenceWork
from full_stack_transformer.generation.token_requests import TokenEvent, TokenRequest
from tests.generation.small_models import (
    CONTEXT,
    GREEDY,
    SAMPLED,
    VOCABULARY,
    WithoutAdapters,
    make_runner,
    random_prompts,
    run_events,
    run_requests,
    token_request,
)

EXACT = ("float32", "bfloat16", "int8")
SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "restricted": replace(SAMPLED, temperature=1.3, top_k=40, min_p=0.02, typical_p=0.9),
    "penalized": replace(
        GREEDY, presence_penalty=0.4, frequency_penalty=0.2, logit_bias={7: 3.0, 9: -3.0}
    ),
}


class _Counted(WithoutAdapters):
    """Computes as another runner; a clock goes on by what that may take."""

    def __init__(
        self, runner: Runner, clock: "_Clock", *, seconds: float, seconds_per_token: float = 0.0
    ) -> None:
        self.num_blocks, self.block_size = runner.num_blocks, runner.block_size
        self.max_length, self.vocab_size = runner.max_length, runner.vocab_size
        self.name, self.hidden_states = runner.name, runner.hidden_states
        self.seconds, self.seconds_per_token = seconds, seconds_per_token
        self.runner, self.num_runs = runner, 0
        self._clock = clock

    def run(self, work: Sequence[SequenceWork]) -> Tensor:
        self.num_runs += 1
        num_tokens = sum(len(one.token_ids) for one in work)
        self._clock.now += self.seconds + self.seconds_per_token * num_tokens
        return self.runner.run(work)


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _draft(runner: Runner, clock: Callable[[], float] = time.perf_counter) -> Draft:
    memory = KeyValueMemory("float32", 1, runner.block_size, runner.num_blocks)
    return Draft(runner, name="draft", vocab_size=VOCABULARY, memory=memory, clock=clock)


def _engine(runner: Runner, draft: Draft | None, clock: Callable[[], float]) -> Engine:
    engine = Engine(runner, num_slots=8, draft=draft)
    engine.guesses = Guesses(draft, clock=clock)
    return engine


def _always() -> Callable[[], float]:
    """A clock by which each step takes as long: so guesses pay whenever some are right."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


def _requests(sampling: Any = GREEDY, number: int = 4) -> list[TokenRequest]:
    return [
        token_request(
            prompt,
            max_new_tokens=30,
            sampling=sampling,
            seed=seed,
            min_new_tokens=5,
            stop_ids=frozenset({prompt[0]}),
            num_log_probabilities=2,
            forbids=lambda ids: ids[-1] % 11 == 3,
        )
        for seed, prompt in enumerate(random_prompts(number))
    ]


def _run_among_others(engine: Engine, requests: Sequence[TokenRequest]) -> list[list[TokenEvent]]:
    """Events of requests, beside others that end early."""
    company = [engine.add(token_request([4, 5, 6] * 5, 60, SAMPLED, seed=9)) for _ in range(2)]
    keys = [engine.add(request) for request in requests]
    events: dict[int, list[TokenEvent]] = {key: [] for key in [*company, *keys]}
    for number in itertools.count():
        if not engine.num_running:
            return [events[key] for key in keys]
        if number in (5, 11):
            engine.cancel(company.pop())
        for event in engine.step():
            events[event.request_id].append(replace(event, request_id=0))
    raise AssertionError


# ------------------------------------------------------------------ the same bytes


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("kind", EXACT)
def test_a_draft_changes_no_bit(kind: str, sampling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, ends and log-probabilities, with a draft that is right now and then."""
    monkeypatch.setattr(draft_module, "_MAX_READ_TOKENS", 16)
    monkeypatch.setattr(draft_module, "_MAX_UNREAD_TOKENS", 10)
    expected = run_events(
        Engine(make_runner(kind), num_slots=1, guesses=False), _requests(sampling)
    )
    engine = _engine(make_runner(kind), _draft(make_runner("int4", num_blocks=12)), _always())
    found = _run_among_others(engine, _requests(sampling))
    assert found == [[replace(event, request_id=0) for event in some] for some in expected]
    assert engine.guesses is not None
    counts = engine.guesses.counts["draft"]
    assert 0 < counts.num_accepted < counts.num_proposed


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_draft_that_is_the_model_is_nearly_always_right(sampling: Any) -> None:
    engine = _engine(make_runner("float32"), _draft(make_runner("float32")), _always())
    requests = [replace(one, forbids=None) for one in _requests(sampling)]
    for request in requests:
        run_requests(engine, [request])
    assert engine.guesses is not None
    counts = engine.guesses.counts["draft"]
    assert counts.num_proposed > 30
    # What is wrong lies behind the token that ends a text.
    assert counts.num_proposed - counts.num_accepted <= MAX_GUESSES * len(requests)
    assert counts.num_accepted > 0.9 * counts.num_proposed


def test_a_draft_keeps_nothing_of_requests_that_have_ended() -> None:
    """Its few blocks are enough for one text after the other."""
    draft = _draft(make_runner("float32", num_blocks=8))
    engine = _engine(make_runner("float32"), draft, _always())
    requests = _requests()
    expected = run_requests(Engine(make_runner("float32"), num_slots=1, guesses=False), requests)
    for _ in range(3):
        assert run_requests(engine, requests) == expected
        cancelled = engine.add(requests[0])
        for _ in range(5):
            engine.step()
        engine.cancel(cancelled)
    assert engine.guesses is not None
    before = engine.guesses.counts["draft"].num_proposed
    run_requests(engine, [token_request([5] * 60, 60, GREEDY, seed=0)])
    assert engine.guesses.counts["draft"].num_proposed > before


@pytest.mark.parametrize("vocab_size", [VOCABULARY - 90, VOCABULARY + 50])
def test_ids_that_only_one_of_the_two_models_has_are_never_guessed(vocab_size: int) -> None:
    class OfAnotherVocabulary(_Counted):
        def run(self, work: Sequence[SequenceWork]) -> Tensor:
            assert max(token for one in work for token in one.token_ids) < vocab_size
            logits = super().run(work)
            # The most likely one is one that only the draft has.
            more = torch.full((len(logits), max(0, vocab_size - VOCABULARY)), 1e4)
            return torch.cat([logits, more], dim=1)[:, :vocab_size]

    runner = OfAnotherVocabulary(make_runner("float32"), _Clock(), seconds=1)
    runner.vocab_size = vocab_size
    engine = _engine(make_runner("float32"), _draft(runner), _always())
    expected = run_requests(Engine(make_runner("float32"), num_slots=1, guesses=False), _requests())
    assert run_requests(engine, _requests()) == expected


def test_texts_that_are_too_long_for_the_draft_are_guessed_without_it() -> None:
    draft_runner = _Counted(make_runner("float32"), _Clock(), seconds=1)
    draft_runner.max_length = 20
    engine = _engine(make_runner("float32"), _draft(draft_runner), _always())
    run_requests(engine, [token_request([5, 6, 7, 8] * 6, 90, GREEDY, seed=0)])
    assert engine.guesses is not None and draft_runner.num_runs == 0
    assert engine.guesses.counts["prompt_lookup"].num_proposed > 0


# ------------------------------------------------------------------ a draft that fails


@pytest.mark.parametrize("failure", ["raises", "gives NaN", "gives NaN for one"])
def test_a_broken_draft_harms_nobody(failure: str, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(_Counted):
        def run(self, work: Sequence[SequenceWork]) -> Tensor:
            if failure == "raises":
                raise RuntimeError("the device is on fire")
            logits = super().run(work)
            logits[: 1 if failure.endswith("one") else None] = math.nan
            return logits

    draft = _draft(Broken(make_runner("float32"), _Clock(), seconds=1))
    engine = _engine(make_runner("float32"), draft, _always())
    expected = run_requests(Engine(make_runner("float32"), num_slots=1, guesses=False), _requests())
    assert run_requests(engine, _requests()) == expected
    assert engine.guesses is not None
    assert (engine.guesses.counts["draft"].num_accepted > 0) == failure.endswith("one")
    assert draft.is_broken == (failure == "raises")
    assert len([one for one in caplog.records if "draft" in one.message]) <= 1
    if draft.is_broken:
        assert all(
            is_off for (kind, _), is_off in engine.guesses.are_off.items() if kind == "draft"
        )


# ------------------------------------------------------------------ only where it pays


def _generate(engine: Engine, number: int, company: int = 1, prompt_tokens: int = 2) -> int:
    """New tokens of so many batches of requests that all go on to the end of the context."""
    num_tokens = 0
    for seed in range(number):
        prompts = [[7 + seed + other] * prompt_tokens for other in range(company)]
        requests = [token_request(one, CONTEXT - prompt_tokens, GREEDY, seed=0) for one in prompts]
        num_tokens += sum(map(len, run_requests(engine, requests)))
    return num_tokens


def test_a_useless_draft_is_switched_off_and_costs_little() -> None:
    clock = _Clock()
    # As slow as the model, and of nothing in common with it.
    useless = _Counted(make_runner("int8", "gpt2"), clock, seconds=1.0)
    engine = _engine(
        _Counted(make_runner("float32"), clock, seconds=1.0), _draft(useless, clock), clock
    )
    num_tokens = _generate(engine, 12)
    assert clock.now < 1.05 * num_tokens  # a plain step takes a second
    assert engine.guesses is not None and engine.guesses.are_off["draft", 1]
    assert useless.num_runs > 12  # it is tried again


def test_a_draft_is_used_again_once_it_pays() -> None:
    clock = _Clock()
    runner = _Counted(make_runner("float32"), clock, seconds=10.0)
    engine = _engine(
        _Counted(make_runner("float32"), clock, seconds=1.0), _draft(runner, clock), clock
    )
    _generate(engine, 1)
    assert engine.guesses is not None and engine.guesses.are_off["draft", 1]
    runner.seconds = 0.1
    clock.now += 1e5
    started = clock.now
    num_tokens = _generate(engine, 3)
    assert clock.now - started < 0.6 * num_tokens
    assert not engine.guesses.are_off["draft", 1]


def test_the_number_of_requests_decides_whether_guesses_pay() -> None:
    """As on a processor that has something else to do where there are many."""
    clock = _Clock()
    runner = _Counted(make_runner("float32"), clock, seconds=1.0, seconds_per_token=0.2)
    reader = make_runner("float32", num_blocks=99)
    draft = _draft(_Counted(reader, clock, seconds=0.3, seconds_per_token=0.3), clock)
    engine = _engine(runner, draft, clock)
    _generate(engine, 2)
    _generate(engine, 1, company=6)
    assert engine.guesses is not None
    are_off = engine.guesses.are_off
    assert not are_off["draft", 1]
    assert are_off["draft", 8]


def test_reading_long_prompts_is_part_of_the_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short answers to long prompts: a perfect draft would cost more than it saves."""
    monkeypatch.setattr(draft_module, "_MAX_READ_TOKENS", 64)
    monkeypatch.setattr(draft_module, "_MAX_UNREAD_TOKENS", 10)
    clock = _Clock()
    reader = _Counted(make_runner("float32"), clock, seconds=0.1, seconds_per_token=0.9)
    engine = _engine(
        _Counted(make_runner("float32"), clock, seconds=1.0), _draft(reader, clock), clock
    )
    num_tokens = sum(_generate(engine, 1, prompt_tokens=100) for _ in range(90))
    assert engine.guesses is not None and engine.guesses.are_off["draft", 1]
    assert clock.now < 1.1 * num_tokens


def test_what_followed_before_is_looked_up() -> None:
    text = torch.tensor([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2, 3])
    assert look_up(text, 4) == [6, 7, 1, 2]
    assert look_up(text, 1) == [6]
    assert look_up(text, 0) == look_up(text[:-1], 4) == look_up(text[:3], 4) == []
    assert look_up(torch.tensor([1, 1, 1, 1, 1]), 4) == [1]
