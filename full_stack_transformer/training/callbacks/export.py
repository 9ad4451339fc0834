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
from full_stack_transformer.tasks.task import Task
from full_stack_transformer.training.module import (
    TrainingModule,
    ValidationMetrics,
    validation_metrics,
)

logger = logging.getLogger(__name__)


class ExportModel(pl.Callback):
    """Puts the model in the place of the one before when its validation is better: a lower loss,
    or what --metric_for_best_model names.

    Args:
        target: the model directory.
        task: what the model learned.
        tokenizer_directory: files that are copied into it.
        experiment: NAME/VERSION, for the description.
        dataset_description: the same.
        arguments: options of the training, for the model card.
        fields: what else the description says.
    """

    def __init__(
        self,
        target: Path,
        *,
        task: Task,
        tokenizer_directory: Path,
        experiment: str,
        dataset_description: Mapping[str, Any],
        arguments: Mapping[str, Any],
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        self._target = target
        self._task = task
        self._tokenizer_directory = tokenizer_directory
        self._experiment = experiment
        self._dataset_description = dataset_description
        self._arguments = arguments
        self._fields = dict(fields or {})
        self._model_facts: dict[str, Any] = {}
        self.best: ValidationMetrics | None = None
        """The validation whose model was exported."""
        self.curve: list[tuple[int, float]] = []
        """Optimizer steps and validation loss of each validation."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note what the model is, while the weights are whole."""
        assert isinstance(pl_module, TrainingModule)
        config = pl_module.backbone.config
        self._model_facts = {
            "model_type": config.model_type,
            "num_parameters": num_parameters(pl_module.backbone),
        }
        with contextlib.suppress(ModelError):  # not every architecture has a limit
            self._model_facts["context_length"] = context_length(config)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export when the validation has improved.

        Raises:
            MachineError: the disk is full or cannot be written; the previous model is intact.
        """
        found = validation_metrics(trainer)
        # Written so that NaN is no improvement.
        is_best = self.best is None or found.decisive < self.best.decisive
        is_best = is_best and found.decisive < float("inf")
        self.curve.append((found.step, found.loss))
        if is_best:
            self.best = found
            self._export(trainer, pl_module, found)
        if trainer.is_global_zero:
            logger.info(
                "step %s: validation loss %.4f%s%s",
                f"{found.step:,}",
                found.loss,
                f", {found.words()}" if found.metrics else "",
                ", the best so far" if is_best else "",
            )

    def state_dict(self) -> dict[str, Any]:
        """What a training that is resumed must know: plain values alone."""
        best = None if self.best is None else asdict(self.best)
        return {"best": best, "curve": [list(point) for point in self.curve]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best model and the curve of earlier runs."""
        best = state_dict["best"]
        self.best = None if best is None else ValidationMetrics(**best)
        self.curve = [(step, loss) for step, loss in state_dict["curve"]]

    def _export(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, found: ValidationMetrics
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        # By every process: one that holds a part of the weights gives it to the one that writes.
        weights = trainer.strategy.lightning_module_state_dict()
        if not trainer.is_global_zero:
            return
        description = {
            "task": self._task.name,
            "experiment": self._experiment,
            **self._model_facts,
            "step": found.step,
            "validation_loss": found.loss,
            **{f"validation_{name}": value for name, value in found.metrics.items()},
            **self._fields,
            "dataset": dict(self._dataset_description),
        }
        task, config = self._task, pl_module.backbone.config
        save_model_directory(
            self._target,
            pl_module.backbone,
            tokenizer_directory=self._tokenizer_directory,
            description=description,
            card=model_card(description, self._arguments, self.curve, task.card),
            weights={
                name.removeprefix(CHECKPOINT_BACKBONE_PREFIX): weight
                for name, weight in weights.items()
                if name.startswith(CHECKPOINT_BACKBONE_PREFIX)
            },
            finish=lambda directory: task.finish_directory(directory, config),
        )
