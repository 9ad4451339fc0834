"""Losses of a language model as functions of logits and labels: sums over real targets, never means.

    logits (batch, tokens, vocabulary) ──chunks of rows──> softmax ──> values and gradient

All losses and their gradient are computed in one pass over the vocabulary, while the probabilities of a chunk
are in the processor's cache. Knows nothing of models, optimizers and data.

Legend of the formulas: x logits of a row, p = softmax(x), Z = sum(exp(x)), y the target.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL

# Probabilities in a chunk. On a processor 8 MB of fp32, for its caches: 2^18 to 2^21 took the same time, 2^22
# a third more; a large chunk has less overhead. On a GPU 512 MB, so that few kernels are started.
_CPU_CHUNK_ELEMENTS, _GPU_CHUNK_ELEMENTS = 1 << 21, 1 << 27
# Smaller values of 1 - p are mostly rounding errors: a softmax in fp32 is exact to about 1e-6.
_MIN_REMAINDER = 1e-5
# Dividing by a factor must not overflow; a smaller factor makes a probability wrong by as much.
_MIN_FACTOR, _MIN_FACTOR_FP16 = 1e-6, 1e-3
# For smaller p, log(p) of a target is computed from the logits, since p may have underflowed.
_MIN_PROBABILITY = 1e-30


@dataclass(frozen=True)
class LossOptions:
    """Terms added to the cross entropy; none by default."""

    unlikelihood_alpha: float = 0.0
    """Weight of the unlikelihood of tokens that occurred before."""
    label_smoothing: float = 0.0
    """Part of the target's probability, spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Weight of (log Z)^2, which keeps logits small (Chowdhery et al. 2022, PaLM, section 5)."""


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats, limited to what a 32-bit float can hold."""
    return math.exp(min(loss, 80.0))


def next_token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of the next tokens, and how many there are.

    The caller divides: a mean of means would weight a token by the length of its batch.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens), -100 where there is nothing to predict; shifted here.

    Returns:
        Two scalars: nats in at least fp32, number of targets.
    """
    loss_sum, _, num_targets = language_model_loss(logits, labels, labels, LossOptions())
    return loss_sum, num_targets


def target_loss(
    logits: Tensor, targets: Tensor, options: LossOptions | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the losses of targets that stand at the position that predicts them.

    Args:
        logits: (batch, tokens, vocabulary).
        targets: (batch, tokens), -100 where there is nothing to predict.
        options: without unlikelihood, which needs the context.

    Returns:
        Two scalars: the loss, and its cross entropy alone without a gradient.
    """
    options = options or LossOptions()
    assert not options.unlikelihood_alpha, "needs the context"
    loss_sum, cross_entropy_sum, _ = _VocabularyLoss.apply(  # type: ignore[no-untyped-call]
        logits, targets, options, targets, None
    )
    return loss_sum, cross_entropy_sum


def language_model_loss(
    logits: Tensor,
    labels: Tensor,
    input_ids: Tensor,
    options: LossOptions,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses of the next tokens; its gradient has the type of `logits` and can be computed once.

    The cross entropy with `label_smoothing` e and `z_loss` c is

        (1 - e) (log Z - x_y) + e (log Z - mean(x)) + c (log Z)^2

    Added to it, times `unlikelihood_alpha`, is the unlikelihood of Welleck et al. 2019 (arXiv 1908.04319,
    equations 4 and 5) token by token: -sum(log(1 - p_c)) over the set of tokens c in the context without
    y; the context of a target is the input before it. Unlike there, where 1 - p_c is below 1e-5 and its
    logarithm cut off, the gradient does not become zero.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens), -100 where there is nothing to predict; shifted here.
        input_ids: (batch, tokens). Padding follows the tokens of a row, or is a document of its own, and so
            is in no context.
        options: weights of the terms.
        document_ids: (batch, tokens), equal for tokens that see each other; without them a row is a document.

    Returns:
        Three scalars: the loss, its cross entropy alone without a gradient (both nats, in at least fp32),
        number of targets.
    """
    targets = next_tokens(labels)
    candidates = None
    if options.unlikelihood_alpha:
        candidates = _candidates(input_ids, targets, document_ids)
    loss_sum, cross_entropy_sum, num_targets = _VocabularyLoss.apply(  # type: ignore[no-untyped-call]
        logits, targets, options, input_ids, candidates
    )
    return loss_sum, cross_entropy_sum, num_targets


def next_tokens(labels: Tensor) -> Tensor:
    """Labels at the position that predicts them; shifting the logits instead would copy them."""
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED_LABEL)], dim=1)


