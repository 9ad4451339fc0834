"""What makes a training validate, and what ends it: its plan, a signal, no improvement."""

import logging
import math
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import pytorch_lightning as pl

from full_stack_transformer.training.figures import validation_figures
from full_stack_transformer.training.module import TrainingModule

logger = logging.getLogger(__name__)

# As a number of batches between validations.
NEVER = sys.maxsize
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class FollowPlan(pl.Callback):
    """Tells Lightning after each optimizer step whether to validate, and after a validation whether to end.

    The first of the callbacks: the others ask `validation_is_due` in the same hook.
    """

    def __init__(self) -> None:
        self._step = 0
        self._is_due = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go back to a validation that was due when the checkpoint was written."""
        self._step = trainer.global_step
        self._tell(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_index: int,
    ) -> None:
        """Decide, where an optimizer step was just taken."""
        assert isinstance(pl_module, TrainingModule)
        self._is_due = False
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            pl_module.read_clock()
            is_over = pl_module.progress(self._step) >= 1.0
            self._is_due = is_over or pl_module.plan.validates_after(batch_index + 1)
        self._tell(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the training after the validation of its last step."""
        assert isinstance(pl_module, TrainingModule)
        pl_module.read_clock()
        if pl_module.progress(trainer.global_step) >= 1.0:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Whether the checkpoint was written before a validation."""
        return {"is_due": self._is_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._is_due = state_dict["is_due"]

    def _tell(self, trainer: pl.Trainer) -> None:
        # Lightning validates after batches whose number is a multiple of this.
        trainer.val_check_batch = 1 if self._is_due else NEVER


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the batch that just ended."""
    return trainer.val_check_batch == 1


class InterruptedBySignalError(Exception):
    """The training stopped where it can be resumed, since a signal asked for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class CatchSignals(pl.Callback):
    """Remembers SIGTERM and Ctrl-C until the training can stop; a second one ends the process at once.

    Active inside its `with`.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal, 0 while there is none."""
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
            self._install()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the place of Lightning's handlers, which were installed meanwhile.

        They speak with the other processes from within the handler, which can wait for ever.
        """
        if self._handlers:
            self._install()

    def _install(self) -> None:
        for number in self._handlers:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number


class StopWithoutImprovement(pl.Callback):
    """Ends the training after `patience` validations in a row without a better loss; 0 for never."""

    def __init__(self, *, patience: int) -> None:
        self._patience = patience
        self._best_loss = math.inf
        self._num_without = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count."""
        loss = validation_figures(trainer).decisive
        self._num_without = 0 if loss < self._best_loss else self._num_without + 1
        self._best_loss = min(loss, self._best_loss)
        if self._patience and self._num_without >= self._patience:
            logger.info(
                "no better validation than that of %.4f in %s validations: the training ends",
                abs(self._best_loss),
                self._num_without,
            )
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"best_loss": self._best_loss, "num_without": self._num_without}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._best_loss = state_dict["best_loss"]
        self._num_without = state_dict["num_without"]
