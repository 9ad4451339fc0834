"""What a validation found: its loss, and what follows from it."""

from dataclasses import dataclass, field

import pytorch_lightning as pl

from full_stack_transformer.training import metric_names


@dataclass(frozen=True)
class ValidationFigures:
    """The figures of one validation."""

    step: int
    """Optimizer steps before it."""
    loss: float
    """Mean loss of the targets, in nats where it is a cross entropy."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the task measures beside it: perplexity and bits per byte, or accuracy, or …"""
    selection: float | None = None
    """What decides which model is the best one: lower is better. None: the loss."""

    @property
    def decisive(self) -> float:
        """`selection`, or the loss."""
        return self.loss if self.selection is None else self.selection

    def words(self) -> str:
        """For a person: `perplexity 12.18, 1.500 bits per byte`."""
        return ", ".join(_words(name, value) for name, value in self.metrics.items())


def _words(name: str, value: float) -> str:
    if name == metric_names.PERPLEXITY:
        return f"perplexity {value:,.2f}"
    if name == metric_names.BITS_PER_BYTE:
        return f"{value:.3f} bits per byte"
    return f"{name} {value:.4f}"


def validation_figures(trainer: pl.Trainer) -> ValidationFigures:
    """The figures of the validation that ends now, which the task logged."""
    found = {
        name.removeprefix(f"{metric_names.VALID}/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(f"{metric_names.VALID}/")
    }
    loss = found.pop(metric_names.LOSS)
    selection = trainer.callback_metrics.get(metric_names.SELECTION)
    return ValidationFigures(
        step=trainer.global_step,
        loss=loss,
        metrics=found,
        selection=None if selection is None else float(selection),
    )
