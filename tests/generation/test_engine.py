"""The engine equals plain generation, whatever joins and leaves beside a request."""

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.errors import RequestError
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.runners.torch import Runner, SequenceWork, TorchRunner
from full_stack_transformer.generation.token_requests import TokenEvent, TokenRequest
from tests.generation.small_models import (
    CONTEXT,
    GREEDY,
    RUNNERS,
    SAMPLED,
    SHAPES,
    VOCABULARY,
    RememberingRunner,
    WithoutAdapters,
    hidden_states,
    make_runner,
    random_prompts,
    run_events,
    run_requests,
    small_backbone,
    token_request,
    tokens_of,
)

MakeRunner = Callable[[], Runner]
LONG = pytest.mark.slow


@pytest.fixture(params=[(kind, shape) for shape in SHAPES for kind in RUNNERS], ids="-".join)
def new_runner(request: pytest.FixtureRequest) -> MakeRunner:
    """Makes runners: every kind, of every shape."""
    kind, shape = request.param
    make_runner(kind, shape)  # skips here
    return lambda: make_runner(kind, shape, num_blocks=32 * CONTEXT // 16)


def _generated(backbone: Backbone, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    ids = backbone.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    new_ids: list[int] = ids[0, len(prompt) :].tolist()
    return new_ids


def _run_in_company(engine: Engine, requests: Sequence[TokenRequest]) -> list[list[int]]:
    """Tokens of the requests, while others join, are cancelled and fail beside them."""
    numbers = random.Random(7)
    waiting, running = list(enumerate(requests)), dict[int, int]()
    company: list[int] = []
    results: list[list[int]] = [[] for _ in requests]
    while waiting or running:
        if waiting and engine.num_free_slots and numbers.random() < 0.6:
            number, request = waiting.pop(0)
            running[engine.add(request)] = number
        if engine.num_free_slots and numbers.random() < 0.3:
            prompt = [numbers.randrange(3, VOCABULARY) for _ in range(numbers.randint(1, 90))]
            company.append(
                engine.add(token_request(prompt, 9, SAMPLED, seed=numbers.randrange(99)))
            )
        if company and numbers.random() < 0.2:
            engine.cancel(company.pop(numbers.randrange(len(company))))
        for event in engine.step():
            if event.request_id in running:
                number = running[event.request_id]
                results[number] += tokens_of([event])
                if event.finish_reason is not None:
                    del running[event.request_id]
    return results


@pytest.mark.parametrize(
    ("num_prompts", "max_new_tokens"),
    [(12, 12), pytest.param(200, 24, marks=LONG)],
    ids=["short", "long"],
)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("torch", "llama"),
        ("torch", "gpt2"),
        ("torch", "cohere"),
        ("float32", "llama"),
        ("float32", "gpt2"),
    ],
)
def test_greedy_equals_transformers_whatever_joins_and_leaves(
    kind: str, shape: str, num_prompts: int, max_new_tokens: int
) -> None:
    requests = [
        token_request(prompt, max_new_tokens, GREEDY, seed=0)
        for prompt in random_prompts(num_prompts)
    ]
    ours = _run_in_company(Engine(make_runner(kind, shape), num_slots=5), requests)
    backbone = small_backbone(shape)
    for request, tokens in zip(requests, ours, strict=True):
        assert tokens == _generated(backbone, request.prompt_ids, max_new_tokens)


def test_a_prompt_read_in_chunks_gives_the_same(new_runner: MakeRunner) -> None:
    prompt = (random_prompts(40)[-1] * 9)[:100]
    request = token_request(prompt, max_new_tokens=8, sampling=GREEDY, seed=0)
    whole = run_requests(Engine(new_runner(), num_slots=1), [request])
    in_chunks = Engine(new_runner(), num_slots=1, max_chunk_tokens=7)
    assert run_requests(in_chunks, [request]) == whole


