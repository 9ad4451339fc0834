"""From logits to token ids: pure functions, vectorised over requests that each have their own parameters.

    logits (requests, vocabulary)
      -> repetition penalty -> temperature -> top-k -> top-p -> probabilities -> one id per request

Each request draws from its own generator, so its tokens do not depend on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParameters:
    """How one request chooses its tokens."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest; 0 for all."""
    top_p: float = 1.0
    """Choose among the likeliest that together have this probability."""
    repetition_penalty: float = 1.0
    """Keskar et al. 2019 (CTRL), section 4.1: divides positive and multiplies negative scores."""


def penalize_repetition(
    logits: Tensor, seen: Sequence[Tensor], penalties: Sequence[float]
) -> Tensor:
    """Make tokens that already occurred less likely.

    Args:
        logits: (requests, vocabulary).
        seen: for each request the ids (any,) that occurred in it.
        penalties: for each request its factor; 1 leaves it alone.
    """
    if all(penalty == 1.0 for penalty in penalties):
        return logits
    penalized = logits.clone()
    for row, token_ids, penalty in zip(penalized, seen, penalties, strict=True):
        if penalty != 1.0:
            scores = row[token_ids]
            row[token_ids] = torch.where(scores > 0, scores / penalty, scores * penalty)
    return penalized


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """Leave each request its `top_k` likeliest tokens; ties with the last of them stay.

    Args:
        logits: (requests, vocabulary).
        top_k: (requests,), 0 for all.
    """
    vocab_size = logits.shape[-1]
    largest = int(top_k.max())
    if largest == 0:
        return logits
    best = logits.topk(min(largest, vocab_size), dim=-1).values
    last = best.gather(-1, (top_k.clamp(1, best.shape[-1]) - 1)[:, None])
    cut = (logits < last) & (top_k > 0)[:, None]
    return logits.masked_fill(cut, -torch.inf)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Leave each request the smallest set of likeliest tokens whose probability reaches `top_p`.

    Holtzman et al. 2020, section 3.1. The likeliest token always stays.

    Args:
        logits: (requests, vocabulary).
        top_p: (requests,), 1 for all.
    """
    if bool((top_p >= 1.0).all()):
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    cut = before >= top_p[:, None]
    cut[top_p >= 1.0] = False
    return logits.masked_fill(cut.scatter(-1, order, cut), -torch.inf)


def final_scores(
    logits: Tensor, parameters: Sequence[SamplingParameters], seen: Sequence[Tensor]
) -> Tensor:
    """Scores (requests, vocabulary) whose softmax each request draws from; -inf is out of the question."""
    device = logits.device
    scores = penalize_repetition(
        logits.float(), seen, [one.repetition_penalty for one in parameters]
    )
    # Greedy requests keep their scores: the largest is taken, whatever the temperature.
    temperatures = torch.tensor([one.temperature or 1.0 for one in parameters], device=device)
    scores = scores / temperatures[:, None]
    scores = keep_top_k(scores, torch.tensor([one.top_k for one in parameters], device=device))
    return keep_top_p(scores, torch.tensor([one.top_p for one in parameters], device=device))


def draw(
    scores: Tensor, parameters: Sequence[SamplingParameters], generators: Sequence[torch.Generator]
) -> Tensor:
    """One token id per request (requests,), by inverting the cumulative distribution.

    One uniform number per request and step, in float64 on the processor: independent of the device and
    of how many requests there are.
    """
    greedy = scores.argmax(dim=-1).cpu()
    if all(one.temperature == 0 for one in parameters):
        return greedy
    cumulative = scores.softmax(dim=-1).double().cumsum(dim=-1).cpu()
    uniform = torch.stack(
        [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    )
    # Against the total, not against 1: rounding must not select a token behind the last possible one.
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    last_possible = (scores > -torch.inf).cpu().int().cumsum(dim=-1).argmax(dim=-1)
    drawn = torch.minimum(drawn, last_possible)
    is_greedy = torch.tensor([one.temperature == 0 for one in parameters])
    return torch.where(is_greedy, greedy, drawn)
