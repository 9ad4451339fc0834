"""Measures what the parts of a training take: its start, steps, validations and checkpoints.

For `fst plan`, which trains for some seconds and multiplies. It must be the first of the callbacks, so that
what the others do counts to the part that they delay.

It sets the clock of --max_minutes, which must be `MINUTES`: a validation follows the second step, as
`FollowPlan` wants an early one, and then steps go on for the time to measure, until the last validation.
"""

import time
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.training.callbacks.meter import num_input_tokens
from full_stack_transformer.training.module import TrainingModule

# As --max_minutes: so long that no step and no validation is a part of it that matters.
MINUTES = 1000.0
_EARLY, _OVER = 0.5, 1.0


@dataclass
class TimedValidation:
    """Seconds of a validation."""

    num_tokens: int = 0
    before_seconds: float = 0.0
    """The checkpoint that is written before it, and getting ready."""
    forward_seconds: float = 0.0
    after_seconds: float = 0.0
    """Text samples, the exported model, links of checkpoints."""


class Stopwatch(pl.Callback):
    """Counts from its creation.

    Args:
        seconds: of the steps.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.seconds_to_first_step = 0.0
        """From the creation to the end of the first step."""
        self.num_steps = 0
        self.step_seconds = 0.0
        """Of all batches but the first, with all that happens between them."""
        self.step_tokens = 0
        """Input tokens of these batches that are not padding."""
        self.first_step_tokens = 0
        self.first_step_seconds = 0.0
        self.validations: list[TimedValidation] = []
        self.ended = 0.0
        """When the training ended, by time.perf_counter()."""
        self._created = self._mark = time.perf_counter()
        self._in_validation = False

    def on_train_batch_start(self, *_: Any) -> None:
        """The first batch, or the end of a validation."""
        if self._in_validation or not self.num_steps:
            self._end_validation()
            self._mark = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        *_: Any,
    ) -> None:
        """A batch is done; reading its tokens waits for the device."""
        num_tokens = int(num_input_tokens(batch))
        now = time.perf_counter()
        if self.num_steps:
            self.step_tokens += num_tokens
            self.step_seconds += now - self._mark
        else:
            self.first_step_tokens, self.first_step_seconds = num_tokens, now - self._mark
            self.seconds_to_first_step = now - self._created
        self.num_steps += 1
        self._mark = now
        self._set_clock(pl_module)

    def _set_clock(self, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        part = 0.0
        if not self.validations:
            part = _EARLY
        elif self.step_seconds >= self._seconds:
            part = _OVER
        module.count_time_from(time.monotonic() - part * 60 * MINUTES)

    def on_validation_start(self, *_: Any) -> None:
        """A validation begins, after the step before it."""
        now = time.perf_counter()
        if self.num_steps > 1:
            self.step_seconds += now - self._mark
        self.validations.append(TimedValidation())
        self._in_validation, self._mark = True, now

    def on_validation_batch_start(self, *_: Any) -> None:
        """The first one ends what comes before."""
        now = time.perf_counter()
        if not self.validations[-1].num_tokens:
            self.validations[-1].before_seconds = now - self._mark
            self._mark = now

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        *_: Any,
    ) -> None:
        """Count a batch of validation."""
        self.validations[-1].num_tokens += int(num_input_tokens(batch))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What follows are samples and files."""
        self._set_clock(pl_module)  # without the time of the validation
        now = time.perf_counter()
        self.validations[-1].forward_seconds = now - self._mark
        self._mark = now

    def on_train_end(self, *_: Any) -> None:
        """The last validation has ended."""
        self._end_validation()
        self.ended = time.perf_counter()

    def _end_validation(self) -> None:
        if self._in_validation:
            self.validations[-1].after_seconds = time.perf_counter() - self._mark
            self._in_validation = False
