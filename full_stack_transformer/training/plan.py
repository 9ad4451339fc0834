"""The lengths of a training: when it validates and when it ends, as a function of the steps taken.

Lightning sees one long epoch, so that batches have one number from the first to the last of a training.
Knows nothing of Lightning.
"""

from dataclasses import dataclass
from typing import Self

from full_stack_transformer.arguments.training import TrainArguments


@dataclass(frozen=True)
class Plan:
    """The lengths of a training."""

    num_steps: int | None
    """Optimizer steps until the end; none without a limit."""
    max_seconds: float | None
    """Time until the end; none without a limit."""
    num_batches_between_validations: int
    """Batches of one process; a validation waits for the end of the optimizer step."""
    accumulate_grad_batches: int
    """Batches of an optimizer step."""

    @classmethod
    def of(cls, arguments: TrainArguments, *, num_batches_per_epoch: int) -> Self:
        """What the options mean for epochs of so many batches."""
        limits = []
        if arguments.max_epochs != -1:
            num_batches = arguments.max_epochs * num_batches_per_epoch
            limits.append(-(-num_batches // arguments.accumulate_grad_batches))
        if arguments.max_steps != -1:
            limits.append(arguments.max_steps)
        interval = arguments.val_check_interval
        batches = interval if interval > 1 else interval * num_batches_per_epoch
        return cls(
            num_steps=min(limits) if limits else None,
            max_seconds=None if arguments.max_minutes is None else 60 * arguments.max_minutes,
            num_batches_between_validations=max(1, int(batches)),
            accumulate_grad_batches=arguments.accumulate_grad_batches,
        )

    def progress(self, step: int, seconds: float) -> float:
        """Part of the training that is over after `step` optimizer steps and `seconds`, 0 to 1."""
        by_steps = step / self.num_steps if self.num_steps else float(self.num_steps == 0)
        by_time = seconds / self.max_seconds if self.max_seconds is not None else 0.0
        return min(1.0, max(by_steps, by_time))

    def validates_after(self, num_batches: int) -> bool:
        """Whether the optimizer step that ends with batch `num_batches`, counted from 1, is validated."""
        every = self.num_batches_between_validations
        return num_batches // every > (num_batches - self.accumulate_grad_batches) // every
