"""The model or adapter directory: always the complete best one so far."""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from full_stack_transformer.errors import ModelError
from full_stack_transformer.modelling.adapters import has_adapter, save_adapter
from full_stack_transformer.modelling.backbones import context_length, num_parameters
from full_stack_transformer.modelling.model_card import BASE_KEY, model_card
from full_stack_transformer.modelling.model_directory import save_model_directory
from full_stack_transformer.modelling.pretrained import StartFacts
from full_stack_transformer.tasks.task import Task
from full_stack_transformer.training.module import (
    TrainingModule,
    ValidationMetrics,
    validation_metrics,
)

logger = logging.getLogger(__name__)


class ExportModel(pl.Callback):
    """Replaces the model directory after each validation with a better result: a lower loss, or a better
    --metric_for_best_model.

    Args:
        target: the model directory.
        task: what the model learned.
        tokenizer_directory: its files are copied into the model directory.
        experiment: NAME/VERSION, for the description.
        dataset_description: for the description.
        arguments: options of the training, for the model card.
        fields: more fields of the description.
        start: what is kept of the model that the training started from.
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
        start: StartFacts | None = None,
    ) -> None:
        self._start = start
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
        """Describe the model while this process has whole weights."""
        assert isinstance(pl_module, TrainingModule)
        config = pl_module.backbone.config
        self._model_facts = {
            "model_type": config.model_type,
            "num_parameters": num_parameters(pl_module.backbone),
        }
        with contextlib.suppress(ModelError):  # some architectures have no limit
            self._model_facts["context_length"] = context_length(config)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export if the validation result is better.

        Raises:
            MachineError: the disk is full or cannot be written; the previous model is intact.
        """
        found = validation_metrics(trainer)
        # NaN is not better.
        is_best = self.best is None or found.decisive < self.best.decisive
        is_best = is_best and found.decisive < float("inf")
        self.curve.append((found.step, found.loss))
        if is_best:
            self.best = found
            self._export(trainer, pl_module, found)
        if trainer.is_global_zero:
            logger.info(
                "%s: validation loss %.4f%s%s",
                "the start" if trainer.sanity_checking else f"step {found.step:,}",
                found.loss,
                f", {found.words()}" if found.metrics else "",
                ", the best so far" if is_best and not trainer.sanity_checking else "",
            )

    def state_dict(self) -> dict[str, Any]:
        """The best result and the curve, as plain values."""
        best = None if self.best is None else asdict(self.best)
        return {"best": best, "curve": [list(point) for point in self.curve]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        best = state_dict["best"]
        self.best = None if best is None else ValidationMetrics(**best)
        self.curve = [(step, loss) for step, loss in state_dict["curve"]]

    def _export(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, found: ValidationMetrics
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        # In every process: each that has a part of the weights sends it to the one that writes.
        backbone = pl_module.whole_backbone()
        if backbone is None:
            return
        description = {
            "task": self._task.saved_as or self._task.name,
            "experiment": self._experiment,
            **self._model_facts,
            "step": found.step,
            "validation_loss": found.loss,
            **{f"validation_{name}": value for name, value in found.metrics.items()},
            **self._fields,
            "dataset": dict(self._dataset_description),
        }
        task = self._task
        if has_adapter(backbone):
            description[BASE_KEY] = self._arguments["model_path"]
        card = model_card(description, self._arguments, self.curve, task.card)
        if has_adapter(backbone):
            save_adapter(
                self._target,
                backbone,
                tokenizer_directory=self._tokenizer_directory,
                description=description,
                card=card,
            )
            return
        save_model_directory(
            self._target,
            backbone,
            tokenizer_directory=self._tokenizer_directory,
            description=description,
            start=self._start,
            card=card,
            finish=lambda directory: task.finish_directory(directory, backbone.config),
        )
