"""A task under the trainer of transformers, for scripts that are around it. Needs the package accelerate."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone
from transformers import Trainer, TrainingArguments

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.errors import MissingExtraError
from full_stack_transformer.tasks.task import Feature, RowTask


def to_hf_trainer(
    task: RowTask, backbone: Backbone, features: Sequence[Feature], arguments: TrainingArguments
) -> "TaskTrainer":
    """The same task under the Hugging Face Trainer.

    The loss of a step is ours: the sum over its targets by their number, however many batches it has.
    `eval_loss` is the mean over batches of theirs, as always there.

    Args:
        task: makes batches and losses.
        backbone: with the task's head.
        features: of the training rows.
        arguments: of transformers.

    Raises:
        MissingExtraError: accelerate is not installed.
    """
    try:
        importlib.import_module("accelerate")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "the Hugging Face Trainer needs the package accelerate; install it with: pip install accelerate"
        ) from error
    arguments.remove_unused_columns = False  # a feature says more than the model's forward takes
    return TaskTrainer(task, backbone, features, arguments)


class TaskTrainer(Trainer):
    """See `to_hf_trainer`."""

    loss_is_scaled_for_ga = True  # by the targets of all batches of the step

    def __init__(
        self,
        task: RowTask,
        backbone: Backbone,
        features: Sequence[Feature],
        arguments: TrainingArguments,
    ) -> None:
        self.task = task
        super().__init__(
            model=backbone,
            args=arguments,
            train_dataset=list(features),
            data_collator=self._collate,
        )

    def get_batch_samples(self, *arguments: Any) -> Any:
        """The batches of a step, and how many targets they have."""
        batches, _ = super().get_batch_samples(*arguments)
        counts = [batch["num_targets"].sum() for batch in batches]
        if not counts:
            return batches, None
        num_targets = torch.stack(counts).sum().float().to(self.args.device)
        # The mean over processes: their gradients are averaged.
        return batches, self.accelerator.reduce(num_targets, reduction="mean")

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The part of the step's mean loss that a batch has."""
        if num_items_in_batch is None:
            num_items_in_batch = inputs["num_targets"].sum()
        scores = self.task.forward(model, inputs)
        loss = self._mean_loss(scores, inputs, num_items_in_batch)
        return (loss, {"logits": scores}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, scores and labels; theirs reads the loss only where the model takes `labels`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self.task.forward(model, inputs)
            counts = inputs.get("num_targets")  # not there without labels
            loss = None if counts is None else self._mean_loss(scores, inputs, counts.sum())
        return (loss, None, None) if prediction_loss_only else (loss, scores, inputs.get("labels"))

    def _collate(self, features: Sequence[Feature]) -> Batch:
        batch = self.task.collate(features)
        if "labels" in batch:
            batch["num_targets"] = torch.tensor(list(map(self.task.num_targets, features)))
        return batch

    def _mean_loss(self, scores: Tensor, batch: Batch, num_targets: Tensor) -> Tensor:
        return self.task.training_losses(scores, batch)[0] / num_targets.clamp(min=1)
