"""What a person sees of a training: one line of progress, the curves of TensorBoard, a summary at the end."""

import logging
import shlex
import shutil
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.machine import peak_resident_bytes, resident_bytes
from full_stack_transformer.modelling.losses import perplexity
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks.control import validation_is_due
from full_stack_transformer.training.callbacks.meter import Meter, Reading
from full_stack_transformer.training.callbacks.profiling import HISTOGRAMS
from full_stack_transformer.training.data.batches import EpochDataModule
from full_stack_transformer.training.module import (
    TrainingModule,
    ValidationMetrics,
    validation_metrics,
)

logger = logging.getLogger(__name__)

SUMMARY_FILE_NAME = "summary.json"
_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_TO_FIRST_LINE = 5.0
# What follows the last step is no part of it: validation, samples, saving.
_MOST_SHOWN = 0.99
_SECONDS_BETWEEN_REFRESHES = 0.5
# The rate is the mean over the last seconds, so that it follows without flickering.
_SECONDS_OF_RATE = 10.0
_MEGABYTE = 1e6


class Progress(pl.Callback):
    """Rewrites one line on a terminal; without a terminal logs a line now and then, and one at once.

    Everything shown counts this run alone, even if it resumes another one. Lightning's `RichProgressBar`
    counts batches of an epoch, here one long epoch: its time left knows neither --max_steps nor
    --max_minutes, and it writes nothing to a log.

    Args:
        meter: where the values come from.
        show: False writes nothing.
    """

    def __init__(self, meter: Meter, *, show: bool) -> None:
        self._meter = meter
        self._show = show
        self._on_terminal = show and sys.stderr.isatty()
        self._interval = _SECONDS_BETWEEN_REFRESHES if self._on_terminal else _SECONDS_BETWEEN_LINES
        self._shown = 0.0
        self._first_at: float | None = None
        self._first_done = 0.0
        self._readings: deque[Reading] = deque()
        self._width = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that it begins: the first step may take long, and only the second one has a rate."""
        assert isinstance(pl_module, TrainingModule)
        self._show = self._show and trainer.is_global_zero
        first = min(self._interval, _SECONDS_TO_FIRST_LINE)
        self._shown = time.monotonic() + first - self._interval
        self._first_at = None
        if self._show:
            self._write(f"{_steps(trainer, pl_module)}  the first step runs")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_index: int,
    ) -> None:
        """Show the line if it is time."""
        if not self._show:
            return
        self._meter.count(trainer, outputs, batch, batch_index)
        now = time.monotonic()
        if self._first_at is None:
            assert isinstance(pl_module, TrainingModule)
            self._first_at, self._first_done = now, pl_module.progress(trainer.global_step)
            self._readings = deque([self._meter.first])
        elif now - self._shown >= self._interval:
            self._shown = now
            self._write(self._line(trainer, pl_module, now))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the line: the log of the validation follows below."""
        if self._on_terminal and self._width:
            self._write(self._line(trainer, pl_module, time.monotonic()))
        self._end_line()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the line before the summary."""
        self._end_line()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Finish the line before the error message."""
        self._end_line()

    def _line(self, trainer: pl.Trainer, pl_module: pl.LightningModule, now: float) -> str:
        assert isinstance(pl_module, TrainingModule)
        assert self._first_at is not None
        rate = self._rate()
        done = pl_module.progress(trainer.global_step)
        # By wall-clock time: later validations are assumed to take as long as earlier ones.
        left = (now - self._first_at) * (1 - done) / max(done - self._first_done, 1e-9)
        left += pl_module.reserved_seconds
        if pl_module.plan.max_seconds is not None:
            left = min(left, max(0.0, pl_module.plan.max_seconds - pl_module.seconds))
        return (
            f"{_steps(trainer, pl_module)}  loss {float(self._meter.smoothed_loss):.3f}  "
            f"{rate:,.0f} tokens/s  MFU {self._meter.utilization(rate):.0%}  {duration(left)} left"
        )

    def _rate(self) -> float:
        reading = self._meter.read()
        start = reading.seconds - _SECONDS_OF_RATE
        while len(self._readings) > 1 and self._readings[1].seconds <= start:
            self._readings.popleft()
        self._readings.append(reading)
        return reading.tokens_per_second_since(self._readings[0])

    def _write(self, line: str) -> None:
        if not self._on_terminal:
            logger.info(line)
            return
        # A line that wraps cannot be rewritten.
        line = line[: shutil.get_terminal_size().columns - 1]
        padded = line.ljust(self._width)
        self._width = len(line)
        sys.stderr.write(f"\r{padded}")
        sys.stderr.flush()

    def _end_line(self) -> None:
        if self._on_terminal and self._width:
            sys.stderr.write("\n")
            self._width = 0


def _steps(trainer: pl.Trainer, module: TrainingModule) -> str:
    """Where the training is, such as `step 30 of 120   25%`."""
    step, total = trainer.global_step, module.plan.num_steps
    done = module.plan.progress(step, module.seconds)
    # If --max_minutes ends the training first, the number of steps says nothing.
    ends_by_steps = total is not None and step >= done * total - 0.5
    if step == 0 and module.plan.max_seconds is not None:  # nobody knows yet
        ends_by_steps = False
    of_total = f" of {total:,}" if ends_by_steps else ""
    return f"step {step:,}{of_total}  {min(done, _MOST_SHOWN):4.0%}"


