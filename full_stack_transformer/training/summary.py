"""What a training came to, at its end: lines for a person, summary.json for programs."""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from full_stack_transformer.training.callbacks.meter import Meter
from full_stack_transformer.training.callbacks.progress import duration
from full_stack_transformer.training.figures import ValidationFigures

SUMMARY_FILE_NAME = "summary.json"


@dataclass(frozen=True)
class TrainingSummary:
    """The content of summary.json."""

    num_steps: int
    """Optimizer steps, of all runs of a training that was resumed."""
    num_tokens: int
    """Input tokens that are not padding, of all runs and processes."""
    tokens_per_second: float
    """Of this run, from its second step on, without validations."""
    model_flops_utilization: float
    """Part of the measured peak that this rate means."""
    seconds_taken: float
    """Of this run, all in all."""
    best_step: int | None
    """The validation with the best figure, whose model was exported; none without a validation."""
    best_validation_loss: float | None
    best_metrics: dict[str, float]
    """What the task measured then beside the loss."""
    best_words: str
    """The same for a person."""

    def as_json(self) -> dict[str, Any]:
        """For summary.json."""
        content = asdict(self)
        del content["best_words"]
        metrics = content.pop("best_metrics")
        return content | {f"best_validation_{name}": value for name, value in metrics.items()}

    def lines(self, directory: Path) -> list[str]:
        """For a person, who wants to talk to the model next."""
        lines = [
            f"trained {self.num_steps:,} steps on {self.num_tokens:,} tokens in "
            f"{duration(self.seconds_taken)}, {self.tokens_per_second:,.0f} tokens/s, "
            f"MFU {self.model_flops_utilization:.0%}"
        ]
        if self.best_step is not None:
            lines.append(
                f"best validation loss {self.best_validation_loss:.4f} at step {self.best_step:,}"
                + (f": {self.best_words}" if self.best_words else "")
            )
            lines.append(f"serve it: fst serve {shlex.quote(str(directory))}")
        return lines


def summarize(
    meter: Meter, best: ValidationFigures | None, *, num_steps: int, seconds_taken: float
) -> TrainingSummary:
    """The summary of a training that has ended.

    Args:
        meter: stopped, by the end of the training.
        best: the validation whose model was exported.
        num_steps: optimizer steps.
        seconds_taken: from the start of the command.
    """
    reading = meter.read()
    rate = reading.tokens_per_second_since(meter.first)
    return TrainingSummary(
        num_steps=num_steps,
        num_tokens=reading.num_tokens,
        tokens_per_second=round(rate, 1),
        model_flops_utilization=round(meter.utilization(rate), 4),
        seconds_taken=round(seconds_taken, 1),
        best_step=best.step if best else None,
        best_validation_loss=best.loss if best else None,
        best_metrics=best.metrics if best else {},
        best_words=best.words() if best else "",
    )
