"""The engine equals plain generation, whatever joins and leaves beside a request."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import RequestError
from full_stack_transformer.generation import engine as engine_module
from full_stack_transformer.generation.engine import Engine, TokenRequest
from full_stack_transformer.generation.sampling import SamplingParameters
from full_stack_transformer.modelling.backbones import new_backbone
from full_stack_transformer.modelling.model_directory import open_model

GREEDY = SamplingParameters(temperature=0)
IDS = {"begin": 0, "end": 1, "pad": 2}


def _backbone(preset: str) -> Backbone:
    torch.manual_seed(1)
    small = {"gpt2": "gpt2"}.get(preset, "tiny")
    if small == "gpt2":
        import transformers

        config = transformers.GPT2Config(
            vocab_size=300, n_positions=128, n_embd=64, n_layer=2, n_head=2
        )
        backbone = transformers.GPT2LMHeadModel(config)
    else:
        backbone = new_backbone("tiny", vocab_size=300, max_length=128, special_token_ids=IDS)
    with torch.no_grad():
        backbone.get_input_embeddings().weight.mul_(6)
    return backbone.eval()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return _backbone(request.param)


def _run(engine: Engine, requests: Sequence[TokenRequest]) -> list[list[int]]:
    """Tokens of all requests, added as slots become free."""
    waiting = list(enumerate(requests))
    numbers: dict[int, int] = {}
    results: list[list[int]] = [[] for _ in requests]
    while waiting or engine.num_running:
        while waiting and engine.num_free_slots:
            number, request = waiting.pop(0)
            numbers[engine.add(request)] = number
        for event in engine.step():
            if event.token_id is not None:
                results[numbers[event.request_id]].append(event.token_id)
    return results


def _prompts(count: int) -> list[list[int]]:
    numbers = random.Random(3)
    return [
        [numbers.randrange(3, 300) for _ in range(numbers.randrange(1, 60))] for _ in range(count)
    ]


def test_greedy_equals_transformers_generate(backbone: Backbone) -> None:
    requests = [
        TokenRequest(prompt_ids=prompt, max_new_tokens=20, sampling=GREEDY, seed=0)
        for prompt in _prompts(24)
    ]
    ours = _run(Engine(backbone, num_slots=5), requests)
    for request, tokens in zip(requests, ours, strict=True):
        theirs = backbone.generate(
            torch.tensor([request.prompt_ids]),
            attention_mask=torch.ones(1, len(request.prompt_ids), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
        )
        assert tokens == theirs[0, len(request.prompt_ids) :].tolist()


def test_a_prompt_read_in_chunks_gives_the_same(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = TokenRequest(
        prompt_ids=_prompts(40)[-1] * 2, max_new_tokens=8, sampling=GREEDY, seed=0
    )
    whole = _run(Engine(backbone, num_slots=1), [request])
    monkeypatch.setattr(engine_module, "_PREFILL_CHUNK_TOKENS", 7)
    assert _run(Engine(backbone, num_slots=1), [request]) == whole


def test_a_seed_gives_the_same_tokens_alone_and_in_company(backbone: Backbone) -> None:
    requests = [
        TokenRequest(
            prompt_ids=prompt,
            max_new_tokens=12,
            sampling=SamplingParameters(temperature=0.9, top_p=0.9, repetition_penalty=1.1),
            seed=number,
        )
        for number, prompt in enumerate(_prompts(9))
    ]
    together = _run(Engine(backbone, num_slots=9), requests)
    for request, tokens in zip(requests, together, strict=True):
        assert _run(Engine(backbone, num_slots=1), [request]) == [tokens]
    assert len({tuple(tokens) for tokens in together}) > 1


def test_cancelled_requests_leave_no_trace(backbone: Backbone) -> None:
    """Random schedules of adding and cancelling: survivors get what they would get alone."""
    prompts = _prompts(30)
    alone = [
        _run(Engine(backbone, num_slots=1), [TokenRequest(prompt, 6, GREEDY, seed=0)])[0]
        for prompt in prompts
    ]
    numbers = random.Random(5)
    engine = Engine(backbone, num_slots=4)
    running: dict[int, int] = {}
    results: dict[int, list[int]] = {}
    waiting = list(range(len(prompts)))
    while waiting or running:
        while waiting and engine.num_free_slots and numbers.random() < 0.7:
            number = waiting.pop()
            key = engine.add(TokenRequest(prompts[number], 6, GREEDY, seed=0))
            running[key] = number
            results[number] = []
        if running and numbers.random() < 0.1:
            key = numbers.choice(sorted(running))
            engine.cancel(key)
            del results[running.pop(key)]
        for event in engine.step():
            if event.token_id is not None:
                results[running[event.request_id]].append(event.token_id)
            if event.finish_reason is not None:
                del running[event.request_id]
    assert engine.num_free_slots == engine.num_slots
    assert len(results) > 10
    assert all(alone[number] == tokens for number, tokens in results.items())


def test_a_stop_token_ends_and_is_left_out(backbone: Backbone) -> None:
    request = TokenRequest(_prompts(1)[0], max_new_tokens=10, sampling=GREEDY, seed=0)
    [tokens] = _run(Engine(backbone, num_slots=1), [request])
    stopping = replace(request, stop_ids=frozenset({tokens[4]}))
    first = tokens.index(tokens[4])
    assert _run(Engine(backbone, num_slots=1), [stopping]) == [tokens[:first]]


def test_forbidden_tokens_are_drawn_again(backbone: Backbone) -> None:
    request = TokenRequest(_prompts(1)[0], max_new_tokens=10, sampling=GREEDY, seed=0)
    [tokens] = _run(Engine(backbone, num_slots=1), [request])
    forbidding = replace(request, forbids=lambda new_ids: new_ids[-1] in set(tokens))
    [others] = _run(Engine(backbone, num_slots=1), [forbidding])
    assert len(others) == 10
    assert not set(others) & set(tokens)
    nothing = replace(request, forbids=lambda new_ids: True)
    assert _run(Engine(backbone, num_slots=1), [nothing]) == [[]]


def test_nan_ends_a_request_with_an_error_and_no_token() -> None:
    backbone = _backbone("llama")
    engine = Engine(backbone, num_slots=2)
    engine.add(TokenRequest([5, 6], 5, GREEDY, seed=0))
    with torch.no_grad():
        backbone.get_input_embeddings().weight[6] = float("nan")
    [event] = engine.step()
    assert (event.token_id, event.finish_reason) == (None, "error")
    assert engine.num_free_slots == 2


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"),
    [
        ([], 5, "no tokens"),
        ([5] * 100, 29, "context is 128 tokens, but the prompt has 100 and 29"),
        ([5, 300], 5, "between 0 and 299"),
        ([-1], 5, "between 0 and 299"),
    ],
)
def test_what_can_never_be_generated_is_refused(
    backbone: Backbone, prompt: list[int], max_new_tokens: int, message: str
) -> None:
    engine = Engine(backbone, num_slots=1)
    with pytest.raises(RequestError, match=message):
        engine.add(TokenRequest(prompt, max_new_tokens, GREEDY, seed=0))
    assert engine.num_free_slots == 1


def test_a_saved_model_generates_as_before(model_dir: Path) -> None:
    request = TokenRequest([0, 40, 50], max_new_tokens=10, sampling=GREEDY, seed=0)
    results = [
        _run(Engine(open_model(model_dir, device="cpu").backbone, num_slots=1), [request])
        for _ in range(2)
    ]
    assert results[0] == results[1]
