"""When a training validates, saves a checkpoint and ends.

    optimizer step ──> is a validation due? ──no──> save, if it is time to or a signal came
                                │
                               yes ──> save ──> validate ──> mark the best checkpoint, end if the plan says so

A checkpoint always holds the state right after an optimizer step. Where a validation is due it is saved
before that validation, and a resumed training begins with the validation.

Three things go beyond Lightning's documented interface (2.6.6), since that has no way to do them:

- `FollowPlan` sets `trainer.val_check_batch` from step to step. `Trainer(val_check_interval=N)` validates
  in the middle of an accumulation window where the window does not divide N, and not after the last step.
  Setting `trainer.should_stop` before the last validation does that one, but a training that is resumed
  at it would end without it. An epoch of Lightning's for each stretch between validations would number
  batches from 0 again and hand a batch that was prefetched to nobody.
- `SaveCheckpoints.on_save_checkpoint` marks a due validation in the saved progress of Lightning's loops.
  Lightning repeats a validation only if it was saved inside `validation_step`, where no callback runs;
  saved in any other hook it counts as done and is skipped. `num_sanity_val_steps` is skipped too for a
  resumed training, and `Trainer.validate(ckpt_path=…)` knows no `global_step` and its results are lost
  when `fit` loads the callbacks' state again.
- `SaveCheckpoints` asks Lightning's checkpoint connector for the content of a checkpoint, which
  `Trainer.save_checkpoint` writes in the main process alone before the training goes on.
"""

import logging
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from full_stack_transformer.errors import MachineError, TrainingError
from full_stack_transformer.storage import make_directories
from full_stack_transformer.training.background import BackgroundWriter
from full_stack_transformer.training.checkpoints import (
    BEST_FILE_NAME,
    EXPERIMENT_ID_KEY,
    LAST_FILE_NAME,
    ROWS_PER_BATCH_KEY,
    VALIDATION_IS_DUE_KEY,
    link_checkpoint,
)
from full_stack_transformer.training.module import (
    TrainingModule,
    greatest,
    validation_metrics,
)
from full_stack_transformer.training.muon_together import own_part
from full_stack_transformer.training.sharding import ShardedStrategy, is_sharded

logger = logging.getLogger(__name__)

