"""Losses as pure functions of logits and labels."""

from torch import Tensor
from torch.nn import functional


def next_token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of the next tokens, and how many there are.

    The caller divides: a mean of means would weigh a token by the length of its neighbours.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens), -100 where there is nothing to predict; shifted here.

    Returns:
        Two scalars: nats, number of targets.
    """
    predictions, targets = logits[:, :-1], labels[:, 1:]
    loss = functional.cross_entropy(
        predictions.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return loss, (targets != -100).sum()