def _candidates(input_ids: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
    """Whether a position should avoid the token of another position: (batch, tokens, tokens), bool.

    A set: of equal tokens in a document only the first counts.
    """
    every_pair = torch.ones((input_ids.shape[1],) * 2, dtype=torch.bool, device=input_ids.device)
    is_candidate = (input_ids[:, None, :] != targets[:, :, None]) & every_pair.tril()
    is_repetition = (input_ids[:, None, :] == input_ids[:, :, None]) & every_pair.tril(-1)
    if document_ids is not None:
        is_same_document = document_ids[:, None, :] == document_ids[:, :, None]
        is_candidate &= is_same_document
        is_repetition &= is_same_document
    return is_candidate & ~is_repetition.any(dim=2)[:, None, :]


class _VocabularyLoss(Function):
    """All losses and, in the same pass, their gradient.

    The forward pass already computes the gradient, and the backward pass scales it by the weight of the loss:
    the probabilities are computed once, and only logits and gradient of that size are kept. A factor on all
    probabilities of a position is left to that scaling too, so the forward pass divides the rest of the
    gradient by it.
    Time on one core for both passes over 1,024 rows of 50,257: 44 against 74 ms of torch's cross entropy
    in fp32; in bf16 54 against 98 ms with the logits cast to fp32 (70 ms without, but then the loss is
    rounded to bf16 too). With unlikelihood 51 and 61 ms (tests/benchmarks/losses.py).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        options: LossOptions,
        input_ids: Tensor,
        candidates: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        is_target = targets != IGNORED_LABEL
        labels = targets.clamp(min=0)[:, :, None]
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        target_logits = logits.gather(2, labels)[:, :, 0].to(_working_type(logits))
        target_probabilities = torch.empty_like(target_logits)
        added_losses = torch.zeros_like(target_logits)
        factors = torch.ones_like(target_logits)
        for part, probabilities in _softmax_of_chunks(logits, gradient):
            label, logit = labels[part], target_logits[part]
            probability = probabilities.gather(2, label)[:, :, 0]
            target_probabilities[part] = probability
            if options != LossOptions():
                added_losses[part], factors[part] = _add_losses(
                    probabilities,
                    logits[part],
                    (probability, logit),
                    options,
                    _context(part, input_ids, candidates),
                )
            share = (options.label_smoothing - 1) / factors[part][:, :, None]
            probabilities.scatter_add_(2, label, share)
            if gradient is not None and gradient.dtype != probabilities.dtype:
                gradient[part] = probabilities
        if gradient is not None:
            # By rows: masked assignment takes six times as long.
            unused = (~is_target).flatten().nonzero()[:, 0]
            gradient.flatten(0, 1).index_fill_(0, unused, 0)
        ctx.gradient = gradient
        ctx.factors = None if options == LossOptions() else factors
        cross_entropies = _cross_entropy(target_probabilities, target_logits, logits)
        cross_entropy_sum = torch.where(is_target, cross_entropies, 0).sum()
        loss_sum = cross_entropy_sum + torch.where(is_target, added_losses, 0).sum()
        num_targets = is_target.sum()
        ctx.mark_non_differentiable(cross_entropy_sum, num_targets)
        return loss_sum, cross_entropy_sum, num_targets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor, *_: Any) -> tuple[Tensor, None, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "the gradient of a loss can be taken once"
        if ctx.factors is not None:
            weight = (weight * ctx.factors)[:, :, None].to(gradient.dtype)
        return gradient.mul_(weight), None, None, None, None


def _working_type(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _softmax_of_chunks(
    logits: Tensor, gradient: Tensor | None
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """The probabilities, chunk by chunk, in at least fp32.

    They are written where their gradient will be or, if that has another type, into memory that the next
    chunk reuses. A chunk is several whole samples, or some positions of a sample.
    """
    num_samples, num_tokens, vocab_size = logits.shape
    limit = _CPU_CHUNK_ELEMENTS if logits.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    num_rows = max(1, limit // vocab_size)
    height, width = max(1, num_rows // num_tokens), min(num_rows, num_tokens)
    is_in_place = gradient is not None and gradient.dtype == _working_type(logits)
    memory = gradient if is_in_place else logits.new_empty(
        min(height, num_samples), width, vocab_size, dtype=_working_type(logits)
    )  # fmt: skip
    assert memory is not None
    for first_sample in range(0, num_samples, height):
        for first_position in range(0, num_tokens, width):
            part = (
                slice(first_sample, min(first_sample + height, num_samples)),
                slice(first_position, min(first_position + width, num_tokens)),
            )
            chunk = logits[part]
            out = memory[part] if is_in_place else memory[: chunk.shape[0], : chunk.shape[1]]
            if chunk.dtype != out.dtype:
                chunk = out.copy_(chunk)
            yield part, torch.softmax(chunk, dim=2, out=out)


def _context(
    part: tuple[slice, slice], input_ids: Tensor, candidates: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Tokens up to the last position of a part, and whether they are candidates of each position."""
    if candidates is None:
        return None
    samples, positions = part
    past = slice(0, positions.stop)
    is_candidate = candidates[samples, positions, past]
    return input_ids[samples, None, past].expand(is_candidate.shape), is_candidate


def _add_losses(
    probabilities: Tensor,
    logits: Tensor,
    target: tuple[Tensor, Tensor],
    options: LossOptions,
    context: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The terms added to the cross entropies.

    The probabilities become the gradient, without the share of the target and divided by the factor.

    Args:
        probabilities: (samples, positions, vocabulary), overwritten.
        logits: (samples, positions, vocabulary), in any type.
        target: its probability and its logit, each (samples, positions).
        options: weights of the terms.
        context: tokens and whether they are candidates, each (samples, positions, past).

    Returns:
        Losses and factors, each (samples, positions).
    """
    target_probability, target_logit = target
    loss = torch.zeros_like(target_logit)
    factor = odds = torch.ones_like(target_logit)
    if options.label_smoothing:
        mean = logits.mean(dim=2, dtype=loss.dtype)
        loss += options.label_smoothing * (target_logit - mean)
    if options.z_loss:
        log_z = target_logit + _cross_entropy(target_probability, target_logit, logits)
        loss += options.z_loss * log_z.square()
        factor = factor + 2 * options.z_loss * log_z
    if context is not None:
        unlikelihood, odds = _unlikelihood(probabilities, *context)
        loss += options.unlikelihood_alpha * unlikelihood
        factor = factor - options.unlikelihood_alpha * odds.sum(dim=2)
    least = _MIN_FACTOR_FP16 if logits.dtype == torch.float16 else _MIN_FACTOR
    factor = torch.where(factor.abs() < least, least, factor)
    if context is not None:
        odds *= (options.unlikelihood_alpha / factor)[:, :, None]
        probabilities.scatter_add_(2, context[0], odds)
    if options.label_smoothing:
        probabilities -= (options.label_smoothing / logits.shape[2] / factor)[:, :, None]
    return loss, factor


def _unlikelihood(
    probabilities: Tensor, token_ids: Tensor, is_candidate: Tensor
) -> tuple[Tensor, Tensor]:
    """-sum(log(1 - p_c)) of positions, and p_c / (1 - p_c) of each candidate: its slope times p_c."""
    unwanted = probabilities.gather(2, token_ids).mul_(is_candidate)
    remainder = (1 - unwanted).clamp_(min=_MIN_REMAINDER)
    return -remainder.log().sum(dim=2), unwanted.div_(remainder)


def _cross_entropy(target_probability: Tensor, target_logit: Tensor, logits: Tensor) -> Tensor:
    """-log(p_y) of positions, even if p_y underflows."""
    cross_entropy = -target_probability.log()
    is_small = target_probability < _MIN_PROBABILITY
    if is_small.any():
        log_z = logits[is_small].to(cross_entropy.dtype).logsumexp(dim=1)
        cross_entropy[is_small] = log_z - target_logit[is_small]
    return cross_entropy
