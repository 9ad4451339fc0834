"""What a validation found: its loss, and what follows from it."""

from dataclasses import dataclass

import pytorch_lightning as pl

from full_stack_transformer.datasets.text_bytes import bits_per_byte
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.meter import perplexity


@dataclass(frozen=True)
class ValidationFigures:
    """The figures of one validation."""

    step: int
    """Optimizer steps before it."""
    loss: float
    """Mean cross entropy of the targets, in nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """Bits per byte of UTF-8 text; comparable between tokenizers."""


def validation_figures(trainer: pl.Trainer, bytes_per_target: float) -> ValidationFigures:
    """The figures of the validation that ends now.

    Args:
        trainer: holds the loss that the task logged.
        bytes_per_target: mean bytes of text of a target of the validation samples.
    """
    loss = float(trainer.callback_metrics[metric_names.VALID_LOSS])
    return ValidationFigures(
        step=trainer.global_step,
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=bits_per_byte(loss, bytes_per_target),
    )
