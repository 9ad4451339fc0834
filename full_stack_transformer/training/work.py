"""What one training learns from what: the parts of `fst train` that depend on the task.

    LanguageModelWork   corpus_work.py   a dataset directory -> causal_lm, masked_lm
    RowsWork            rows_work.py     labelled rows       -> every other task

Knows no task; open_work.py finds the one that the options name.
"""

import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.errors import UsageError
from full_stack_transformer.rows.splits import Split
from full_stack_transformer.training.data.batches import EpochDataModule
from full_stack_transformer.training.experiments import TOKENIZER_DIRECTORY_NAME
from full_stack_transformer.training.module import TrainingModule


class Work(ABC):
    """The parts of a training; `begin` first.

    Attributes:
        arguments: the options, with what was found in the place of what was given.
        description: of the data; a training that is resumed compares it.
        tokenizer_directory: files for the model directory; known after `begin`.
    """

    arguments: TrainArguments
    description: dict[str, Any]
    tokenizer_directory: Path

    @property
    def task_name(self) -> str:
        """For the description of the model."""
        return str(self.arguments.task)

    @property
    @abstractmethod
    def data_place(self) -> str:
        """Where the data are, as it was typed."""

    @property
    @abstractmethod
    def amount(self) -> str:
        """What is learned from, for the log."""

    @abstractmethod
    def begin(self, experiment_directory: Path | None) -> None:
        """Write what belongs to the experiment; None in a process that writes nothing."""

    @abstractmethod
    def make_backbone(self) -> Backbone:
        """The model at the start."""

    @abstractmethod
    def make_data(self, arguments: TrainArguments) -> EpochDataModule:
        """The batches."""

    @abstractmethod
    def make_module(self, backbone: Backbone, arguments: TrainArguments) -> TrainingModule:
        """The task."""

    @property
    @abstractmethod
    def num_context_tokens(self) -> int:
        """Tokens that attention spans: those of a mean sample, or of a row that is cut from all samples."""

    @property
    @abstractmethod
    def num_row_tokens(self) -> int:
        """Tokens of a row of a batch, about."""

    def callbacks(self, directory: Path) -> list[pl.Callback]:
        """What this task alone does while it trains."""
        return []

    def export_fields(self) -> dict[str, Any]:
        """What description.json of the model says beside the rest."""
        return {}

    def apply(self, experiment_directory: Path, split: Split) -> dict[str, float]:
        """Measure the best model on the rows of a split, and write predictions and figures."""
        raise UsageError("only labelled rows can be predicted; measure others with fst evaluate")

    def finish_directory(self, directory: Path, config: PretrainedConfig) -> None:  # noqa: B027
        """Write what the model directory holds beside the plain files; nothing by default."""


def place_for_tokenizer(experiment_directory: Path | None) -> Path:
    """Where a training writes its tokenizer; None for a process that writes no experiment."""
    if experiment_directory is None:  # beside the process that writes
        return Path(tempfile.mkdtemp(prefix="fst-tokenizer-"))
    return experiment_directory / TOKENIZER_DIRECTORY_NAME
