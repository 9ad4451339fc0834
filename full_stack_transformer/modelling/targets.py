"""The output layer at the positions that predict something, and nowhere else.

Often a third of the tokens of a conversation are answers, and with a vocabulary of 49,152 tokens the output
layer is a fifth of a small model's work and most of its memory. Knows nothing of tasks.

Legend: B batch, T tokens, N targets of a batch, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.modelling.losses import next_tokens, target_loss
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL


def is_predicting(labels: Tensor) -> Tensor:
    """(B, T) whether something is predicted there; at least one position, so that there are logits."""
    found = next_tokens(labels) != IGNORED_LABEL
    if not bool(found.any()):
        found[0, 0] = True
    return found


def logits_where(backbone: Backbone, chosen: Tensor, **inputs: Tensor | None) -> Tensor:
    """The logits (1, N, V) at the chosen positions, row by row.

    Args:
        backbone: a causal model.
        chosen: (B, T) bool.
        inputs: of the backbone.
    """
    with _head_reads(backbone, chosen):
        logits: Tensor = backbone(**inputs, use_cache=False).logits
    return logits


def log_likelihoods(backbone: Backbone, input_ids: Tensor, *labels: Tensor) -> Tensor:
    """Log-likelihood of the labels of each row: (B,), or (B, kinds) of several kinds of labels.

    Args:
        backbone: a causal model.
        input_ids: (B, T).
        labels: each (B, T), -100 where nothing is predicted; shifted here.
    """
    chosen = torch.stack([is_predicting(one) for one in labels]).any(dim=0)
    logits = logits_where(backbone, chosen, input_ids=input_ids)
    counts = chosen.sum(dim=1).tolist()
    parts = torch.split(logits, counts, dim=1)
    found = []
    for one in labels:
        targets = torch.split(next_tokens(one)[chosen][None], counts, dim=1)
        # One loss for each row: the gradient of a row has a factor of its own.
        sums = [
            target_loss(part, target)[0] if target.shape[1] else part.new_zeros(())
            for part, target in zip(parts, targets, strict=True)
        ]
        found.append(-torch.stack(sums))
    return found[0] if len(found) == 1 else torch.stack(found, dim=1)


@contextmanager
def _head_reads(backbone: Backbone, chosen: Tensor) -> Iterator[None]:
    # Row numbers, not a mask: indexing by a mask counts it once more.
    rows = chosen.flatten().nonzero()[:, 0]

    def choose(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = arguments
        return (hidden.flatten(0, 1).index_select(0, rows)[None], *others)

    handle = backbone.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