def test_a_seed_gives_the_same_tokens_alone_and_in_company(new_runner: MakeRunner) -> None:
    requests = [
        token_request(prompt, max_new_tokens=10, sampling=SAMPLED, seed=number)
        for number, prompt in enumerate(random_prompts(32))
    ]
    together = run_requests(Engine(new_runner(), num_slots=32), requests)
    assert len({tuple(tokens) for tokens in together}) > 20
    alone = Engine(new_runner(), num_slots=1)
    for request, tokens in list(zip(requests, together, strict=True))[::5]:
        assert run_requests(alone, [request]) == [tokens]
    assert _run_in_company(Engine(new_runner(), num_slots=4), requests[::4]) == together[::4]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_guessing_changes_no_token(new_runner: MakeRunner, sampling: SamplingParameters) -> None:
    """Prompts that repeat themselves, so that what followed before is guessed, rightly and wrongly."""
    sampling = replace(sampling, repetition_penalty=0.8)
    requests = [
        token_request(
            (prompt[:9] * 5)[:40],
            max_new_tokens=24,
            sampling=sampling,
            seed=number,
            min_new_tokens=5,
            stop_ids=frozenset({prompt[0]}),
            num_log_probabilities=2,
        )
        for number, prompt in enumerate(random_prompts(4))
    ]
    with_guesses = run_events(Engine(new_runner(), num_slots=2), requests)
    without = run_events(Engine(new_runner(), num_slots=2, guesses=False), requests)
    for events, expected in zip(with_guesses, without, strict=True):
        assert tokens_of(events) == tokens_of(expected)
        assert [one.finish_reason for one in events] == [one.finish_reason for one in expected]
        for one, other in zip(events, expected, strict=True):
            if one.scored and other.scored:
                value = other.scored.log_probability
                assert one.scored.log_probability == pytest.approx(value, abs=1e-4)


def test_right_guesses_save_steps() -> None:
    request = token_request([5, 6, 7, 8] * 5, 40, GREEDY, seed=0)
    counts = []
    for guesses in (True, False):
        engine = Engine(_RepeatingRunner(period=4), num_slots=1, guesses=guesses)
        engine.add(request)
        num_steps, tokens = 0, []
        while engine.num_running:
            tokens += tokens_of(engine.step())
            num_steps += 1
        assert tokens == [5, 6, 7, 8] * 10
        counts.append(num_steps)
    # Each second step is one without guesses, as long as it is not known whether they pay.
    assert counts[0] < counts[1] / 2


class _RepeatingRunner(RememberingRunner):
    """Says again what stood `period` tokens before."""

    def __init__(self, period: int) -> None:
        super().__init__()
        self._period = period

    def _scores(self, token_ids: Sequence[int]) -> Tensor:
        return torch.eye(self.vocab_size)[token_ids[-self._period]]


# ------------------------------------------------------------------ what blocks hold


def test_a_chat_that_goes_on_is_not_read_again(new_runner: MakeRunner) -> None:
    first = token_request(random_prompts(3)[2], 20, GREEDY, seed=0)
    engine = Engine(new_runner(), num_slots=3)
    [answer] = run_requests(engine, [first])
    longer = replace(first, prompt_ids=[*first.prompt_ids, *answer, 9, 8, 7])
    assert engine.block_use.num_reused_tokens == 0
    again = run_requests(engine, [longer])
    # The last token of the answer has never been read, and only full blocks are found.
    num_read = len(first.prompt_ids) + len(answer) - 1
    assert engine.block_use.num_reused_tokens == num_read // 16 * 16 > len(first.prompt_ids)
    assert again == run_requests(Engine(new_runner(), num_slots=1), [longer])


def test_samples_of_one_prompt_read_it_once(new_runner: MakeRunner) -> None:
    prompt = (random_prompts(3)[1] * 9)[:80]
    requests = [token_request(prompt, 8, SAMPLED, seed=seed) for seed in range(5)]
    engine = Engine(new_runner(), num_slots=5)
    together = run_requests(engine, requests)
    # The last token is always read, and with it the block that it ends.
    assert engine.block_use.num_reused_tokens == 4 * 64
    alone = Engine(new_runner(), num_slots=1)
    assert together == [run_requests(alone, [one])[0] for one in requests]
    assert len({tuple(tokens) for tokens in together}) > 1