# As the number of batches between validations.
NEVER = sys.maxsize
# With a time limit the first validation, which tells how long they take, comes after this part of it.
_LATEST_FIRST_VALIDATION = 0.25
# Of a forward pass, as a part of forward and backward.
_COST_WITHOUT_GRADIENTS = 0.4
# For a checkpoint that is being written when an error ends the training.
_SECONDS_TO_FINISH = 60.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class FollowPlan(pl.Callback):
    """Tells Lightning for each optimizer step whether to validate after it, and ends the training.

    Decides before the optimizer step, so that in `on_train_batch_end` every callback can ask
    `validation_is_due`, whatever their order.

    With --max_minutes the last validation must end in time, with the samples and files that come with it:
    as long as the longer one of the last two. So that there is one to measure, the first one comes in the
    first quarter of the time; one that would leave no time for the last is left out.

    Args:
        num_evaluations: at the end, each about as long as a validation: that of the last step, --do_eval,
            --do_predict.
    """

    def __init__(self, *, num_evaluations: int = 1) -> None:
        self._num_evaluations = num_evaluations
        self._batch_index = 0
        self._is_due = False
        self._costs: deque[float] = deque(maxlen=2)
        self._validation_began = 0.0
        self._stepped_at: float | None = None
        self._step_seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Return to a validation that was due when the checkpoint was written."""
        self._tell(trainer, is_due=self._is_due)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        """No validation, unless an optimizer step follows."""
        self._batch_index = batch_index
        self._tell(trainer, is_due=False)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Decide for this step."""
        assert isinstance(pl_module, TrainingModule)
        pl_module.read_clock()
        if self._stepped_at is not None:
            self._step_seconds = pl_module.seconds - self._stepped_at
        self._stepped_at = pl_module.seconds
        self._foresee(trainer, pl_module)
        is_due = pl_module.is_over(trainer.global_step + 1, self._step_seconds)
        self._tell(trainer, is_due=is_due or self._is_time_to_validate(pl_module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure from here on."""
        self._validation_began = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the training after the validation of its last step, or if there is no time for another one."""
        assert isinstance(pl_module, TrainingModule)
        cost = time.monotonic() - self._validation_began
        max_seconds = pl_module.plan.max_seconds
        if max_seconds is not None:  # all processes must decide the same
            cost = greatest(trainer, cost)
            if not self._costs and cost > max_seconds / 2 and trainer.is_global_zero:
                logger.warning(
                    "a validation takes %.1f minutes, more than half of --max_minutes: lower "
                    "--limit_val_batches or --num_generated_samples",
                    cost / 60,
                )
        self._costs.append(cost)
        self._stepped_at = None
        pl_module.read_clock()
        self._foresee(trainer, pl_module)
        is_over = pl_module.is_over(trainer.global_step, self._step_seconds)
        if is_over and not trainer.sanity_checking:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Whether the checkpoint was written before a validation, and how long the last ones took."""
        return {"is_due": self._is_due, "seconds": list(self._costs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._is_due = state_dict["is_due"]
        self._costs.extend(state_dict.get("seconds", ()))

    def _foresee(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Tell the module how long what comes after the last step will take."""
        if self._costs:
            cost = max(self._costs)
        else:
            num_batches = sum(count for count in trainer.num_val_batches if count < math.inf)
            seconds = self._step_seconds / trainer.accumulate_grad_batches
            cost = num_batches * seconds * _COST_WITHOUT_GRADIENTS
        module.reserved_seconds = self._num_evaluations * cost

    def _is_time_to_validate(self, module: TrainingModule) -> bool:
        """Whether one comes before the end."""
        max_seconds, is_due = (
            module.plan.max_seconds,
            module.plan.validates_after(self._batch_index + 1),
        )
        if max_seconds is None:
            return is_due
        if not self._costs:
            return is_due or module.seconds > _LATEST_FIRST_VALIDATION * max_seconds
        # A step should fit between it and the last one.
        needed = max(self._costs) + module.reserved_seconds + 2 * self._step_seconds
        return is_due and module.seconds + needed < max_seconds

    def _tell(self, trainer: pl.Trainer, *, is_due: bool) -> None:
        self._is_due = is_due
        # Lightning validates after batches whose number is a multiple of this.
        trainer.val_check_batch = 1 if is_due else NEVER


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the batch that just ended."""
    return trainer.val_check_batch == 1


class StopWithoutImprovement(pl.Callback):
    """Ends the training after `patience` validations in a row without a better result; 0 for never.

    Lightning's `EarlyStopping` does the same in one run, but restores the patience from the checkpoint: a
    resumed training would ignore another `--early_stopping_patience`.
    """

    def __init__(self, *, patience: int) -> None:
        self._patience = patience
        self._best_loss = math.inf
        self._num_without = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count."""
        loss = validation_metrics(trainer).decisive
        self._num_without = 0 if loss < self._best_loss else self._num_without + 1
        self._best_loss = min(loss, self._best_loss)
        if self._patience and self._num_without >= self._patience:
            logger.info(
                "no improvement on %.4f in %s validations: stopping early",
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
        """Replace Lightning's handlers, which it installed meanwhile around ours.

        They talk to the other processes from inside the handler, which can wait for ever.
        """
        if self._handlers:
            self._install()

    on_sanity_check_start = on_train_start

    def _install(self) -> None:
        for number in self._handlers:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number


class SaveCheckpoints(Checkpoint):
    """Writes last.ckpt before each validation and every few minutes, and marks the best one.

    A `Checkpoint` for Lightning, which therefore calls it after all other callbacks: it saves what they
    remember of the step. Lightning's own `ModelCheckpoint` writes after a validation, not before it, keeps
    no previous file, and knows no signals.

    Args:
        directory: where to write.
        minutes_between: minutes between two checkpoints; 0 for one after every step.
        signals: after a signal a checkpoint is written and InterruptedBySignalError raised.
        batch_size: of each process; kept in each checkpoint, times their number.
        experiment_id: kept in each checkpoint.
        form: of the checkpoints, as --checkpoints has it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        minutes_between: float,
        signals: CatchSignals,
        batch_size: int = 1,
        experiment_id: str = "",
        form: Literal["auto", "single", "sharded"] = "single",
    ) -> None:
        self._directory = directory
        self._batch_size = batch_size
        self._experiment_id = experiment_id
        self._form = form
        self._writer: BackgroundWriter | None = None
        self._seconds_between = 60 * minutes_between
        self._signals = signals
        self._step = 0
        self._saved_at = 0.0
        self._best_loss = math.inf

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """All processes must know where the main one writes."""
        self._directory = Path(trainer.strategy.broadcast(str(self._directory)))
        if self._form == "sharded" or (self._form == "auto" and is_sharded(trainer)):
            make_directories(self._directory)
            self._writer = BackgroundWriter()
        if isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.gathers_checkpoints = self._writer is None

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
        if self._writer is not None and self._writer.has_failed:
            is_time = True  # to hear of it at once
        # A signal counts more than the time, so that the processes have to agree only once.
        reason = greatest(
            trainer, 1 + self._signals.received if self._signals.received else is_time
        )
        if not reason or validation_is_due(trainer):
            return
        self._save(trainer)
        if reason > 1:
            self._interrupt(trainer, int(reason) - 1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save before anything is done that could be interrupted."""
        if not trainer.sanity_checking:  # nothing is lost: the start is there
            self._save(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Let a signal end the validation: it will be repeated."""
        if number := int(greatest(trainer, self._signals.received)):
            self._interrupt(trainer, number)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark the best one."""
        loss = validation_metrics(trainer).decisive
        if not loss < self._best_loss:  # also if it is NaN
            return
        self._best_loss = loss
        if trainer.sanity_checking:
            return
        self._wait(trainer)
        last = self._directory / LAST_FILE_NAME
        _in_main_process(trainer, lambda: link_checkpoint(last, self._directory / BEST_FILE_NAME))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the last one."""
        self._wait(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let one of an earlier step get its name, if the other processes are there to finish it."""
        if self._writer is not None:
            self._writer.wait(_SECONDS_TO_FINISH)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a resumed training begin with a validation that is due, and with no other."""
        is_due = validation_is_due(trainer)
        checkpoint[VALIDATION_IS_DUE_KEY] = is_due
        checkpoint["world_size"] = trainer.world_size
        checkpoint[ROWS_PER_BATCH_KEY] = trainer.world_size * self._batch_size
        checkpoint[EXPERIMENT_ID_KEY] = self._experiment_id
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

    def _interrupt(self, trainer: pl.Trainer, number: int) -> None:
        self._wait(trainer)
        raise InterruptedBySignalError(number)

    def _wait(self, trainer: pl.Trainer) -> None:
        """Wait until the checkpoint that is being written has its name; an error of it is raised now."""
        if self._writer is not None:
            _raise_everywhere(trainer, self._writer.wait())

    def _save(self, trainer: pl.Trainer) -> None:
        self._wait(trainer)
        self._saved_at = time.monotonic()
        assert trainer.lightning_module is not None
        damaged = [
            name
            for name, parameter in trainer.lightning_module.named_parameters()
            if not torch.isfinite(own_part(parameter)).all()
        ]
        if greatest(trainer, float(len(damaged))):
            raise TrainingError(
                f"weights of {damaged[0] if damaged else 'the model'} are no longer finite after step "
                f"{trainer.global_step}; earlier checkpoints are intact: lower --learning_rate"
            )
        path = self._directory / LAST_FILE_NAME
        if self._writer is not None:
            content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            self._writer.start(content, path, step=trainer.global_step)
            return
        try:
            trainer.save_checkpoint(path)
            failure = None
        except MachineError as error:
            failure = error
            trainer.strategy.barrier()  # where the other processes wait
        _raise_everywhere(trainer, failure)


def _in_main_process(trainer: pl.Trainer, action: Callable[[], None]) -> None:
    """Do it in the main process; if it fails there, all processes stop."""
    failure = None
    if trainer.is_global_zero:
        try:
            action()
        except MachineError as error:
            failure = error
    _raise_everywhere(trainer, failure)


def _raise_everywhere(trainer: pl.Trainer, failure: MachineError | None) -> None:
    if greatest(trainer, float(failure is not None)):
        raise failure or MachineError("another process could not write a checkpoint")
