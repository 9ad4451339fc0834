"""Labelled rows as a LightningModule: one for all tasks; what differs is in the task."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.tasks.task import Prediction, Row, Task
from full_stack_transformer.training.callbacks.profiling import FORWARD, LOSS
from full_stack_transformer.training.data.batches import Batch
from full_stack_transformer.training.data.rows import BaseDataModule
from full_stack_transformer.training.module import TrainingModule


class LabelledRows(TrainingModule):
    """Learn a task from labelled rows.

    Args:
        backbone: with the task's head.
        arguments: the options of the training.
        data: opened, with the validation rows.
    """

    def __init__(self, backbone: Backbone, arguments: TrainArguments, data: BaseDataModule) -> None:
        super().__init__(backbone, arguments)
        self.task: Task = data.task
        self._data = data
        self._scores: dict[int, Tensor] = {}

    def mean_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The task's loss, twice: there is nothing in it but what is to be learned."""
        scores = self._forward(batch)
        with self.profiled(LOSS):
            loss = self.task.loss_sum(scores, batch) / batch["num_targets"]
        return loss, loss.detach()

    def on_validation_epoch_start(self) -> None:
        """Forget the validation before."""
        super().on_validation_epoch_start()
        self._scores = {}

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add up the losses, and keep the scores of each feature."""
        scores = self._forward(batch)
        numbers = batch["numbers"].tolist()
        if not numbers:  # the other ranks have a feature more
            return
        with self.profiled(LOSS):
            loss_sum = self.task.loss_sum(scores, batch)
        features = self._data.features("valid")
        self.add_validation_loss(
            loss_sum, sum(self.task.num_targets(features[number]) for number in numbers)
        )
        self._scores.update(zip(numbers, scores.float().cpu(), strict=True))

    def validation_metrics(self, loss: float) -> dict[str, float]:
        """What the task measures on the rows all of whose features were computed."""
        rows, predictions = self.predictions()
        return self.task.figures(rows, predictions).scalars if rows else {}

    def predictions(self) -> tuple[list[Row], list[Prediction]]:
        """The rows of the validation, and what was predicted for each."""
        features = self._data.features("valid")
        scores = _gathered(self._scores, self.trainer.world_size)
        left_out = {f["row"] for number, f in enumerate(features) if number not in scores}
        all_rows = self._data.named_rows("valid")
        kept = [number for number in range(len(all_rows)) if number not in left_out]
        new_number = {number: place for place, number in enumerate(kept)}
        numbers = [n for n, feature in enumerate(features) if feature["row"] in new_number]
        rows: list[Row] = [all_rows[number] for number in kept]
        if not rows:
            return [], []
        predictions = self.task.predictions(
            rows,
            [
                {**features[number], "row": new_number[features[number]["row"]]}
                for number in numbers
            ],
            [scores[number] for number in numbers],
        )
        return rows, predictions

    def _forward(self, batch: Batch) -> Tensor:
        with self.profiled(FORWARD):
            return self.task.forward(self.backbone, batch)


def _gathered(scores: dict[int, Tensor], world_size: int) -> dict[int, Tensor]:
    """Those of all processes."""
    if world_size == 1:
        return scores
    parts: Sequence[dict[int, Tensor] | None] = [None] * world_size
    torch.distributed.all_gather_object(parts, scores)
    return {number: score for part in parts if part for number, score in part.items()}
