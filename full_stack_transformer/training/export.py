"""The model directory: the best model so far, complete at every moment."""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from full_stack_transformer.errors import ModelError
from full_stack_transformer.modelling.backbones import context_length, num_parameters
from full_stack_transformer.modelling.model_card import model_card
from full_stack_transformer.modelling.model_directory import (
    CHECKPOINT_BACKBONE_PREFIX,
    save_model_directory,
)
from full_stack_transformer.training.figures import ValidationFigures, validation_figures
from full_stack_transformer.training.tasks import CausalLanguageModelling

logger = logging.getLogger(__name__)


class ExportModel(pl.Callback):
    """Puts the model in the place of the one before when its validation loss is lower.

    Args:
        target: the model directory.
        tokenizer_directory: files that are copied into it.
        experiment: NAME/VERSION, for the description.
        dataset_description: the same.
        arguments: options of the training, for the model card.
        bytes_per_target: mean bytes of text of a target of the validation samples.
    """

    def __init__(
        self,
        target: Path,
        *,
        tokenizer_directory: Path,
        experiment: str,
        dataset_description: Mapping[str, Any],
        arguments: Mapping[str, Any],
        bytes_per_target: float,
    ) -> None:
        self._target = target
        self._tokenizer_directory = tokenizer_directory
        self._experiment = experiment
        self._dataset_description = dataset_description
        self._arguments = arguments
        self._bytes_per_target = bytes_per_target
        self._model_facts: dict[str, Any] = {}
        self.best: ValidationFigures | None = None
        """The validation whose model was exported."""
        self.curve: list[tuple[int, float]] = []
        """Optimizer steps and validation loss of each validation."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note what the model is, while the weights are whole."""
        assert isinstance(pl_module, CausalLanguageModelling)
        config = pl_module.backbone.config
        self._model_facts = {
            "model_type": config.model_type,
            "num_parameters": num_parameters(pl_module.backbone),
        }
        with contextlib.suppress(ModelError):  # not every architecture has a limit
            self._model_facts["context_length"] = context_length(config)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export when the validation loss has improved.

        Raises:
            MachineError: the disk is full or cannot be written; the previous model is intact.
        """
        figures = validation_figures(trainer, self._bytes_per_target)
        # Written so that NaN is no improvement.
        is_best = self.best is None or figures.loss < self.best.loss
        is_best = is_best and figures.loss < float("inf")
        self.curve.append((figures.step, figures.loss))
        if is_best:
            self.best = figures
            self._export(trainer, pl_module, figures)
        if trainer.is_global_zero:
            logger.info(
                "step %s: validation loss %.4f, perplexity %.2f, %.3f bits per byte%s",
                f"{figures.step:,}",
                figures.loss,
                figures.perplexity,
                figures.bits_per_byte,
                ", the best so far" if is_best else "",
            )

    def state_dict(self) -> dict[str, Any]:
        """What a training that is resumed must know: plain values alone."""
        best = None if self.best is None else asdict(self.best)
        return {"best": best, "curve": [list(point) for point in self.curve]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best model and the curve of earlier runs."""
        best = state_dict["best"]
        self.best = None if best is None else ValidationFigures(**best)
        self.curve = [(step, loss) for step, loss in state_dict["curve"]]

    def _export(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, figures: ValidationFigures
    ) -> None:
        assert isinstance(pl_module, CausalLanguageModelling)
        # By every process: one that holds a part of the weights gives it to the one that writes.
        weights = trainer.strategy.lightning_module_state_dict()
        if not trainer.is_global_zero:
            return
        description = {
            "task": "causal_lm",
            "experiment": self._experiment,
            **self._model_facts,
            "step": figures.step,
            "validation_loss": figures.loss,
            "validation_perplexity": figures.perplexity,
            "validation_bits_per_byte": figures.bits_per_byte,
            "dataset": dict(self._dataset_description),
        }
        save_model_directory(
            self._target,
            pl_module.backbone,
            tokenizer_directory=self._tokenizer_directory,
            description=description,
            card=model_card(description, self._arguments, self.curve),
            weights={
                name.removeprefix(CHECKPOINT_BACKBONE_PREFIX): weight
                for name, weight in weights.items()
                if name.startswith(CHECKPOINT_BACKBONE_PREFIX)
            },
        )
