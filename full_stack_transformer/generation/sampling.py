"""From logits to token ids: pure functions, vectorised over requests that each have their own parameters.

    logits (requests, vocabulary)
      -> repetition penalty (Keskar et al. 2019, section 4.1), presence and frequency penalty, bias,
         ids that are forbidden                            adjusted_scores
      -> temperature -> top-k -> top-p (Holtzman et al. 2020, section 3.1) -> min-p (Nguyen et al. 2024)
         -> typical-p (Meister et al. 2022) -> one id per request   draw

A draw inverts the cumulative distribution: in the order of the ids where every token may be drawn, else in
the order of falling scores, equal ones by their ids. The few most likely tokens usually decide the latter, so
only those are sorted; where they do not, the whole vocabulary is, with the same result. Each request brings
its own random number, so its tokens do not depend on its neighbours. Exponentials and sums, which processors
round differently, are in fp64: no random number falls between two roundings of those.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.generation.runners.native import sampler

# Most likely tokens that are examined at first, and how many times as many whenever those do not decide:
# sorting 50,257 scores takes 20 times as long as finding 256 of them.
_NUM_CANDIDATES = 256
_TIMES_AS_MANY = 8
# Ids whose weights are added up together, before the one is looked for among them.
_BLOCK_SIZE = 256
# Most likely ids that a request is asked about at once, whether it forbids them.
_MIN_IDS_TO_ASK = 16


@dataclass(frozen=True)
class History:
    """What a request has read and generated so far."""

    token_ids: Tensor
    """(tokens,) of the prompt and the new text."""
    num_prompt_tokens: int
    forbidden_ids: Sequence[int] = ()
    """Ids that cannot be chosen now, such as those that would end the text too early."""


def adjusted_scores(
    logits: Tensor, parameters: Sequence[SamplingParameters], histories: Sequence[History]
) -> Tensor:
    """Scores (requests, vocabulary) in fp32 after penalties, bias and forbidden ids; -inf is impossible.

    The logits themselves where nothing is to be changed: copies of a large vocabulary take their time.

    Args:
        logits: (requests, vocabulary).
        parameters: of each request.
        histories: of each request.
    """
    scores = logits.float()
    changed = [
        row
        for row, (one, history) in enumerate(zip(parameters, histories, strict=True))
        if _is_adjusted(one) or history.forbidden_ids
    ]
    if changed and scores.data_ptr() == logits.data_ptr():
        scores = scores.clone()
    for row in changed:
        one, history = parameters[row], histories[row]
        if one.repetition_penalty != 1.0:
            _penalize_repetition(scores[row], history.token_ids, one.repetition_penalty)
        if one.presence_penalty or one.frequency_penalty:
            new_ids, counts = history.token_ids[history.num_prompt_tokens :].unique(  # type: ignore[no-untyped-call]
                return_counts=True
            )
            penalties = one.presence_penalty + one.frequency_penalty * counts
            scores[row, new_ids] -= penalties.to(scores)
        if one.logit_bias:
            ids = torch.tensor(list(one.logit_bias), device=scores.device)
            biases = torch.tensor(list(one.logit_bias.values()), device=scores.device)
            scores[row].index_add_(0, ids, biases.to(scores.dtype))
        if history.forbidden_ids:
            scores[row, list(history.forbidden_ids)] = -torch.inf
    return scores


def _is_adjusted(parameters: SamplingParameters) -> bool:
    return bool(
        parameters.repetition_penalty != 1.0
        or parameters.presence_penalty
        or parameters.frequency_penalty
        or parameters.logit_bias
    )


def _penalize_repetition(scores: Tensor, token_ids: Tensor, penalty: float) -> None:
    """Divide positive and multiply negative scores (vocabulary,) of `token_ids`, once for each id."""
    occurred = scores[token_ids]
    scores[token_ids] = torch.where(occurred > 0, occurred / penalty, occurred * penalty)


def most_likely(scores: Tensor) -> Tensor:
    """The id (requests,) of the largest score (requests, vocabulary), or of a NaN, on the processor."""
    if scores.is_cpu:  # NumPy's is ten times as fast as PyTorch's
        return torch.from_numpy(scores.float().numpy().argmax(axis=-1))
    return scores.argmax(-1).cpu()


def draw(
    scores: Tensor,
    parameters: Sequence[SamplingParameters],
    uniforms: Tensor,
    likeliest: Tensor | None = None,
) -> Tensor:
    """One token id per request (requests,), on the processor.

    Args:
        scores: (requests, vocabulary) in fp32.
        parameters: of each request.
        uniforms: (requests,) float64 in [0, 1), one random number for each.
        likeliest: `most_likely` of the scores, if known.
    """
    drawn = most_likely(scores) if likeliest is None else likeliest.clone()
    free = [
        row for row, one in enumerate(parameters) if one.temperature > 0 and _is_unrestricted(one)
    ]
    bound = [
        row
        for row, one in enumerate(parameters)
        if one.temperature > 0 and not _is_unrestricted(one)
    ]
    for row in free:  # one by one: a row of a large vocabulary stays in the processor's cache
        drawn[row] = _draw_among_all(scores[row], parameters[row], float(uniforms[row]))
    if bound:
        chosen = [parameters[row] for row in bound]
        drawn[bound] = _draw_among_most_likely(
            [scores[row] for row in bound], chosen, uniforms[bound]
        )
    return drawn


def _temperature(parameters: SamplingParameters) -> float:
    return max(parameters.temperature, 1e-30)


def _tempered(scores: Tensor, parameters: SamplingParameters) -> Tensor:
    """Scores (vocabulary,) divided by the temperature; the largest is 0."""
    # From the largest down: nothing overflows, however small the temperature.
    return (scores - scores.amax()).div_(_temperature(parameters))


def _draw_among_all(scores: Tensor, parameters: SamplingParameters, uniform: float) -> int:
    """One id, each as probable as its score (vocabulary,) says."""
    if sampler.is_here(scores):
        return sampler.draw_among_all(scores, _temperature(parameters), uniform)
    weights = _tempered(scores, parameters).cpu().double().exp_()
    num_whole = len(weights) // _BLOCK_SIZE * _BLOCK_SIZE
    sums = weights[:num_whole].view(-1, _BLOCK_SIZE).sum(dim=-1)
    rest = weights[num_whole:].sum()[None]
    sums = torch.cat([sums, rest])
    block, left = _find(sums, uniform * float(sums.sum()))
    inside = weights[block * _BLOCK_SIZE : (block + 1) * _BLOCK_SIZE]
    return block * _BLOCK_SIZE + _find(inside, left)[0]


def _find(weights: Tensor, target: float) -> tuple[int, float]:
    """The first of the weights (n,) with which their sum passes the target, and what is left for it."""
    cumulative = weights.cumsum(dim=0)
    place = int(torch.searchsorted(cumulative, target, right=True))
    if place == len(weights):  # rounding passed the end
        place = int(weights.nonzero()[-1])
    return place, max(0.0, target - float(cumulative[place] - weights[place]))


def _draw_among_most_likely(
    scores: Sequence[Tensor], parameters: Sequence[SamplingParameters], uniforms: Tensor
) -> Tensor:
    """One id per request (requests,) among its most likely ones; the parameters say how many those are."""
    found = torch.full((len(scores),), -1)
    vocab_size = len(scores[0])
    num_candidates = min(_NUM_CANDIDATES, vocab_size)
    while True:
        places = (found < 0).nonzero().flatten().tolist()
        if not places:
            return found
        chosen = [parameters[place] for place in places]
        ranked = [_rank(scores[place], parameters[place], num_candidates) for place in places]
        candidates = _Candidates(
            torch.stack([values for values, _, _ in ranked]),
            torch.stack([ids for _, ids, _ in ranked]),
            torch.tensor([total for _, _, total in ranked], dtype=torch.float64),
            vocab_size,
        )
        found[places] = candidates.draw(chosen, uniforms[places])
        if num_candidates == vocab_size:
            return found
        num_candidates = min(vocab_size, num_candidates * _TIMES_AS_MANY)


def _rank(
    scores: Tensor, parameters: SamplingParameters, num_candidates: int
) -> tuple[Tensor, Tensor, float]:
    """The most likely tokens by falling score, equal ones by their ids, and the weight of all.

    Args:
        scores: (vocabulary,).
        parameters: of the request.
        num_candidates: how many.

    Returns:
        Scores (candidates,) divided by the temperature, of which the largest is 0; ids (candidates,); sum of
        the exponentials of all scores.
    """
    if sampler.is_here(scores):
        return sampler.rank(scores, _temperature(parameters), num_candidates)
    tempered = _tempered(scores, parameters).cpu()  # Apple's GPU has no fp64
    # Of equals at the border those with the smallest ids: all that are as large are sorted.
    border = tempered.topk(num_candidates).values[-1]
    ids = (tempered >= border).nonzero().flatten()
    values, order = tempered[ids].sort(descending=True, stable=True)
    total = float(tempered.double().exp_().sum())
    return values[:num_candidates], ids[order][:num_candidates], total


def draw_allowed(
    scores: Tensor,
    parameters: SamplingParameters,
    is_forbidden: Callable[[int], bool],
    generator: torch.Generator,
) -> int | None:
    """One token id, as if those that are forbidden did not exist; none when nothing is left.

    Args:
        scores: (vocabulary,) in fp32.
        parameters: of the request.
        is_forbidden: asked of the most likely ids first, and of no more than needed.
        generator: of the request's random numbers.
    """
    scores = scores.clone()
    order = scores.sort(descending=True, stable=True).indices.tolist()
    allowed: set[int] = set()
    num_asked, drawn = 0, -1
    while drawn not in allowed:
        # Where one is forbidden others mostly are, and a draw costs more than an answer.
        asked = order[num_asked : max(_MIN_IDS_TO_ASK, 2 * num_asked)]
        num_asked += len(asked)
        forbidden = [token_id for token_id in asked if is_forbidden(token_id)]
        allowed |= set(asked) - set(forbidden)
        if forbidden:
            scores[forbidden] = -torch.inf
        if not bool((scores > -torch.inf).any()):
            return None
        uniform = torch.rand(1, generator=generator, dtype=torch.float64)
        drawn = int(draw(scores[None], [parameters], uniform))
    return drawn


class _Candidates:
    """The most likely tokens of some requests, or all tokens.

    Args:
        values: (requests, tokens) scores, falling.
        ids: (requests, tokens) of them.
        totals: (requests,) weight of the whole vocabulary, where the most likely token weighs 1.
        vocab_size: number of all tokens.
    """

    def __init__(self, values: Tensor, ids: Tensor, totals: Tensor, vocab_size: int) -> None:
        self._values, self._ids, self._totals = values, ids, totals
        self._vocab_size = vocab_size
        self._is_all = values.shape[-1] == vocab_size
        self._weights = (values - values[:, :1]).double().exp()

    def draw(self, parameters: Sequence[SamplingParameters], uniforms: Tensor) -> Tensor:
        """One id per request; -1 where tokens that are not among the candidates may matter."""
        kept, is_known = self._kept(parameters)
        weights = torch.where(kept, self._weights, 0.0)
        cumulative = weights.cumsum(dim=-1)
        targets = uniforms * cumulative[:, -1]
        places = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]
        num_kept = kept.int().sum(dim=-1)
        last_kept = (kept.int() * torch.arange(1, kept.shape[-1] + 1)).argmax(dim=-1)
        places = torch.minimum(places, last_kept)
        drawn = self._ids.gather(-1, places[:, None])[:, 0]
        return torch.where(is_known & (num_kept > 0), drawn, -1)

    def _kept(self, parameters: Sequence[SamplingParameters]) -> tuple[Tensor, Tensor]:
        """Which candidates (requests, tokens) are left, and whether (requests,) nothing else could be."""
        num_tokens = self._values.shape[-1]
        top_k = torch.tensor([one.top_k or self._vocab_size for one in parameters])
        last = self._values.gather(-1, (top_k.clamp(max=num_tokens) - 1)[:, None])
        is_cut = top_k < self._vocab_size
        kept = (self._values >= last) | ~is_cut[:, None]
        kept &= self._values > -torch.inf
        totals = torch.where(is_cut, (self._weights * kept).sum(dim=-1), self._totals)
        probabilities = torch.where(kept, self._weights, 0.0) / totals[:, None]
        before = probabilities.cumsum(dim=-1) - probabilities
        top_p = torch.tensor([one.top_p for one in parameters], dtype=torch.float64)
        # A probability that rounding left at 1 must not cut.
        kept &= (before < top_p[:, None]) | (top_p >= 1.0)[:, None]
        kept[:, 0] = True
        min_p = torch.tensor([one.min_p for one in parameters], dtype=torch.float64)
        kept &= self._weights >= min_p[:, None]
        # The last candidate may have equals that are not here and come before it.
        is_known = ~(kept & (self._values == self._values[:, -1:])).any(dim=-1)
        is_known &= ~is_cut | (top_k <= num_tokens)
        is_known |= self._is_all
        for row, one in enumerate(parameters):
            if one.typical_p < 1.0:
                kept[row] = _typical(torch.where(kept[row], self._weights[row], 0.0), one.typical_p)
        return kept, is_known


def _is_unrestricted(parameters: SamplingParameters) -> bool:
    return not (
        parameters.top_k or parameters.top_p < 1.0 or parameters.min_p or parameters.typical_p < 1.0
    )


def _typical(weights: Tensor, typical_p: float) -> Tensor:
    """Which tokens (tokens,) are left: those whose surprise is nearest the entropy (Meister et al. 2022)."""
    probabilities = weights / weights.sum()
    surprise = -probabilities.log()
    entropy = torch.where(probabilities > 0, probabilities * surprise, 0.0).sum()
    order = (surprise - entropy).abs().sort(stable=True).indices
    ordered = probabilities[order]
    kept = torch.zeros_like(weights, dtype=torch.bool)
    kept[order] = ordered.cumsum(dim=0) - ordered < typical_p
    return kept & (probabilities > 0)


@dataclass(frozen=True)
class ScoredToken:
    """A token and the natural logarithm of its probability under the model, before any parameter."""

    token_id: int
    log_probability: float
    alternatives: tuple[tuple[int, float], ...]
    """The most likely ids in its place, and their log-probabilities."""


def score_tokens(logits: Tensor, token_ids: Tensor, num_alternatives: int) -> list[ScoredToken]:
    """Log-probabilities of tokens.

    Args:
        logits: (tokens, vocabulary).
        token_ids: (tokens,).
        num_alternatives: number of most likely ids to report for each.
    """
    logits = logits.float()
    if logits.device.type == "mps":  # it has no fp64
        logits = logits.cpu()
    # Row by row: in fp64 all of them would take their memory twice more.
    totals = logits.new_empty(len(logits), dtype=torch.float64)
    for row, scores in enumerate(logits):
        totals[row] = scores.double().logsumexp(dim=-1)
    of_tokens = (logits.gather(-1, token_ids.to(logits.device)[:, None])[:, 0] - totals).float()
    best = logits.topk(min(num_alternatives, logits.shape[-1]), dim=-1)
    best_values = (best.values - totals[:, None]).float().tolist()
    return [
        ScoredToken(token_id, value, tuple(zip(ids, values, strict=True)))
        for token_id, value, ids, values in zip(
            token_ids.tolist(), of_tokens.tolist(), best.indices.tolist(), best_values, strict=True
        )
    ]
