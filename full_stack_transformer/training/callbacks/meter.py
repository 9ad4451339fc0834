"""What the steps consume and reach: tokens, seconds, the loss. The one place where rates come from.

A token counts when it is an input that is not padding; the first of a sample counts, though it is no
target. Seconds are those of training: validation and what is written then do not count.
Knows nothing of where the figures are shown.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from full_stack_transformer.datasets.collators import IGNORED_LABEL
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.data.batches import Batch
from full_stack_transformer.training.module import TrainingModule
from full_stack_transformer.training.throughput import flops_per_token, measure_matmul_peak

# Steps that the smoothed loss remembers.
_SMOOTHED_STEPS = 50


@dataclass(frozen=True)
class Reading:
    """What the meter shows at one moment, over all runs of a training that was resumed."""

    num_tokens: int
    """Input tokens that are not padding, of all processes."""
    seconds: float
    """Time of training, without validations."""

    def tokens_per_second_since(self, earlier: "Reading") -> float:
        """The rate between two readings."""
        seconds = self.seconds - earlier.seconds
        return (self.num_tokens - earlier.num_tokens) / seconds if seconds > 0 else 0.0


class Meter(pl.Callback):
    """Counts at each step, without waiting for the device; a reading waits for it.

    Of several processes each counts its own tokens: they take equally many batches of similar size.

    Args:
        num_context_tokens: tokens that attention spans, for the count of the model's FLOPs.
    """

    def __init__(self, *, num_context_tokens: int) -> None:
        self.loss = torch.zeros(())
        """Mean cross entropy of the last optimizer step, in nats; of several processes this one's part
        times their number."""
        self.smoothed_loss = torch.zeros(())
        """Mean of those of the last steps, newer ones weighing more."""
        self.first = Reading(0, 0.0)
        """The end of this run's first step: compilation and allocation lie before it."""
        self._num_context_tokens = num_context_tokens
        self._earlier = Reading(0, 0.0)
        self._num_tokens = torch.zeros((), dtype=torch.int64)
        self._loss_of_batches = torch.zeros(())
        self._world_size = 1
        self._flops_per_token = self._utilization_of_rate = 0.0
        self._step = self._num_steps = 0
        self._started = 0.0
        self._paused_at: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Count what a token costs, while the weights are whole."""
        assert isinstance(pl_module, TrainingModule)
        try:
            self._flops_per_token = flops_per_token(pl_module.backbone, self._num_context_tokens)
        except AttributeError:  # an architecture without attention heads: trained all the same
            self._flops_per_token = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what the device can do, then start the clock."""
        device = pl_module.device
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._loss_of_batches = torch.zeros((), device=device)
        self._world_size = trainer.world_size
        self._step = trainer.global_step
        peak = measure_matmul_peak(device, _dtype_of(trainer))
        # The processes measure at the same time: of a processor that they share each finds its part.
        self._utilization_of_rate = self._flops_per_token / peak / self._world_size
        self.first = self._earlier
        self._started = time.monotonic()

    def on_train_batch_start(self, *_: Any) -> None:
        """End the pause of a validation."""
        if self._paused_at is not None:
            self._started += time.monotonic() - self._paused_at
            self._paused_at = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_index: int,
    ) -> None:
        """Count a batch, and at the end of an accumulation window the step."""
        self._num_tokens += num_input_tokens(batch)
        self._loss_of_batches = self._loss_of_batches + outputs[metric_names.CROSS_ENTROPY]
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._num_steps += 1
        self.loss, self._loss_of_batches = (
            self._loss_of_batches,
            torch.zeros_like(self._loss_of_batches),
        )
        weight = max(1 / self._num_steps, 1 / _SMOOTHED_STEPS)
        self.smoothed_loss = self.smoothed_loss.to(self.loss).lerp(self.loss, weight)
        if self._num_steps == 1:
            self.first = self.read()

    def on_validation_start(self, *_: Any) -> None:
        """Pause until the next batch."""
        if self._paused_at is None:
            self._paused_at = time.monotonic()

    def on_train_end(self, *_: Any) -> None:
        """Stop the clock."""
        self.on_validation_start()

    def read(self) -> Reading:
        """The totals up to now."""
        now = time.monotonic() if self._paused_at is None else self._paused_at
        return Reading(
            self._earlier.num_tokens + int(self._num_tokens) * self._world_size,
            self._earlier.seconds + (now - self._started if self._started else 0.0),
        )

    def utilization(self, tokens_per_second: float) -> float:
        """Part of the measured peak of all devices that a rate means, 0 to 1; 0 where it is unknown."""
        return tokens_per_second * self._utilization_of_rate

    def state_dict(self) -> dict[str, Any]:
        """The totals, for a training that is resumed."""
        reading = self.read()
        return {"num_tokens": reading.num_tokens, "seconds": reading.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the totals of earlier runs."""
        self._earlier = Reading(state_dict["num_tokens"], state_dict["seconds"])


def num_input_tokens(batch: Batch) -> Tensor:
    """Input tokens of a batch that are not padding, as a scalar on its device.

    These are the targets and the first token of each sample, which is none.
    """
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    labels = batch["labels"]
    num_targets = (labels != IGNORED_LABEL).sum()
    if "document_ids" not in batch:  # a sample a row
        return num_targets + len(labels)
    # A sample has two tokens at least, so a row that ends without a target ends with padding.
    has_padding = labels[:, -1] == IGNORED_LABEL
    return num_targets + (batch["document_ids"][:, -1] + 1 - has_padding.long()).sum()


def perplexity(loss: float) -> float:
    """exp of a loss in nats, kept within what a curve can hold."""
    return math.exp(min(loss, 80.0))


def _dtype_of(trainer: pl.Trainer) -> torch.dtype:
    """The type in which the matrices are multiplied."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32
