"""Pooling against one text at a time, and the losses against their formulas written out."""

import math

import pytest
import torch
from torch import Tensor

from full_stack_transformer.modelling.embedding.head import (
    POOLING_MODES,
    PoolingMode,
    cosine_losses,
    needs_first_layer,
    pool,
    simcse_losses,
)

TOKENS, WIDTH = 5, 4


def _slow(tokens: Tensor, first: Tensor, mode: PoolingMode) -> Tensor:
    """One text without padding: (tokens, width) -> (width,)."""
    return {
        "cls": tokens[0],
        "last": tokens[-1],
        "mean": tokens.mean(0),
        "max": tokens.max(0).values,
        "first_last_avg": torch.stack([tokens.mean(0), first.mean(0)]).mean(0),
    }[mode]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_padding_does_not_change_a_pooled_vector(mode: PoolingMode, padding_side: str) -> None:
    torch.manual_seed(0)
    lengths = [5, 3, 1]
    last, first = torch.randn(2, len(lengths), TOKENS, WIDTH)
    mask = torch.zeros(len(lengths), TOKENS, dtype=torch.int64)
    for row, length in zip(mask, lengths, strict=True):
        row[slice(length) if padding_side == "right" else slice(TOKENS - length, None)] = 1
    pooled = pool(last, mask, mode, first=first)
    for row in range(len(lengths)):
        kept = mask[row].bool()
        expected = _slow(last[row, kept], first[row, kept], mode)
        assert torch.allclose(pooled[row], expected, atol=1e-6)


def test_the_first_layer_is_needed_by_one_mode_only() -> None:
    assert [mode for mode in POOLING_MODES if needs_first_layer(mode)] == ["first_last_avg"]
    with pytest.raises(ValueError, match="first layer"):
        pool(torch.zeros(1, 1, 1), torch.ones(1, 1), "first_last_avg")


def test_simcse_equals_its_equations() -> None:
    torch.manual_seed(0)
    first, second, negatives = torch.randn(3, 4, WIDTH)
    temperature = 0.05

    def similarity(one: Tensor, other: Tensor) -> float:
        cosine = one @ other / (one.norm() * other.norm())
        return math.exp(float(cosine) / temperature)

    unsupervised = simcse_losses(first, second, temperature=temperature)
    supervised = simcse_losses(first, second, temperature=temperature, negatives=negatives)
    for row in range(4):
        right = similarity(first[row], second[row])
        others = sum(similarity(first[row], one) for one in second)
        wrong = sum(similarity(first[row], one) for one in negatives)
        assert float(unsupervised[row]) == pytest.approx(
            -math.log(right / others), rel=1e-4, abs=1e-5
        )
        assert float(supervised[row]) == pytest.approx(
            -math.log(right / (others + wrong)), rel=1e-4
        )


def test_the_cosine_loss_is_the_squared_difference_from_the_score() -> None:
    first = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    second = torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    losses = cosine_losses(first, second, torch.tensor([0.5, 1.0]))
    assert torch.allclose(losses, torch.tensor([0.25, 0.0]), atol=1e-6)
