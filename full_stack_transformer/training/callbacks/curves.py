"""The curves of TensorBoard, and its histograms.

Between two points of a curve nothing is computed and nothing waits for the device.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from full_stack_transformer.machine import peak_resident_bytes, resident_bytes
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks.meter import Meter, Reading, perplexity
from full_stack_transformer.training.callbacks.profiling import HISTOGRAMS
from full_stack_transformer.training.callbacks.stopping import validation_is_due
from full_stack_transformer.training.figures import validation_figures
from full_stack_transformer.training.module import TrainingModule

_MEGABYTE = 1e6


class RecordCurves(pl.Callback):
    """Writes a point of each curve every `log_every_n_steps` optimizer steps, and at each validation.

    A point of a throughput curve is the mean since the point before.

    Args:
        meter: where tokens, seconds and losses come from.
        batches_per_epoch: batches of this process in an epoch.
        log_every_n_steps: optimizer steps between two points.
        histograms: write histograms of weights and gradients at each validation.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        batches_per_epoch: int,
        log_every_n_steps: int,
        histograms: bool,
    ) -> None:
        self._meter = meter
        self._batches_per_epoch = batches_per_epoch
        self._log_every_n_steps = log_every_n_steps
        self._histograms = histograms
        self._step = 0
        self._reading: Reading | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the step after this one."""
        self._step = trainer.global_step
        self._reading = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_index: int,
    ) -> None:
        """Write the points of this step, if it is one to write."""
        step = trainer.global_step
        if self._histograms and validation_is_due(trainer):
            with trainer.profiler.profile(HISTOGRAMS):  # type: ignore[attr-defined]
                self._record_histograms(trainer, pl_module)
        if step == self._step:  # in the middle of an accumulation window
            return
        self._step = step
        if step % self._log_every_n_steps == 0:
            self._record_step(trainer, pl_module, batch_index)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the points of the validation, and hand everything to the disk."""
        figures = validation_figures(trainer)
        points = {metric_names.LOSS: figures.loss, **figures.metrics}
        self._record(
            trainer, {f"{metric_names.VALID}/{name}": value for name, value in points.items()}
        )
        writer = _writer(trainer)
        if writer is not None:
            writer.flush()

    def _record_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_index: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        # Each process knows the loss of its own targets, as a share of those of all.
        loss = float(trainer.strategy.reduce(self._meter.loss, reduce_op="mean"))
        reading = self._meter.read()
        rate = reading.tokens_per_second_since(self._reading or self._meter.first)
        self._reading = reading
        points = {
            metric_names.TRAIN_LOSS: loss,
            metric_names.TRAIN_PERPLEXITY: perplexity(loss),
            metric_names.EPOCH: (batch_index + 1) / self._batches_per_epoch,
            metric_names.LEARNING_RATE: pl_module.learning_rate,
            metric_names.GRADIENT_NORM: float(pl_module.gradient_norm),
            metric_names.RESIDENT_MEGABYTES: (resident_bytes() or peak_resident_bytes())
            / _MEGABYTE,
        }
        if rate > 0:  # not in the first step, with which the meter begins
            points[metric_names.TOKENS_PER_SECOND] = rate
            points[metric_names.MODEL_FLOPS_UTILIZATION] = self._meter.utilization(rate)
        if pl_module.device.type == "cuda":
            allocated = torch.cuda.memory_allocated(pl_module.device)
            points[metric_names.CUDA_MEGABYTES] = allocated / _MEGABYTE
        self._record(trainer, points)

    @staticmethod
    def _record(trainer: pl.Trainer, points: dict[str, float]) -> None:
        if trainer.logger is not None and trainer.is_global_zero:
            trainer.logger.log_metrics(points, step=trainer.global_step)

    @staticmethod
    def _record_histograms(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the validation, since Lightning clears the gradients for it."""
        writer = _writer(trainer)
        if writer is None:
            return
        assert isinstance(pl_module, TrainingModule)
        for name, parameter in pl_module.backbone.named_parameters():
            for kind, values in (
                (metric_names.WEIGHT_HISTOGRAM, parameter.detach()),
                (metric_names.GRADIENT_HISTOGRAM, parameter.grad),
            ):
                if values is not None:
                    writer.add_histogram(f"{kind}/{name}", values, trainer.global_step)


def _writer(trainer: pl.Trainer) -> SummaryWriter | None:
    """TensorBoard's own writer, on the process that writes."""
    if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
        writer: SummaryWriter = trainer.logger.experiment
        return writer
    return None
