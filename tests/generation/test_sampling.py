"""Sampling equals transformers' processors on random cases, and rows do not touch each other.

Where transformers is wrong, and we differ on purpose:

- top-p cuts inside a group of equal scores (bfloat16 makes many) at a place that its unstable sort chooses;
  ours keeps those with the smallest ids.
- top-p adds probabilities in fp32 from the smallest up, so that a `top_p` within a millionth of 1 cuts by
  the error of the sum; ours adds in fp64 from the largest down.
- temperature 0 is refused there; here it is greedy.

So these tests give transformers fp64 scores without equals.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.generation import sampling
from full_stack_transformer.generation.runners.native import sampler
from full_stack_transformer.generation.runners.native.library import load_library
from full_stack_transformer.generation.sampling import (
    History,
    adjusted_scores,
    draw,
    score_tokens,
)
from full_stack_transformer.machine import instruction_sets

VOCABULARY = 60
# Our scores are heated in fp32: borders between two tokens lie so near to those of transformers.
NEAR = 1e-5


def _logits(rows: int, seed: int, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator) * 3


def _random_parameters(numbers: random.Random) -> SamplingParameters:
    return SamplingParameters(
        temperature=numbers.choice([0.3, 0.7, 1.0, 1.6]),
        top_k=numbers.choice([0, 0, 1, 5, 30, 300, 5000]),
        top_p=numbers.choice([1.0, 1.0, 0.99, 0.9, 0.5, 0.05]),
        min_p=numbers.choice([0.0, 0.0, 0.01, 0.2, 1.0]),
        typical_p=numbers.choice([1.0, 1.0, 0.95, 0.6, 0.1]),
    )


def _theirs(logits: Tensor, parameters: SamplingParameters, seen: Tensor) -> Tensor:
    """Probabilities (vocabulary,) in fp64 that transformers would sample from."""
    chain: list[LogitsProcessor] = []
    if parameters.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty))
    chain.append(TemperatureLogitsWarper(parameters.temperature))
    if parameters.top_k:
        chain.append(TopKLogitsWarper(parameters.top_k))
    if parameters.top_p < 1.0:
        chain.append(TopPLogitsWarper(parameters.top_p))
    if parameters.min_p:
        chain.append(MinPLogitsWarper(parameters.min_p))
    if parameters.typical_p < 1.0:
        chain.append(TypicalLogitsWarper(parameters.typical_p))
    scores = logits[None].double()
    for processor in chain:
        scores = processor(seen[None], scores)
    return scores.softmax(dim=-1)[0]


def _assert_draws_from(
    probabilities: Tensor, scores: Tensor, parameters: SamplingParameters
) -> None:
    """Each token is drawn from the start to the end of its stretch of [0, 1), and no other is.

    The stretches lie in the order of the ids where nothing bounds them, else of falling scores.

    Args:
        probabilities: (vocabulary,) expected.
        scores: (vocabulary,) to draw from.
        parameters: of the draw.
    """
    is_free = parameters == SamplingParameters(temperature=parameters.temperature)
    order = (
        torch.arange(len(scores)) if is_free else scores.sort(descending=True, stable=True).indices
    )
    ends = probabilities[order].cumsum(dim=0)
    starts = ends - probabilities[order]
    is_wide = probabilities[order] > 4 * NEAR
    tokens = order[is_wide]
    uniforms = torch.cat([starts[is_wide] + NEAR, ends[is_wide] - NEAR])
    drawn = draw(scores.expand(len(uniforms), -1), [parameters] * len(uniforms), uniforms)
    assert drawn.tolist() == [*tokens.tolist(), *tokens.tolist()]
    if (probabilities == 0).any():
        # The last one that is left, however unlikely: nothing behind it is.
        last = draw(scores[None], [parameters], torch.tensor([1 - 2**-53], dtype=torch.float64))
        assert int(last) == int(order[probabilities[order] > 0][-1])


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "typical_p", "temperature", "all"])
def test_a_draw_follows_the_probabilities_of_transformers(name: str) -> None:
    numbers = random.Random(name)
    for seed in range(60):
        parameters = _random_parameters(numbers)
        if name != "all":
            parameters = SamplingParameters(**{name: getattr(parameters, name)})
        logits = _logits(1, seed)[0]
        expected = _theirs(logits, parameters, torch.zeros(0, dtype=torch.long))
        _assert_draws_from(expected, logits, parameters)


def test_the_penalized_chain_is_that_of_transformers() -> None:
    numbers = random.Random(1)
    for seed in range(60):
        seen = torch.randint(VOCABULARY, (numbers.randrange(1, 40),))
        parameters = SamplingParameters(
            temperature=0.8,
            top_k=numbers.choice([0, 20]),
            top_p=0.9,
            repetition_penalty=numbers.choice([0.7, 1.1, 2.0]),
        )
        logits = _logits(1, seed)
        [scores] = adjusted_scores(logits, [parameters], [History(seen, 3)])
        _assert_draws_from(_theirs(logits[0], parameters, seen), scores, parameters)


def test_penalties_and_bias_equal_the_obvious_loop() -> None:
    numbers = random.Random(2)
    for seed in range(50):
        logits = _logits(3, seed)
        parameters, histories = [], []
        for _ in range(3):
            token_ids = torch.tensor([numbers.randrange(VOCABULARY) for _ in range(25)])
            biased = numbers.sample(range(VOCABULARY), 4)
            parameters.append(
                SamplingParameters(
                    presence_penalty=numbers.uniform(-2, 2),
                    frequency_penalty=numbers.uniform(-2, 2),
                    logit_bias={token_id: numbers.uniform(-9, 9) for token_id in biased},
                )
            )
            histories.append(
                History(token_ids, numbers.randrange(25), numbers.sample(range(60), 2))
            )
        expected = logits.clone()
        for row, (one, history) in enumerate(zip(parameters, histories, strict=True)):
            new_ids = history.token_ids[history.num_prompt_tokens :].tolist()
            for token_id in range(VOCABULARY):
                count = new_ids.count(token_id)
                expected[row, token_id] -= one.presence_penalty * (count > 0)
                expected[row, token_id] -= one.frequency_penalty * count
                expected[row, token_id] += one.logit_bias.get(token_id, 0.0)
                if token_id in history.forbidden_ids:
                    expected[row, token_id] = -torch.inf
        torch.testing.assert_close(adjusted_scores(logits, parameters, histories), expected)
        assert torch.equal(logits, _logits(3, seed))  # what came in is not changed


@pytest.mark.parametrize("rounding", ["none", "bfloat16", "whole numbers"])
def test_the_likeliest_tokens_give_what_the_whole_vocabulary_gives(
    rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded scores have many equals, also at the border between what is looked at and the rest."""
    numbers = random.Random(3)
    for seed in range(25):
        scores = _logits(32, seed, vocabulary=numbers.choice([200, 700, 3000]))
        scores *= numbers.choice([0.2, 0.5, 1.0])
        if rounding == "bfloat16":
            scores = scores.bfloat16().float()
        elif rounding == "whole numbers":
            scores = scores.round()
        parameters = [_random_parameters(numbers) for _ in range(32)]
        uniforms = torch.rand(
            32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        monkeypatch.setattr(sampling, "_NUM_CANDIDATES", 256)
        few = draw(scores, parameters, uniforms)
        monkeypatch.setattr(sampling, "_NUM_CANDIDATES", 3000)
        assert torch.equal(few, draw(scores, parameters, uniforms))


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("vocabulary", [1, 15, 256, 257, 50_257])
def test_cpp_ranks_and_draws_as_pytorch_does(
    isa: str, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also equal scores and impossible ones."""
    library = load_library(isa)
    monkeypatch.setattr(sampler, "load_library", lambda: library)
    scores = _logits(1, vocabulary, vocabulary=vocabulary)[0]
    scores[::3] = scores[::3].round()
    scores[1::40] = -torch.inf
    parameters = SamplingParameters(temperature=0.7)
    for wanted in {1, min(300, vocabulary), vocabulary}:
        monkeypatch.setattr(sampler, "is_here", lambda _: True)
        values, ids, total = sampling._rank(scores, parameters, wanted)
        drawn = [sampling._draw_among_all(scores, parameters, part / 50) for part in range(50)]
        monkeypatch.setattr(sampler, "is_here", lambda _: False)
        expected_values, expected_ids, expected_total = sampling._rank(scores, parameters, wanted)
        assert torch.equal(values, expected_values)
        assert torch.equal(ids, expected_ids)
        assert total == pytest.approx(expected_total, rel=1e-14)
        assert drawn == [
            sampling._draw_among_all(scores, parameters, part / 50) for part in range(50)
        ]


def test_equal_scores_are_drawn_in_the_order_of_their_ids() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 2.0, 0.0]])
    uniforms = torch.tensor([0.0, 0.3, 0.6, 0.9], dtype=torch.float64)
    half = [SamplingParameters(top_p=0.4)] * 4
    assert draw(scores.expand(4, -1), half, uniforms).tolist() == [1, 1, 2, 2]
    ties_stay = [SamplingParameters(top_k=2)] * 4
    assert draw(scores.expand(4, -1), ties_stay, uniforms).tolist() == [1, 2, 3, 4]


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = _logits(3, 1)
    parameters = [SamplingParameters(temperature=0)] * 3
    uniforms = torch.rand(3, dtype=torch.float64)
    assert torch.equal(draw(logits, parameters, uniforms), logits.argmax(-1))
    assert draw(torch.tensor([[1.0, 5.0, 5.0]]), parameters[:1], uniforms[:1]).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6])
def test_the_smallest_temperature_is_greedy(temperature: float) -> None:
    logits = _logits(8, 4)
    parameters = [SamplingParameters(temperature=temperature, top_p=0.9)] * 8
    uniforms = torch.rand(8, dtype=torch.float64)
    assert torch.equal(draw(logits, parameters, uniforms), logits.argmax(-1))


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    numbers = random.Random(5)
    scores = _logits(24, 2, vocabulary=1500)
    parameters = [_random_parameters(numbers) for _ in range(24)]
    uniforms = torch.rand(24, dtype=torch.float64)

    def drawn(rows: Sequence[int]) -> list[int]:
        return draw(scores[rows], [parameters[row] for row in rows], uniforms[rows]).tolist()

    together = drawn(range(24))
    assert [drawn([row])[0] for row in range(24)] == together
    assert drawn(range(23, -1, -1)) == together[::-1]


@pytest.mark.parametrize("restriction", [{}, {"top_p": 0.6}, {"top_k": 200}], ids=str)
def test_a_random_number_close_to_a_border_is_on_its_side(restriction: dict[str, Any]) -> None:
    """So close that fp32 would not tell: processors round its exponentials differently."""
    torch.manual_seed(4)
    scores = (torch.randn(5000) * 2).sort(descending=True).values
    weights = [math.exp(score) for score in (scores - scores[0]).tolist()]
    total, kept = math.fsum(weights), len(weights)
    if "top_p" in restriction:
        before = [math.fsum(weights[:place]) / total for place in range(1000)]
        kept = sum(one < restriction["top_p"] for one in before)
    elif "top_k" in restriction:
        kept = restriction["top_k"]
    total = math.fsum(weights[:kept])
    parameters = SamplingParameters(temperature=1.0, **restriction)
    for token_id in (0, 1, 7, 100, 180):
        border = math.fsum(weights[: token_id + 1]) / total
        for shift, expected in ((-1e-12, token_id), (1e-12, token_id + 1)):
            uniforms = torch.tensor([border + shift], dtype=torch.float64)
            assert draw(scores[None], [parameters], uniforms).tolist() == [expected]


def test_frequencies_follow_the_probabilities() -> None:
    scores = torch.tensor([0.1, 0.2, 0.7, 0.0]).log()
    uniforms = torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = draw(scores.expand(5000, -1), [SamplingParameters()] * 5000, uniforms)
    counts = drawn.bincount(minlength=4)
    expected = torch.tensor([0.1, 0.2, 0.7, 0.0])
    torch.testing.assert_close(counts / 5000, expected, atol=0.03, rtol=0.0)
    assert counts[3] == 0  # impossible stays impossible


def test_log_probabilities_are_those_of_the_softmax() -> None:
    logits = _logits(5, 6)
    token_ids = torch.tensor([3, 1, 4, 1, 5])
    expected = logits.log_softmax(dim=-1)
    for row, scored in enumerate(score_tokens(logits, token_ids, 3)):
        assert scored.token_id == int(token_ids[row])
        assert scored.log_probability == pytest.approx(float(expected[row, scored.token_id]))
        best = expected[row].topk(3)
        assert [token_id for token_id, _ in scored.alternatives] == best.indices.tolist()
        values = [value for _, value in scored.alternatives]
        assert values == pytest.approx(best.values.tolist(), abs=1e-5)
