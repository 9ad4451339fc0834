"""Measures the steps: tokens, seconds, loss, and the part of the device's arithmetic that the model uses.

A token counts when it is an input that is not padding; the first of a sample counts, though it is not a
target. Seconds are those of training: validation and what is written then do not count. The model FLOPs
utilization (MFU) is the part of the device's measured peak that goes into the model (Chowdhery et al. 2022,
PaLM, appendix B).

Lightning's `ThroughputMonitor` counts padding unless it is told each batch's length, takes the peak from a
table of GPUs (none for a processor), and its totals are not in the checkpoint. Knows nothing of where the
values are shown.
"""

import time
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import Strategy
from torch import Tensor

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.machine import measure_matmul_peak
from full_stack_transformer.modelling.acceleration import flops_per_token
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.module import TrainingModule

# Steps that the smoothed loss remembers.
_SMOOTHED_STEPS = 50


@dataclass(frozen=True)
class Reading:
    """The totals at a moment, over all runs of a resumed training."""

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

    Of several processes each counts its own tokens, and takes those of the others for as many until
    checkpoints and the end add up what all have counted.
    A callback that reads it in `on_train_batch_end` calls `count` first, so that their order is free.

    Args:
        num_context_tokens: tokens that attention spans, for the count of the model's FLOPs.
    """

    def __init__(self, *, num_context_tokens: int) -> None:
        self.loss = torch.zeros(())
        """Mean cross entropy of the last optimizer step, in nats; with several processes the part of this
        process times their number."""
        self.smoothed_loss = torch.zeros(())
        """Mean over the last steps; newer ones have more weight."""
        self.replay_loss: Tensor | None = None
        """The same of the replayed documents, in the last step that had any; None before."""
        self.first = Reading(0, 0.0)
        """At the end of this run's first step, after compilation and allocation."""
        self._num_context_tokens = num_context_tokens
        self._earlier = Reading(0, 0.0)
        self._num_tokens = torch.zeros((), dtype=torch.int64)
        """Of this process since the last sum."""
        self._strategy: Strategy | None = None
        self._loss_of_batches = torch.zeros(())
        self._replay_loss_of_batches: Tensor | None = None
        self._world_size = 1
        self._flops_per_token = self._utilization_of_rate = 0.0
        self._step = self._num_steps = 0
        self._batch_index = -1
        self._started = 0.0
        self._paused_at: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Count the FLOPs of a token while this process has whole weights."""
        assert isinstance(pl_module, TrainingModule)
        try:
            self._flops_per_token = flops_per_token(pl_module.backbone, self._num_context_tokens)
        except AttributeError:  # an architecture without attention heads
            self._flops_per_token = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the peak of the device, then start the clock."""
        device = pl_module.device
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._loss_of_batches = torch.zeros((), device=device)
        self._world_size, self._strategy = trainer.world_size, trainer.strategy
        self._step, self._batch_index = trainer.global_step, -1
        peak = measure_matmul_peak(device, _dtype_of(trainer))
        # The processes measure at the same time: each finds its part of a processor that they share.
        self._utilization_of_rate = self._flops_per_token / peak / self._world_size
        self.first = self._earlier
        self._started = time.monotonic()
        self._paused_at = None  # by a validation of the start

    def on_train_batch_start(self, *_: Any) -> None:
        """Continue after the pause of a validation."""
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
        """Count a batch."""
        self.count(trainer, outputs, batch, batch_index)

    def count(
        self, trainer: pl.Trainer, outputs: dict[str, Tensor], batch: Batch, batch_index: int
    ) -> None:
        """Count a batch once, and at the end of an accumulation window the step."""
        if batch_index == self._batch_index:  # another callback asked before
            return
        self._batch_index = batch_index
        self._num_tokens += num_input_tokens(batch)
        self._loss_of_batches = self._loss_of_batches + outputs[metric_names.CROSS_ENTROPY]
        if metric_names.REPLAY_LOSS in outputs:
            before = self._replay_loss_of_batches
            found = outputs[metric_names.REPLAY_LOSS]
            self._replay_loss_of_batches = found if before is None else before + found
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._replay_loss_of_batches is not None:
            self.replay_loss, self._replay_loss_of_batches = self._replay_loss_of_batches, None
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
        """Stop the clock, and add up."""
        self.on_validation_start()
        self._add_up()

    def read(self) -> Reading:
        """The totals up to now."""
        now = time.monotonic() if self._paused_at is None else self._paused_at
        return Reading(
            self._earlier.num_tokens + int(self._num_tokens) * self._world_size,
            self._earlier.seconds + (now - self._started if self._started else 0.0),
        )

    def utilization(self, tokens_per_second: float) -> float:
        """Fraction of the measured peak of all devices for this rate, 0 to 1; 0 if unknown."""
        return tokens_per_second * self._utilization_of_rate

    def _add_up(self) -> None:
        """Put the true sum in the place of the estimate; all processes must call it."""
        if self._strategy is None or self._world_size == 1:
            return
        num_tokens = int(self._strategy.reduce(self._num_tokens.clone(), reduce_op="sum"))
        before = self._earlier
        self._earlier = Reading(before.num_tokens + num_tokens, before.seconds)
        self._num_tokens.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The totals, for a resumed training; all processes must call it."""
        self._add_up()
        reading = self.read()
        return {"num_tokens": reading.num_tokens, "seconds": reading.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the totals of earlier runs."""
        self._earlier = Reading(state_dict["num_tokens"], state_dict["seconds"])


def num_input_tokens(batch: Batch) -> Tensor:
    """Input tokens of a batch that are not padding, as a scalar on its device.

    These are the targets, and the first token of each sample, which is not a target.
    """
    if "attention_mask" in batch:
        return batch["attention_mask"].sum() * ("is_filler" not in batch)
    if "num_tokens" in batch:
        return batch["num_tokens"]
    labels = batch["labels"]
    num_targets = (labels != IGNORED_LABEL).sum()
    if "document_ids" not in batch:  # a sample a row
        return num_targets + len(labels)
    # A sample has at least two tokens, so a row that ends without a target ends with padding.
    has_padding = labels[:, -1] == IGNORED_LABEL
    return num_targets + (batch["document_ids"][:, -1] + 1 - has_padding.long()).sum()


def _dtype_of(trainer: pl.Trainer) -> torch.dtype:
    """The type in which the matrices are multiplied."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32
