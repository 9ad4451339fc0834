"""One calm line: step, loss, tokens per second, utilization, time left."""

import logging
import shutil
import sys
import time
from collections import deque
from typing import Any

import pytorch_lightning as pl

from full_stack_transformer.training.callbacks.meter import Meter, Reading
from full_stack_transformer.training.module import TrainingModule

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_REFRESHES = 0.5
# The rate is that of this much time before now: it follows, and does not flicker.
_SECONDS_OF_RATE = 10.0


class Progress(pl.Callback):
    """Rewrites one line on a terminal; elsewhere adds a line to the log now and then.

    Everything shown counts this run alone, also where it resumes another one.

    Args:
        meter: where the figures come from.
        show: false writes nothing.
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
        """Nothing is shown before there is something to say."""
        self._show = self._show and trainer.is_global_zero
        self._shown = time.monotonic()
        self._first_at = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Show the line when it is time to."""
        if not self._show:
            return
        now = time.monotonic()
        if self._first_at is None:
            assert isinstance(pl_module, TrainingModule)
            self._first_at, self._first_done = now, pl_module.progress(trainer.global_step)
            self._readings = deque([self._meter.first])
        elif now - self._shown >= self._interval:
            self._shown = now
            self._write(self._line(trainer, pl_module, now))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the line as it is now: the log of the validation comes below it."""
        if self._on_terminal and self._width:
            self._write(self._line(trainer, pl_module, time.monotonic()))
        self._end_line()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the line to the summary."""
        self._end_line()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the line to what is said about the exception."""
        self._end_line()

    def _line(self, trainer: pl.Trainer, pl_module: pl.LightningModule, now: float) -> str:
        assert isinstance(pl_module, TrainingModule)
        assert self._first_at is not None
        rate = self._rate()
        done = pl_module.progress(trainer.global_step)
        # By the clock on the wall: validations to come take their part as those before did.
        left = (now - self._first_at) * (1 - done) / max(done - self._first_done, 1e-9)
        total = pl_module.plan.num_steps
        # Where minutes end the training before its steps do, their number says nothing.
        ends_by_steps = total is not None and trainer.global_step >= done * total - 0.5
        of_total = f" of {total:,}" if ends_by_steps else ""
        return (
            f"step {trainer.global_step:,}{of_total}  {done:4.0%}  "
            f"loss {float(self._meter.smoothed_loss):.3f}  {rate:,.0f} tokens/s  "
            f"MFU {self._meter.utilization(rate):.0%}  {duration(left)} left"
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
        # A line that is broken in two cannot be rewritten.
        line = line[: shutil.get_terminal_size().columns - 1]
        padded = line.ljust(self._width)
        self._width = len(line)
        sys.stderr.write(f"\r{padded}")
        sys.stderr.flush()

    def _end_line(self) -> None:
        if self._on_terminal and self._width:
            sys.stderr.write("\n")
            self._width = 0


def duration(seconds: float) -> str:
    """A time as people say it, in its two largest units: `2 h 05 min`, `4 min 10 s`, `8 s`."""
    whole = round(seconds)
    if whole >= 86_400:
        return f"{whole // 86_400} d {whole % 86_400 // 3600:02} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