def test_who_shares_nothing_finds_nothing() -> None:
    prompt = list(range(40))
    requests = [
        replace(token_request(prompt, 5, GREEDY, seed=0), shares_with=one)
        for one in ("a", "b", None, None, "a")
    ]
    engine = Engine(RememberingRunner(), num_slots=1)
    reused = []
    for request in requests:
        before = engine.block_use.num_reused_tokens
        run_requests(engine, [request])
        reused.append(engine.block_use.num_reused_tokens - before)
    assert reused == [0, 0, 0, 0, 32]


def test_a_request_that_was_put_back_goes_on_as_if_undisturbed(new_runner: MakeRunner) -> None:
    """Two long texts where there are blocks for one and a half."""
    requests = [
        token_request(
            prompt[:20],
            100,
            SAMPLED,
            seed=number,
            num_log_probabilities=1,
            num_prompt_log_probabilities=0,
        )
        for number, prompt in enumerate(random_prompts(40, max_tokens=40)[-2:])
    ]
    runner = new_runner()
    with_room = run_events(Engine(runner, num_slots=2), requests)
    runner.num_blocks = 12
    engine = Engine(runner, num_slots=2)
    found = run_events(engine, requests)
    assert engine.block_use.num_put_back > 0
    for events, expected in zip(found, with_room, strict=True):
        if "C++" in runner.name:
            assert events == [replace(one, request_id=events[0].request_id) for one in expected]
        else:
            assert len(events) == len(expected)
            assert len(events[0].scored_prompt) == len(expected[0].scored_prompt)


def test_a_step_that_fails_leaves_nothing_wrong_behind() -> None:
    prompt = list(range(30))
    runner = _FailingRunner()
    engine = Engine(runner, num_slots=1)
    run_requests(engine, [token_request(prompt, 5, GREEDY, seed=0)])
    other = token_request([*prompt[:20], *prompt[25:], 1, 2, 3], 5, GREEDY, seed=0)
    expected = run_requests(Engine(RememberingRunner(), num_slots=1), [other])
    runner.is_failing = True
    engine.add(other)
    [event] = engine.step()
    assert (event.finish_reason, str(event.problem)) == (
        "error",
        "memory is short for this request; ask for less, or try again later",
    )
    runner.is_failing = False
    assert run_requests(engine, [other]) == expected


class _FailingRunner(RememberingRunner):
    is_failing = False

    def run(self, work: Sequence[SequenceWork]) -> Tensor:
        logits = super().run(work)
        if self.is_failing:
            raise MemoryError
        return logits


@pytest.mark.parametrize("room", [[100], [3, 0], [0, 5, 5], [4, 4, 0]], ids=str)
def test_where_the_machine_has_no_memory_left_requests_wait_or_end_alone(room: list[int]) -> None:
    """Another process may have taken what was free; the last number stays."""
    prompts = [[number] * 30 for number in range(1, 4)]
    requests = [token_request(prompt, 20, GREEDY, seed=0) for prompt in prompts]
    expected = run_requests(Engine(RememberingRunner(), num_slots=3), requests)
    looks = iter(room)
    left = [0]

    def find_room() -> int:
        left[0] = next(looks, left[0])
        return left[0]

    engine = Engine(RememberingRunner(), num_slots=3, find_room=find_room)
    for events, tokens in zip(run_events(engine, requests), expected, strict=True):
        if events[-1].finish_reason == "error":
            assert "memory is short for this request" in str(events[-1].problem)
            assert tokens_of(events) == tokens[: len(tokens_of(events))]
            assert sum(room) < 100
        else:
            assert tokens_of(events) == tokens


# ------------------------------------------------------------------ how requests end


