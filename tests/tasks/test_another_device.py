"""Every task of rows gives the same losses and predictions on a device that is not the processor."""

import copy
from pathlib import Path

import pytest
import torch

from tests.another_device import DEVICE, another_device
from tests.tasks.small_tasks import _MAKERS, are_close, small_rows, small_task

# Rows of two kinds are of the same task.
_NAMES = {"regression": "sequence_classification", "multi_label": "sequence_classification"}


@pytest.mark.parametrize("name", sorted(_MAKERS))
def test_another_device_gives_the_same_losses_and_predictions(
    name: str, tokenizer_dir: Path
) -> None:
    rows = small_rows(name, 6)
    task, backbone = small_task(_NAMES.get(name, name), rows, tokenizer_dir)
    task.prepare_backbone(backbone.eval())
    batch = {**task.collate(task.features(rows)), "weights": torch.ones(len(rows))}
    with torch.no_grad():
        scores = task.forward(backbone, batch)
        losses = task.training_losses(scores, batch)
        sums = task.validation_sums(scores, batch)
    predictions = task.predict(rows, backbone)
    with another_device(), torch.no_grad():
        moved = copy.deepcopy(backbone).to(DEVICE)
        there = {field: tensor.to(DEVICE) for field, tensor in batch.items()}
        scores = task.forward(moved, there)
        for one, other in zip(losses, task.training_losses(scores, there), strict=True):
            assert torch.allclose(one, other.cpu(), atol=1e-5)
        for field, found in task.validation_sums(scores, there).items():
            assert torch.allclose(sums[field], found.cpu(), atol=1e-5)
        assert are_close(task.predict(rows, moved), predictions)