class RecordCurves(pl.Callback):
    """Writes a point of each curve every `log_every_n_steps` optimizer steps, and at each validation.

    Between two points nothing is computed and nothing waits for the device. A point of a throughput curve
    is the mean since the point before. Lightning's `DeviceStatsMonitor` writes some eighty curves of memory
    instead of the two here, and its `LearningRateMonitor` one for each parameter group.

    Args:
        meter: where tokens, seconds and losses come from.
        log_every_n_steps: optimizer steps between two points.
        histograms: write histograms of weights and gradients at each validation.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        log_every_n_steps: int,
        histograms: bool,
    ) -> None:
        self._meter = meter
        self._batches_per_epoch = 0
        self._log_every_n_steps = log_every_n_steps
        self._histograms = histograms
        self._step = 0
        self._reading: Reading | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start with the next step."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, EpochDataModule)
        self._batches_per_epoch = data.num_batches_per_epoch
        self._step = trainer.global_step
        self._reading = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_index: int,
    ) -> None:
        """Write the points of every `log_every_n_steps`th step."""
        self._meter.count(trainer, outputs, batch, batch_index)
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
        """Write the points of the validation, and flush."""
        found = validation_metrics(trainer)
        points = {metric_names.LOSS: found.loss, **found.metrics}
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
        # Each process knows the loss of its own targets, weighted by their share of all targets.
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
        if self._meter.replay_loss is not None:
            points[metric_names.TRAIN_REPLAY_LOSS] = float(
                trainer.strategy.reduce(self._meter.replay_loss, reduce_op="mean")
            )
        if rate > 0:  # not in the first step, which starts the clock
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
    """TensorBoard's own writer, in the process that writes."""
    if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
        writer: SummaryWriter = trainer.logger.experiment
        return writer
    return None


@dataclass(frozen=True)
class TrainingSummary:
    """The content of summary.json."""

    num_steps: int
    """Optimizer steps, of all runs of a training that was resumed."""
    num_tokens: int
    """Input tokens that are not padding, of all runs and processes."""
    tokens_per_second: float
    """Of this run from its second step, without validations."""
    model_flops_utilization: float
    """Fraction of the measured peak that this rate is."""
    seconds_taken: float
    """Of this run, in total."""
    best_step: int | None
    """Step of the best validation, whose model was exported; 0 for the model that the training started from,
    None without a validation."""
    best_validation_loss: float | None
    best_metrics: dict[str, float]
    """The other metrics of that validation."""
    best_words: str
    """The same for a person."""

    def as_json(self) -> dict[str, Any]:
        """For summary.json."""
        content = asdict(self)
        del content["best_words"]
        metrics = content.pop("best_metrics")
        return content | {f"best_validation_{name}": value for name, value in metrics.items()}

    def lines(self, directory: Path, *, has_adapter: bool = False) -> list[str]:
        """For a person: the result, and how to go on."""
        lines = [
            f"trained {self.num_steps:,} steps on {self.num_tokens:,} tokens in "
            f"{duration(self.seconds_taken)}, {self.tokens_per_second:,.0f} tokens/s, "
            f"MFU {self.model_flops_utilization:.0%}"
        ]
        if self.best_step == 0:
            lines.append(
                f"no validation was better than the start, validation loss {self.best_validation_loss:.4f}: "
                "the model is what it was; try a lower --learning_rate, or more documents"
            )
        elif self.best_step is not None:
            lines.append(
                f"best validation loss {self.best_validation_loss:.4f} at step {self.best_step:,}"
                + (f": {self.best_words}" if self.best_words else "")
            )
        if self.best_step is not None:
            place = shlex.quote(str(directory))
            if has_adapter:
                lines.append(f"merge the adapter with its base: fst merge {place}")
            lines.append(f"{'then ' if has_adapter else ''}serve it: fst serve {place}")
        return lines


def summarize(
    meter: Meter, best: ValidationMetrics | None, *, num_steps: int, seconds_taken: float
) -> TrainingSummary:
    """The summary of a training that has ended.

    Args:
        meter: stopped, by the end of the training.
        best: the validation whose model was exported.
        num_steps: optimizer steps.
        seconds_taken: from the start of the command.
    """
    reading = meter.read()
    rate = reading.tokens_per_second_since(meter.first)
    return TrainingSummary(
        num_steps=num_steps,
        num_tokens=reading.num_tokens,
        tokens_per_second=round(rate, 1),
        model_flops_utilization=round(meter.utilization(rate), 4),
        seconds_taken=round(seconds_taken, 1),
        best_step=best.step if best else None,
        best_validation_loss=best.loss if best else None,
        best_metrics=best.metrics if best else {},
        best_words=best.words() if best else "",
    )


def duration(seconds: float) -> str:
    """A time in its two largest units: `2 h 05 min`, `4 min 10 s`, `8 s`."""
    whole = round(seconds)
    if whole >= 86_400:
        return f"{whole // 86_400} d {whole % 86_400 // 3600:02} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