def test_a_stop_token_ends_and_is_left_out(new_runner: MakeRunner) -> None:
    request = token_request(random_prompts(1)[0], max_new_tokens=10, sampling=GREEDY, seed=0)
    [tokens] = run_requests(Engine(new_runner(), num_slots=1), [request])
    stopping = replace(request, stop_ids=frozenset({tokens[4]}))
    first = tokens.index(tokens[4])
    assert run_requests(Engine(new_runner(), num_slots=1), [stopping]) == [tokens[:first]]


def test_nothing_ends_a_request_before_its_minimum(new_runner: MakeRunner) -> None:
    everything = frozenset(range(VOCABULARY)) - {7, 8}
    request = token_request([5, 6], 10, SAMPLED, seed=0, stop_ids=everything, min_new_tokens=6)
    [events] = run_events(Engine(new_runner(), num_slots=1), [request])
    assert len(tokens_of(events)) >= 6
    assert set(tokens_of(events)) <= {7, 8}


def test_forbidden_tokens_are_drawn_again(new_runner: MakeRunner) -> None:
    request = token_request(random_prompts(1)[0], max_new_tokens=10, sampling=GREEDY, seed=0)
    [tokens] = run_requests(Engine(new_runner(), num_slots=1), [request])
    forbidding = replace(request, forbids=lambda new_ids: new_ids[-1] in set(tokens))
    [others] = run_requests(Engine(new_runner(), num_slots=1), [forbidding])
    assert len(others) == 10
    assert not set(others) & set(tokens)
    nothing = replace(request, forbids=lambda new_ids: True)
    assert run_requests(Engine(new_runner(), num_slots=1), [nothing]) == [[]]


def test_what_is_allowed_is_drawn_as_if_the_rest_did_not_exist() -> None:
    """Of 40 tokens all but the unlikely odd ones are forbidden."""
    runner = RememberingRunner()
    scores = runner._scores([3])
    odd = torch.full_like(scores, -torch.inf)
    odd[1::2] = scores[1::2]
    counts = torch.zeros(40)
    engine = Engine(runner, num_slots=1)
    for seed in range(400):
        request = token_request(
            [3], 1, SamplingParameters(), seed, forbids=lambda new_ids: new_ids[-1] % 2 == 0
        )
        [[token_id]] = run_requests(engine, [request])
        counts[token_id] += 1
    torch.testing.assert_close(counts / 400, odd.softmax(dim=-1), atol=0.07, rtol=0.0)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_end_a_request_with_an_error_and_no_token(
    value: float, sampling: SamplingParameters
) -> None:
    engine = Engine(_BreakingRunner(value), num_slots=2)
    broken = engine.add(token_request([5, 6], 5, sampling, seed=0))
    sound = engine.add(token_request([5, 7], 5, sampling, seed=0))
    events = [*engine.step(), *engine.step()]
    ends = [event for event in events if event.finish_reason == "error"]
    assert [(event.request_id, event.token_id) for event in ends] == [(broken, None)]
    assert "weights are broken" in str(ends[0].problem)
    assert all(event.token_id is None for event in events if event.request_id == broken)
    assert tokens_of([event for event in events if event.request_id == sound])
    scored = token_request([5, 6, 7], 0, GREEDY, seed=0, num_prompt_log_probabilities=0)
    engine = Engine(_BreakingRunner(value), num_slots=2)
    [[event]] = run_events(engine, [scored])
    assert (event.token_id, event.finish_reason) == (None, "error")


