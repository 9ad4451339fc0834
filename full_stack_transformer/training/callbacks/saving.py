"""When a training writes its checkpoints, and in which state.

A checkpoint is written where an optimizer step was just taken: after the step, or, where a validation
follows, before that validation, which a resumed training then repeats. Its validation says whether the
checkpoint is the best one; it gets a second name then.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from full_stack_transformer.errors import MachineError, TrainingError
from full_stack_transformer.training.callbacks.stopping import (
    CatchSignals,
    InterruptedBySignalError,
    validation_is_due,
)
from full_stack_transformer.training.checkpoints import (
    BEST_FILE_NAME,
    LAST_FILE_NAME,
    VALIDATION_IS_DUE_KEY,
    link_checkpoint,
)
from full_stack_transformer.training.figures import validation_figures
from full_stack_transformer.training.processes import greatest


class SaveCheckpoints(pl.Callback):
    """Writes last.ckpt before each validation and every few minutes, and names the best one.

    The last of the callbacks: it saves what the others remember of the step.

    Args:
        directory: where to write.
        minutes_between: minutes between two checkpoints; 0 for one after every step.
        signals: after a signal a checkpoint is written and InterruptedBySignalError raised.
    """

    def __init__(self, directory: Path, *, minutes_between: float, signals: CatchSignals) -> None:
        self._directory = directory
        self._seconds_between = 60 * minutes_between
        self._signals = signals
        self._step = 0
        self._saved_at = 0.0
        self._best_loss = math.inf

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """All processes must know where the main one writes."""
        self._directory = Path(trainer.strategy.broadcast(str(self._directory)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first interval begins."""
        self._step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Save when it is time, or a signal asks for it."""
        if trainer.global_step == self._step:  # in the middle of an accumulation window
            return
        self._step = trainer.global_step
        is_time = time.monotonic() - self._saved_at >= self._seconds_between
        # Greater than any other wish, so that one question to all processes is enough.
        wish = greatest(trainer, 1 + self._signals.received if self._signals.received else is_time)
        if not wish or validation_is_due(trainer):
            return
        self._save(trainer)
        if wish > 1:
            raise InterruptedBySignalError(int(wish) - 1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save before anything is done that could be interrupted."""
        self._save(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Let a signal end the validation: it will be repeated."""
        if number := int(greatest(trainer, self._signals.received)):
            raise InterruptedBySignalError(number)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the best one."""
        loss = validation_figures(trainer).decisive
        if not loss < self._best_loss:  # also when it is not a number
            return
        self._best_loss = loss
        last = self._directory / LAST_FILE_NAME
        _in_step(trainer, lambda: link_checkpoint(last, self._directory / BEST_FILE_NAME))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let Lightning begin a validation that is due from its first batch, and no other."""
        is_due = validation_is_due(trainer)
        checkpoint[VALIDATION_IS_DUE_KEY] = is_due
        checkpoint["world_size"] = trainer.world_size
        loops = checkpoint["loops"]["fit_loop"]
        # What Lightning takes for a validation that was interrupted in its first batch.
        counts = {"ready": int(is_due), "started": int(is_due), "processed": 0, "completed": 0}
        validation = loops["epoch_loop.val_loop.batch_progress"]
        validation.update(total=dict(counts), current=dict(counts), is_last_batch=False)
        # The plan decides where the training ends, which may be later when it is resumed.
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False

    def state_dict(self) -> dict[str, Any]:
        """The best loss."""
        return {"best_loss": self._best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._best_loss = state_dict["best_loss"]

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved_at = time.monotonic()
        assert trainer.lightning_module is not None
        for name, parameter in trainer.lightning_module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise TrainingError(
                    f"weights of {name} are no longer finite after step {trainer.global_step}; the "
                    "checkpoints from before are intact: lower --learning_rate"
                )
        path = self._directory / LAST_FILE_NAME
        try:
            trainer.save_checkpoint(path)
            failure = None
        except MachineError as error:
            failure = error
            trainer.strategy.barrier()  # where the other processes wait
        _raise_in_step(trainer, failure)


def _in_step(trainer: pl.Trainer, action: Callable[[], None]) -> None:
    """Do it in the main process; when it fails there, all processes stop."""
    failure = None
    if trainer.is_global_zero:
        try:
            action()
        except MachineError as error:
            failure = error
    _raise_in_step(trainer, failure)


def _raise_in_step(trainer: pl.Trainer, failure: MachineError | None) -> None:
    if greatest(trainer, float(failure is not None)):
        raise failure or MachineError("another process could not write a checkpoint")
