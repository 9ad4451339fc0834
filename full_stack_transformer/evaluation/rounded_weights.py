"""What rounding a model's weights costs: the loss through the runner that generates, beside that in fp32."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.evaluation.perplexity import Perplexity
from full_stack_transformer.generation.open_engine import open_runner
from full_stack_transformer.generation.runners.native.decoder import WeightsDtype
from full_stack_transformer.generation.runners.torch import Runner, SlotWork

# Tokens read at once: the logits of 512 over GPT-2's vocabulary take 100 MB.
_MAX_TOKENS_AT_ONCE = 512
_MAX_SAMPLES_AT_ONCE = 16


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
    backbone: Backbone, corpus: Corpus, exact: Perplexity, weights_dtype: WeightsDtype
) -> RoundedWeights:
    """Predict every token of every sample but its first from those before it, with rounded weights.

    Args:
        backbone: in evaluation mode; its weights may be changed.
        corpus: samples of token ids.
        exact: what was measured on them with fp32 weights.
        weights_dtype: what the weights are rounded to.

    Raises:
        ModelError: the weights cannot be had in that type here.
    """
    longest = int(corpus.lengths().max())
    runner = open_runner(
        backbone,
        num_slots=_MAX_SAMPLES_AT_ONCE,
        weights_dtype=weights_dtype,
        max_length=longest,
    )
    loss = _mean_loss(runner, corpus)
    return RoundedWeights(
        weights_dtype=weights_dtype,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        relative_perplexity_change=math.expm1(min(loss - exact.loss, 700.0)),
    )


def _mean_loss(runner: Runner, corpus: Corpus) -> float:
    """Mean cross entropy of all targets, in nats."""
    loss_sum, num_targets = 0.0, 0
    for samples in _groups(corpus):
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


def _groups(corpus: Corpus) -> Iterator[list[list[int]]]:
    """Samples that have a target, a few at once."""
    group: list[list[int]] = []
    for index in range(len(corpus)):
        sample: list[int] = corpus[index].tolist()
        if len(sample) < 2:
            continue
        num_tokens = sum(map(len, group)) + len(sample)
        if group and (num_tokens > _MAX_TOKENS_AT_ONCE or len(group) == _MAX_SAMPLES_AT_ONCE):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
