"""Sampling equals transformers' processors on random cases, and rows do not touch each other."""

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from full_stack_transformer.generation.sampling import (
    SamplingParameters,
    draw,
    final_scores,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)

VOCABULARY = 50


def _logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("seed", range(5))
def test_each_row_has_its_own_top_k(seed: int) -> None:
    logits = _logits(4, seed)
    ours = keep_top_k(logits, torch.tensor([0, 1, 7, 1000]))
    assert torch.equal(ours[0], logits[0])
    for row, top_k in ((1, 1), (2, 7), (3, 1000)):
        assert torch.equal(
            ours[row : row + 1], TopKLogitsWarper(top_k)(None, logits[row : row + 1])
        )


@pytest.mark.parametrize("seed", range(5))
def test_each_row_has_its_own_top_p(seed: int) -> None:
    logits = _logits(4, seed)
    ours = keep_top_p(logits, torch.tensor([1.0, 0.1, 0.5, 0.9]))
    assert torch.equal(ours[0], logits[0])
    for row, top_p in ((1, 0.1), (2, 0.5), (3, 0.9)):
        assert torch.equal(
            ours[row : row + 1], TopPLogitsWarper(top_p)(None, logits[row : row + 1])
        )


@pytest.mark.parametrize("seed", range(5))
def test_repetition_penalty_equals_theirs(seed: int) -> None:
    logits = _logits(2, seed)
    seen = torch.tensor([3, 3, 7, 11])
    ours = penalize_repetition(logits, [seen, seen], [1.3, 1.0])
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(seen[None], logits[:1].clone())
    assert torch.equal(ours[:1], theirs)
    assert torch.equal(ours[1], logits[1])


def test_the_chain_is_theirs() -> None:
    logits, seen = _logits(1, 9), torch.tensor([1, 2, 3])
    parameters = SamplingParameters(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.2)
    theirs = logits.clone()
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.8),
    ):
        theirs = processor(seen[None], theirs)
    torch.testing.assert_close(final_scores(logits, [parameters], [seen]), theirs)


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = _logits(3, 1)
    parameters = [SamplingParameters(temperature=0)] * 3
    generators = [torch.Generator().manual_seed(0)] * 3
    scores = final_scores(logits, parameters, [torch.tensor([0])] * 3)
    assert torch.equal(draw(scores, parameters, generators), logits.argmax(-1))


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    logits = _logits(6, 2)
    parameters = [SamplingParameters(temperature=0.5 + row / 4, top_p=0.95) for row in range(6)]
    seen = [torch.tensor([0])] * 6

    def drawn(rows: list[int]) -> list[int]:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        some = [parameters[row] for row in rows]
        scores = final_scores(logits[rows], some, [seen[row] for row in rows])
        return draw(scores, some, generators).tolist()

    together = drawn(list(range(6)))
    assert [drawn([row])[0] for row in range(6)] == together
    assert drawn([5, 4, 3, 2, 1, 0]) == together[::-1]


def test_frequencies_follow_the_probabilities() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.7, 0.0]]).log()
    generator = torch.Generator().manual_seed(0)
    parameters = SamplingParameters()
    counts = torch.zeros(4)
    for _ in range(5000):
        counts[draw(scores, [parameters], [generator])] += 1
    torch.testing.assert_close(
        counts / 5000, torch.tensor([0.1, 0.2, 0.7, 0.0]), atol=0.03, rtol=0.0
    )
    assert counts[3] == 0  # impossible stays impossible
