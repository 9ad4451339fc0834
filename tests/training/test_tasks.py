"""What a step computes, against the plain formula."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.training.module import TrainingModule
from tests.training.training_here import GPT2_WITH_DROPOUT, TrainingHere


class _FirstStep:
    """Records the first optimizer step of a training: the model, the batches and their gradient."""

    def __init__(self) -> None:
        self.backbone: Any = None
        self.batches: list[Batch] = []
        self.gradient: dict[str, Tensor] = {}
        self._training_step = TrainingModule.training_step
        self._clip = TrainingModule.configure_gradient_clipping

    def training_step(self, task: TrainingModule, batch: Batch, index: int) -> dict[str, Tensor]:
        if self.backbone is None:
            self.backbone = copy.deepcopy(task.backbone)
        if not self.gradient:
            self.batches.append(batch)
        return self._training_step(task, batch, index)

    def clip(self, task: TrainingModule, *arguments: Any, **options: Any) -> None:
        if not self.gradient:
            for name, parameter in task.backbone.named_parameters():
                assert parameter.grad is not None
                self.gradient[name] = parameter.grad.clone()
        self._clip(task, *arguments, **options)

    def __call__(self, train: Callable[[], object]) -> None:
        with mock.patch.multiple(
            TrainingModule,
            training_step=lambda *given: self.training_step(*given),
            configure_gradient_clipping=lambda *given, **options: self.clip(*given, **options),
        ):
            train()


@pytest.mark.parametrize("batching", ["length", "concatenated"])
def test_the_gradient_of_a_step_is_that_of_the_mean_over_all_of_its_targets(
    batching: str, dataset_dir: Path, tmp_path: Path
) -> None:
    """Not of the mean of the means of its batches, which hold different numbers of targets."""
    config = tmp_path / "plain.json"
    config.write_text(json.dumps({**GPT2_WITH_DROPOUT, **dict.fromkeys(_DROPOUTS, 0.0)}))
    training = TrainingHere(dataset_dir, tmp_path)
    step = _FirstStep()
    step(
        lambda: training(
            model_config=str(config), batching=batching, accumulate_grad_batches=3, max_steps=1
        )
    )
    assert len(step.batches) == 3
    losses = []
    for batch in step.batches:
        logits = step.backbone(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        chosen = targets != -100
        losses.append(functional.cross_entropy(logits[chosen], targets[chosen], reduction="none"))
    torch.cat(losses).mean().backward()  # type: ignore[no-untyped-call]
    for name, parameter in step.backbone.named_parameters():
        torch.testing.assert_close(step.gradient[name], parameter.grad, rtol=1e-4, atol=1e-6)
    if batching == "length":
        assert len({len(loss) for loss in losses}) > 1, "else a mean of means would do"


_DROPOUTS = [name for name in GPT2_WITH_DROPOUT if name.endswith("_pdrop")]


def test_activations_that_are_computed_again_change_nothing(
    dataset_dir: Path, tmp_path: Path
) -> None:
    """Dropout included: the second computation draws what the first one drew."""
    training = TrainingHere(dataset_dir, tmp_path)
    kept, again = (
        training.to_the_end(max_steps=3, activation_checkpointing=flag) for flag in (False, True)
    )
    weights = "model/model.safetensors"
    assert (kept / weights).read_bytes() == (again / weights).read_bytes()
