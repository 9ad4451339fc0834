"""The exponential moving average of the weights: what is validated, shown and exported.

The weights that are trained stay as they are. Lightning's `EMAWeightAveraging` has a constant decay, so
that the random weights of the start count for long, and takes the average out again in
`on_validation_epoch_end`, before `on_validation_end`, where models are exported and texts are sampled.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from full_stack_transformer.errors import UsageError
from full_stack_transformer.training.sharding import is_sharded

# Key in a checkpoint: the trained weights by name. `state_dict` holds the average, so that a reader of the
# checkpoint finds the weights that were validated.
TRAINED_WEIGHTS_KEY = "trained_weights"


class AveragedWeights(pl.Callback):
    """Averages the weights after each optimizer step, and puts the average in their place to validate.

    After n steps the average keeps min(decay, (1 + n) / (10 + n)) of itself, as TensorFlow's
    ExponentialMovingAverage does: the random weights of the start are soon forgotten.

    The average stays in place until the training goes on or ends, so that all callbacks find it in
    `on_validation_end`, whatever their order.

    Args:
        decay: fraction of the average that a step keeps, after the start.
    """

    def __init__(self, *, decay: float) -> None:
        self._decay = decay
        self._step = 0
        self._weights: list[Tensor] = []
        self._averages: list[Tensor] = []
        self._is_in_place = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that each device has whole weights.

        Raises:
            UsageError: each process holds a part of each weight.
        """
        if is_sharded(trainer):
            raise UsageError(
                "--ema_decay needs whole weights on each device, which --strategy fsdp does not keep; "
                "use --strategy ddp, or no --ema_decay"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start with the current weights, or with the average in a checkpoint."""
        self._step = trainer.global_step
        self._weights = _trained(pl_module)
        averages = self._averages or [weight.detach().clone() for weight in self._weights]
        self._averages = [average.to(pl_module.device) for average in averages]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Move the average towards the weights after an optimizer step."""
        if trainer.global_step == self._step:  # in the middle of an accumulation window
            return
        self._step = trainer.global_step
        kept = min(self._decay, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_(self._averages, self._weights, 1.0 - kept)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in the place of the weights; a checkpoint was written before."""
        self._exchange(to_average=True)

    def on_train_batch_start(self, *_: Any) -> None:
        """Return to the weights after a validation."""
        self._exchange(to_average=False)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Return to the weights after the last validation."""
        self._exchange(to_average=False)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average in `state_dict`, and the trained weights beside it."""
        average_of = {
            id(weight): average
            for weight, average in zip(self._weights, self._averages, strict=True)
        }
        names = {
            name: id(value)
            for name, value in pl_module.state_dict(keep_vars=True).items()
            if id(value) in average_of
        }
        state = checkpoint["state_dict"]
        checkpoint[TRAINED_WEIGHTS_KEY] = {name: state[name] for name in names}
        checkpoint["state_dict"] = state | {name: average_of[key] for name, key in names.items()}

    @torch.no_grad()
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning has loaded the average: keep a copy, and load the trained weights."""
        self._averages = [weight.detach().clone() for weight in _trained(pl_module)]
        pl_module.load_state_dict(checkpoint[TRAINED_WEIGHTS_KEY], strict=False)

    @torch.no_grad()
    def _exchange(self, *, to_average: bool) -> None:
        if self._is_in_place == to_average:
            return
        self._is_in_place = to_average
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def _trained(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
