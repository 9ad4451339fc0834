"""Steps of a training on a device that is only pretended: nothing is forgotten on the processor."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.modelling.acceleration import accelerate
from full_stack_transformer.modelling.losses import LossOptions, language_model_loss
from full_stack_transformer.training import optimization
from tests.another_device import DEVICE, another_device
from tests.generation.small_models import SHAPES, small_backbone


@pytest.mark.parametrize(
    "options",
    [LossOptions(), LossOptions(unlikelihood_alpha=0.5, label_smoothing=0.1, z_loss=1e-3)],
    ids=["cross entropy", "all terms"],
)
def test_another_device_gives_the_same_losses(options: LossOptions) -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 9, 50), torch.randint(0, 50, (2, 9))
    labels = ids.clone()
    labels[1, 5:] = -100
    documents = torch.tensor([[0] * 4 + [1] * 5] * 2)
    expected = language_model_loss(logits, labels, ids, options, documents)
    with another_device():
        there = [tensor.to(DEVICE) for tensor in (logits, labels, ids, documents)]
        found = language_model_loss(there[0], there[1], there[2], options, there[3])
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other.cpu())


@pytest.mark.parametrize("is_packed", [False, True], ids=["whole rows", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_another_device_takes_the_same_steps(
    shape: str, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward, clipping and Muon, which is the same in fp32."""
    monkeypatch.setattr(optimization, "multiplies_bfloat16", lambda device: False)
    torch.manual_seed(0)
    here = copy.deepcopy(small_backbone(shape))
    accelerate(here)
    there = copy.deepcopy(here)
    ids = torch.randint(3, 300, (2, 16))
    lengths = (9, 7) if is_packed else (16,)
    positions = torch.cat([torch.arange(length) for length in lengths]).repeat(2, 1)
    expected = _train(here, ids, positions)
    with another_device():
        there.to(DEVICE)
        there.tie_weights()  # what moves a weight to a tensor of another class unties it
        found = _train(there, ids.to(DEVICE), positions.to(DEVICE)).cpu()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def _train(backbone: Backbone, ids: Tensor, positions: Tensor) -> Tensor:
    """The loss before the third step."""
    optimizer = optimization.make_optimizer(
        backbone, name="muon", learning_rate=1e-2, weight_decay=0.1
    )
    for _ in range(3):
        logits = backbone(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss, _, count = language_model_loss(logits, ids, ids, LossOptions(z_loss=1e-3))
        torch.autograd.backward(loss / count)
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()