class _BreakingRunner(RememberingRunner):
    """One of the scores after token 6 is none."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def _scores(self, token_ids: Sequence[int]) -> Tensor:
        scores = super()._scores(token_ids)
        scores[9] = self._value if 6 in token_ids else 0.0
        return scores


def test_weights_that_are_no_numbers_are_noticed() -> None:
    backbone = copy.deepcopy(small_backbone("llama"))
    with torch.no_grad():
        backbone.get_input_embeddings().weight[6] = float("nan")
    engine = Engine(TorchRunner(backbone, num_blocks=4), num_slots=1)
    request = token_request([5, 6], 5, GREEDY, seed=0)
    assert run_events(engine, [request]) == [[TokenEvent(0, None, "error")]]


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"),
    [
        ([], 5, "no tokens"),
        ([5] * 100, 29, "context is 128 tokens, but the prompt has 100 and 29"),
        ([5, 300], 5, "between 0 and 299"),
        ([-1], 5, "between 0 and 299"),
        ([5], 0, "max_new_tokens is 0"),
    ],
)
def test_what_can_never_be_generated_is_refused(
    prompt: list[int], max_new_tokens: int, message: str
) -> None:
    engine = Engine(make_runner("torch"), num_slots=1)
    with pytest.raises(RequestError, match=message):
        engine.add(token_request(prompt, max_new_tokens, GREEDY, seed=0))
    assert engine.num_free_slots == 1


# ------------------------------------------------------------------ what else comes out


def test_log_probabilities_are_those_of_the_model(new_runner: MakeRunner) -> None:
    """Of the prompt's tokens and of the new ones, before any penalty or temperature."""
    prompt = random_prompts(5)[4][:40]
    request = token_request(
        prompt, 6, SAMPLED, seed=1, num_log_probabilities=3, num_prompt_log_probabilities=2
    )
    runner = new_runner()
    [events] = run_events(Engine(runner, num_slots=1), [request])
    whole = [*prompt, *tokens_of(events)]
    logits = runner.run([SequenceWork(range(8), 0, whole, num_logits=len(whole))])
    expected = logits.log_softmax(dim=-1)
    scored = [*events[0].scored_prompt, *(event.scored for event in events)]
    assert len(scored) == len(whole) - 1
    for place, one in enumerate(scored):
        assert one is not None and one.token_id == whole[place + 1]
        assert one.log_probability == pytest.approx(float(expected[place, one.token_id]), abs=1e-3)
        num_alternatives = 2 if place < len(prompt) - 1 else 3
        best = expected[place].topk(num_alternatives).values.tolist()
        assert [value for _, value in one.alternatives] == pytest.approx(best, abs=1e-3)


def test_a_prompt_is_scored_without_a_new_token(new_runner: MakeRunner) -> None:
    engine = Engine(new_runner(), num_slots=1)
    for prompt in ([5], list(range(3, 3 + CONTEXT))):
        request = token_request(prompt, 0, GREEDY, seed=0, num_prompt_log_probabilities=0)
        [[event]] = run_events(engine, [request])
        assert (event.token_id, event.finish_reason) == (None, "length")
        assert [one.token_id for one in event.scored_prompt] == prompt[1:]


@pytest.mark.parametrize("shape", [*SHAPES, "cohere"])
@pytest.mark.parametrize("kind", ["torch", "float32"])
def test_hidden_states_are_those_after_the_last_norm(kind: str, shape: str) -> None:
    if (kind, shape) == ("float32", "cohere"):
        pytest.skip("the C++ decoder does not know cohere")
    engine = Engine(make_runner(kind, shape), num_slots=3, max_chunk_tokens=20)
    prompts = random_prompts(7)
    for prompt, states in zip(prompts, hidden_states(engine, prompts), strict=True):
        with torch.inference_mode():
            output = small_backbone(shape)(torch.tensor([prompt]), output_hidden_states=True)
        torch.testing.assert_close(states, output.hidden_states[-1][0], atol=1e-4, rtol=1e-4)
    # What the blocks hold now serves those who come after.
    request = token_request([*prompts[-1], 5], 5, GREEDY, seed=0)
    assert run_requests(engine, [request])[0] == _generated(
        small_backbone(shape), request.prompt_ids, 5
    )


def test_hidden_states_leave_requests_under_way_alone(new_runner: MakeRunner) -> None:
    requests = [token_request(prompt, 9, GREEDY, seed=0) for prompt in random_prompts(2)]
    readings = [TokenRequest.for_hidden_states(prompt) for prompt in random_prompts(4)]
    expected = run_requests(Engine(new_runner(), num_slots=3), requests)
    found = run_events(Engine(new_runner(), num_slots=3), [*readings, *requests])
    assert [tokens_of(events) for events in found[4:]] == expected
    for reading, events in zip(readings, found, strict=False):
        assert events[-1].hidden_states is not None
        assert len(events[-1].hidden_states) == len(reading.prompt_ids)


