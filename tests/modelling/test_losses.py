"""The loss is the plain formula over real targets."""

import torch

from full_stack_transformer.modelling.losses import next_token_loss


def test_the_loss_equals_the_obvious_sum() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[1, 2, 3, 4, 5], [6, 0, -100, -100, -100]])
    expected = -sum(
        logits[row, position].log_softmax(-1)[labels[row, position + 1]]
        for row, length in ((0, 5), (1, 2))
        for position in range(length - 1)
    )
    loss, count = next_token_loss(logits, labels)
    assert count == 5
    torch.testing.assert_close(loss, torch.as_tensor(expected))
