"""Measures what the parts of a training take: its start, steps, validations and checkpoints.

For `fst plan`, which trains for some seconds and multiplies. It must be the first of the callbacks, so that
what the others do counts to the part that they delay.

It sets the clock of --max_minutes, which must be `MINUTES`: a validation follows the second step, as
`FollowPlan` wants an early one, and then steps go on for the time to measure, until the last validation.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.planning.spent import Spent, now
from full_stack_transformer.training.callbacks.meter import num_input_tokens
from full_stack_transformer.training.module import TrainingModule

# As --max_minutes: so long that no step and no validation is a part of it that matters.
MINUTES = 1000.0
_EARLY, _OVER = 0.5, 1.0


@dataclass
class TimedValidation:
    """A validation."""

    num_tokens: int = 0
    before: Spent = field(default_factory=Spent)
    """The checkpoint that is written before it, and getting ready."""
    forward: Spent = field(default_factory=Spent)
    after: Spent = field(default_factory=Spent)
    """Text samples, the exported model, links of checkpoints."""


class Stopwatch(pl.Callback):
    """Counts from its creation.

    Args:
        seconds: of the steps.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.to_first_step = Spent()
        """From the creation to the end of the first step."""
        self.num_steps = 0
        self.steps = Spent()
        """Of all batches but the first, with all that happens between them."""
        self.step_tokens = 0
        """Input tokens of these batches that are not padding."""
        self.first_step_tokens = 0
        self.first_step = Spent()
        self.validations: list[TimedValidation] = []
        self.ended = Spent()
        """When the training ended, by `spent.now`."""
        self._created = self._mark = now()
        self._in_validation = False

    def on_train_batch_start(self, *_: Any) -> None:
        """The first batch, or the end of a validation."""
        if self._in_validation or not self.num_steps:
            self._end_validation()
            self._mark = now()

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
        moment = now()
        if self.num_steps:
            self.step_tokens += num_tokens
            self.steps += moment - self._mark
        else:
            self.first_step_tokens, self.first_step = num_tokens, moment - self._mark
            self.to_first_step = moment - self._created
        self.num_steps += 1
        self._mark = moment
        self._set_clock(pl_module)

    def _set_clock(self, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        part = 0.0
        if not self.validations:
            part = _EARLY
        elif self.steps.seconds >= self._seconds:
            part = _OVER
        module.count_time_from(time.monotonic() - part * 60 * MINUTES)

    def on_validation_start(self, *_: Any) -> None:
        """A validation begins, after the step before it."""
        moment = now()
        if self.num_steps > 1:
            self.steps += moment - self._mark
        self.validations.append(TimedValidation())
        self._in_validation, self._mark = True, moment

    def on_validation_batch_start(self, *_: Any) -> None:
        """The first one ends what comes before."""
        if not self.validations[-1].num_tokens:
            moment = now()
            self.validations[-1].before = moment - self._mark
            self._mark = moment

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
        moment = now()
        self.validations[-1].forward = moment - self._mark
        self._mark = moment

    def on_train_end(self, *_: Any) -> None:
        """The last validation has ended."""
        self._end_validation()
        self.ended = now()

    def _end_validation(self) -> None:
        if self._in_validation:
            self.validations[-1].after = now() - self._mark
            self._in_validation = False