# ------------------------------------------------------------------ a request that fails, among others


class _PoisonedRunner(WithoutAdapters):
    """Computes as another one, but fails on work that has a certain token."""

    def __init__(self, runner: Runner, poison: int, spoil: float | None = None) -> None:
        self._runner, self._poison, self._spoil = runner, poison, spoil
        self.num_blocks, self.block_size = runner.num_blocks, runner.block_size
        self.max_length, self.vocab_size = runner.max_length, runner.vocab_size
        self.name, self.hidden_states = runner.name, runner.hidden_states

    def run(self, work: Sequence[SequenceWork]) -> Tensor:
        poisoned = [self._poison in one.token_ids for one in work]
        if any(poisoned) and self._spoil is None:
            raise RuntimeError("the device is on fire")
        logits = self._runner.run(work)
        rows = [bad for bad, one in zip(poisoned, work, strict=True) for _ in range(one.num_logits)]
        if self._spoil is not None:
            logits = logits.clone()  # the runner's own may not be written to
            logits[torch.tensor(rows, dtype=torch.bool)] = self._spoil
        return logits


def _explode(token_ids: Sequence[int]) -> bool:
    raise ZeroDivisionError


POISON = 17
POISONED = {
    "the runner raises": (None, {}),
    "the runner gives NaN": (math.nan, {}),
    "the runner gives infinity": (math.inf, {}),
    "scores become infinite": ("params", {"repetition_penalty": 1e-40, "typical_p": 0.5}),
    "scores become NaN": ("params", {"logit_bias": {5: math.nan}}),
    "what is forbidden raises": ("forbids", {}),
}


@pytest.mark.parametrize(("spoil", "given"), POISONED.values(), ids=POISONED)
@pytest.mark.parametrize("kind", ["torch", "bfloat16"])
def test_a_request_that_fails_ends_alone(kind: str, spoil: Any, given: dict[str, Any]) -> None:
    others = [
        TokenRequest(
            [number, 3, 4],
            replace(SAMPLED, max_new_tokens=30, seed=number, logit_bias={POISON: -100}),
        )
        for number in range(20, 23)
    ]
    poisoned = TokenRequest(
        [5, POISON],
        replace(SAMPLED, max_new_tokens=30, seed=1, **given),
        forbids=_explode if spoil == "forbids" else None,
    )
    runner = make_runner(kind)
    expected = [tokens for tokens, _ in _results(Engine(runner, num_slots=4), others)]
    if not isinstance(spoil, str):
        runner = _PoisonedRunner(make_runner(kind), POISON, spoil)
    engine = Engine(runner, num_slots=4)
    for requests in ([others[0], poisoned, *others[1:]], others):
        found = _results(engine, requests)
        if len(requests) > len(others):
            assert found.pop(1) == ([], "error")
        # On the C++ decoder bit for bit; PyTorch's matrices of another size round otherwise.
        if kind != "torch":
            assert [tokens for tokens, _ in found] == expected
        assert [reason for _, reason in found] == ["length"] * 3
    assert engine.num_free_slots == engine.num_slots


def _results(
    engine: Engine, requests: Sequence[TokenRequest]
) -> list[tuple[list[int], str | None]]:
    """New tokens and how each request ended, all generated together."""
    tokens: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    reasons: dict[int, str | None] = dict.fromkeys(tokens)
    while engine.num_running:
        for event in engine.step():
            if event.token_id is not None:
                tokens[event.request_id].append(event.token_id)
            reasons[event.request_id] = event.finish_reason or reasons[event.request_id]
            assert (event.finish_reason == "error") == (event.problem is not None)
    return [(some, reasons[key]) for key, some in tokens.items()]
