"""How probable texts are, by the runner that generates: what multiple-choice benchmarks ask, and what
rounding the weights costs.

    context + continuation ──> token ids ──runner──> log-likelihood, and whether each token is the likeliest

Knows nothing of benchmarks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.generation.open_engine import (
    blocks_for,
    default_kv_dtype,
    open_runner,
)
from full_stack_transformer.generation.runners.native.decoder import KvDtype, WeightsDtype
from full_stack_transformer.generation.runners.torch import Runner, SequenceWork
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

# Tokens read at once: the logits of 512 over GPT-2's vocabulary take 100 MB.
_MAX_TOKENS_AT_ONCE = 512
_MAX_TEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class TokenSpan:
    """Token ids, of which the last ones are predicted from all before them."""

    token_ids: Sequence[int]
    num_targets: int


@dataclass(frozen=True)
class LogLikelihood:
    """How probable the targets of a span are."""

    value: float
    """Sum over the targets, in nats."""
    is_greedy: bool
    """Whether each of them is the likeliest token."""


def continuation_span(
    context: str, continuation: str, tokenizer: DocumentTokenizer, *, max_length: int
) -> TokenSpan:
    """The tokens of a continuation after those of its context, as they are in one text.

    Spaces between the two belong to the continuation, where byte-level vocabularies have them. What does
    not fit into the model is cut off at the beginning.
    """
    bare = context.rstrip()
    # Without a context the first token is predicted from the begin token, as lm-evaluation-harness does.
    encode = tokenizer.encode_prompt if bare else tokenizer.encode_after_begin
    whole, num_context = encode(context + continuation), len(encode(bare))
    # A token over the border counts to the continuation.
    num_targets = min(max(1, len(whole) - num_context), len(whole) - 1, max_length)
    return TokenSpan(whole[-(max_length + 1) :], num_targets)


def rolling_spans(
    text: str, tokenizer: DocumentTokenizer, *, max_length: int
) -> Iterator[TokenSpan]:
    """A whole text, each token predicted once, after as many as the model takes where there are so many."""
    token_ids = tokenizer.encode_after_begin(text)
    num_before = max(1, len(tokenizer.prefix_ids))
    for start in range(num_before, len(token_ids), max_length):
        end = min(start + max_length, len(token_ids))
        yield TokenSpan(token_ids[max(0, end - 1 - max_length) : end], end - start)


def log_likelihoods(spans: Sequence[TokenSpan], runner: Runner) -> list[LogLikelihood]:
    """Of each span, in their order."""
    found = [LogLikelihood(0.0, True)] * len(spans)
    # Spans of similar length are computed together.
    order = sorted(
        (index for index, span in enumerate(spans) if span.num_targets),
        key=lambda index: len(spans[index].token_ids),
    )
    lengths = [len(span.token_ids) for span in spans]
    for indices in _groups(order, lengths, runner):
        texts = [spans[index].token_ids[:-1] for index in indices]
        counts = [spans[index].num_targets for index in indices]
        rows = runner.run(_work(texts, counts, runner)).float().log_softmax(-1)
        end = 0
        for index in indices:
            span = spans[index]
            scores = rows[end : end + span.num_targets]
            end += span.num_targets
            targets = torch.tensor(span.token_ids[-span.num_targets :], device=scores.device)
            chosen = scores.gather(1, targets[:, None])[:, 0]
            found[index] = LogLikelihood(
                float(chosen.double().sum()), bool((scores.argmax(-1) == targets).all())
            )
    return found


def _groups(order: Sequence[int], lengths: Sequence[int], runner: Runner) -> Iterator[list[int]]:
    """Indices of texts of these lengths that are computed together: a few that the runner's blocks hold."""
    group: list[int] = []
    num_tokens = num_blocks = 0
    for index in order:
        length = lengths[index]
        needed = -(-length // runner.block_size)
        is_full = len(group) == _MAX_TEXTS_AT_ONCE or num_tokens + length > _MAX_TOKENS_AT_ONCE
        if group and (is_full or num_blocks + needed > runner.num_blocks):
            yield group
            group, num_tokens, num_blocks = [], 0, 0
        group.append(index)
        num_tokens += length
        num_blocks += needed
    if group:
        yield group


def _work(
    texts: Sequence[Sequence[int]], counts: Sequence[int], runner: Runner
) -> list[SequenceWork]:
    """Whole texts, with the logits of so many last tokens of each."""
    work: list[SequenceWork] = []
    end = 0
    for text, count in zip(texts, counts, strict=True):
        start, end = end, end + -(-len(text) // runner.block_size)
        work.append(SequenceWork(range(start, end), 0, text, num_logits=count))
    return work


def open_scoring_runner(
    backbone: Backbone,
    *,
    weights_dtype: WeightsDtype,
    kv_dtype: Literal["auto"] | KvDtype,
    max_length: int,
) -> Runner:
    """A runner with memory for a few texts.

    Raises:
        ModelError: weights, or keys and values, cannot be had in that type here.
        MachineError: memory is short.
    """
    return open_runner(
        backbone,
        num_blocks=blocks_for(max(max_length, _MAX_TOKENS_AT_ONCE)) + _MAX_TEXTS_AT_ONCE,
        weights_dtype=weights_dtype,
        kv_dtype=default_kv_dtype(weights_dtype) if kv_dtype == "auto" else kv_dtype,
        max_length=max_length,
    )


def perplexity(
    backbone: Backbone, samples: Sequence[Sequence[int]], weights_dtype: WeightsDtype
) -> float:
    """exp of the mean surprise of every token of the samples but the first of each.

    Raises:
        ModelError: the weights cannot be had in that type here.
        MachineError: memory is short.
    """
    spans = [TokenSpan(sample, len(sample) - 1) for sample in samples]
    longest = max(map(len, samples))
    runner = open_scoring_runner(
        backbone, weights_dtype=weights_dtype, kv_dtype="auto", max_length=longest
    )
    total = sum(found.value for found in log_likelihoods(spans, runner))
    return math.exp(-total / max(1, sum(span.num_targets for span in spans)))


@dataclass(frozen=True)
class RoundedWeights:
    """How well a model with rounded weights predicts the same samples."""

    weights_dtype: WeightsDtype
    kv_dtype: KvDtype
    loss: float
    """Mean cross entropy per token, in nats."""
    perplexity: float
    relative_perplexity_change: float
    """0.01 is a perplexity that is 1 % higher than with fp32 weights."""


def measure_rounded_weights(
    backbone: Backbone,
    corpus: Corpus,
    exact_loss: float,
    weights_dtype: WeightsDtype,
    kv_dtype: Literal["auto"] | KvDtype = "auto",
) -> RoundedWeights:
    """Predict every token of every sample but its first from those before it, with rounded weights.

    Args:
        backbone: in evaluation mode; its weights may be changed.
        corpus: samples of token ids.
        exact_loss: the mean loss with fp32 weights.
        weights_dtype: what the weights are rounded to.
        kv_dtype: what keys and values are rounded to.

    Raises:
        ModelError: the weights cannot be had in that type here.
    """
    if kv_dtype == "auto":
        kv_dtype = default_kv_dtype(weights_dtype)
    runner = open_scoring_runner(
        backbone,
        weights_dtype=weights_dtype,
        kv_dtype=kv_dtype,
        max_length=int(corpus.lengths().max()),
    )
    loss = _mean_loss(runner, corpus)
    return RoundedWeights(
        weights_dtype=weights_dtype,
        kv_dtype=kv_dtype,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        relative_perplexity_change=math.expm1(min(loss - exact_loss, 700.0)),
    )


def _mean_loss(runner: Runner, corpus: Corpus) -> float:
    """Mean cross entropy of all targets, in nats."""
    loss_sum, num_targets = 0.0, 0
    lengths = corpus.lengths().tolist()
    with_target = [index for index, length in enumerate(lengths) if length > 1]
    for indices in _groups(with_target, lengths, runner):
        samples: list[list[int]] = [corpus[index].tolist() for index in indices]
        texts = [sample[:-1] for sample in samples]
        logits = runner.run(_work(texts, list(map(len, texts)), runner)).float()
        targets = torch.tensor(
            [token_id for sample in samples for token_id in sample[1:]], device=logits.device
        )
        loss_sum += float(cross_entropy(logits, targets, reduction="none").double().sum())
        num_targets += len(targets)
    return loss_sum / max(1, num_targets)
