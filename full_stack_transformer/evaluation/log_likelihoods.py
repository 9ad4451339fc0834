"""How probable texts are, by the runner that generates: what multiple-choice benchmarks ask, and what
rounding the weights costs.

    context + continuation ──> token ids ──runner──> log-likelihood, and whether each token is the likeliest

Knows nothing of benchmarks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.generation.open_engine import open_runner
from full_stack_transformer.generation.runners.native.decoder import WeightsDtype
from full_stack_transformer.generation.runners.torch import Runner, SlotWork
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

# Tokens read at once: the logits of 512 over GPT-2's vocabulary take 100 MB.
_MAX_TOKENS_AT_ONCE = 512
_MAX_SAMPLES_AT_ONCE = 16


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
    for indices in _groups(order, lengths, runner.num_slots):
        work = [
            SlotWork(slot, 0, spans[index].token_ids[:-1], num_logits=spans[index].num_targets)
            for slot, index in enumerate(indices)
        ]
        rows = runner.run(work).float().log_softmax(-1)
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


def _groups(order: Sequence[int], lengths: Sequence[int], num_slots: int) -> Iterator[list[int]]:
    """Indices of texts of these lengths that are computed together, a few at once."""
    group: list[int] = []
    num_tokens = 0
    for index in order:
        length = lengths[index]
        if group and (num_tokens + length > _MAX_TOKENS_AT_ONCE or len(group) == num_slots):
            yield group
            group, num_tokens = [], 0
        group.append(index)
        num_tokens += length
    if group:
        yield group


@dataclass(frozen=True)
class RoundedWeights:
    """How well a model with rounded weights predicts the same samples."""

    weights_dtype: WeightsDtype
    loss: float
    """Mean cross entropy per token, in nats."""
    perplexity: float
    relative_perplexity_change: float
    """0.01 is a perplexity that is 1 % higher than with fp32 weights."""


def measure_rounded_weights(
    backbone: Backbone, corpus: Corpus, exact_loss: float, weights_dtype: WeightsDtype
) -> RoundedWeights:
    """Predict every token of every sample but its first from those before it, with rounded weights.

    Args:
        backbone: in evaluation mode; its weights may be changed.
        corpus: samples of token ids.
        exact_loss: the mean loss with fp32 weights.
        weights_dtype: what the weights are rounded to.

    Raises:
        ModelError: the weights cannot be had in that type here.
    """
    runner = open_runner(
        backbone,
        num_slots=_MAX_SAMPLES_AT_ONCE,
        weights_dtype=weights_dtype,
        max_length=int(corpus.lengths().max()),
    )
    loss = _mean_loss(runner, corpus)
    return RoundedWeights(
        weights_dtype=weights_dtype,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        relative_perplexity_change=math.expm1(min(loss - exact_loss, 700.0)),
    )


def _mean_loss(runner: Runner, corpus: Corpus) -> float:
    """Mean cross entropy of all targets, in nats."""
    loss_sum, num_targets = 0.0, 0
    lengths = corpus.lengths().tolist()
    with_target = [index for index, length in enumerate(lengths) if length > 1]
    for indices in _groups(with_target, lengths, _MAX_SAMPLES_AT_ONCE):
        samples: list[list[int]] = [corpus[index].tolist() for index in indices]
        work = [
            SlotWork(slot, 0, sample[:-1], num_logits=len(sample) - 1)
            for slot, sample in enumerate(samples)
        ]
        logits = runner.run(work).float()
        targets = torch.tensor(
            [token_id for sample in samples for token_id in sample[1:]], device=logits.device
        )
        loss_sum += float(cross_entropy(logits, targets, reduction="none").double().sum())
        num_targets += len(targets)
    return loss_sum / max(1, num_targets)
