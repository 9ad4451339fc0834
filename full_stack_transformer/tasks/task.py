"""What a task is: the few things in which one differs from another.

    rows ──features──> features ──collate──> batch ──forward──> scores ──predictions──> JSON
                                                        └──loss_sum──> loss

A row is a dict as it stands in a JSON Lines file. A feature is one input of the model: most rows have one,
a long text that is searched in windows has several. Everything else (loaders, optimizer, checkpoints, command
line, service) is written once, for all tasks.

Legend: B batch, T tokens, L labels, C choices.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import RowError
from full_stack_transformer.metrics.classification import ClassificationMetrics, ClassRow

Row = Mapping[str, Any]
Feature = dict[str, Any]
"""`input_ids` and the like as lists, `labels` where the row has any, `row`: the number of its row."""
Batch = dict[str, Tensor]
Prediction = Any
"""What becomes JSON."""

IGNORED_LABEL = -100
# Names of a feature that are padded with this; `input_ids` is padded with the tokenizer's own token.
_PADDING = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORED_LABEL}


@dataclass(frozen=True)
class TaskOptions:
    """What a task is told when it is new; one that is opened again reads its model's config."""

    max_length: int = 128
    """Tokens of a feature, at most."""
    doc_stride: int = 32
    """Tokens that two windows of one text share."""
    problem_type: Literal["auto", "single_label", "multi_label", "regression"] = "auto"
    pooling: Literal["cls", "mean", "max", "first_last_avg", "last"] = "mean"
    embedding_loss: Literal["auto", "simcse", "cosine"] = "auto"
    temperature: float = 0.05


@dataclass(frozen=True)
class Figures:
    """What predictions are worth."""

    scalars: dict[str, float]
    per_class: tuple[ClassRow, ...] = ()
    """The table of classes, where there are classes."""
    labels: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    """Row: the expected one of `labels`, column: the predicted one."""

    @classmethod
    def of_classes(cls, figures: ClassificationMetrics, labels: Sequence[str]) -> Self:
        """Those of decisions between classes."""
        scalars = figures.scalars()
        if figures.confusion:  # of one class each, where it is the accuracy
            del scalars["f1_micro"]
        return cls(scalars, figures.per_class, tuple(labels), figures.confusion)


class Task(ABC):
    """Rows to features, features to a batch, the model's class, its scores, its metrics.

    Args:
        tokenizer: the one of the model.
        options: lengths, and what else the task was told.
    """

    name: ClassVar[str]
    model_class: ClassVar[Any]
    """The transformers class that opens a saved model with all of its weights."""
    needs_labels: ClassVar[bool] = True
    """Whether rows to learn from must have a label."""
    baseline: ClassVar[Literal["words", "none"]] = "none"
    """Whether counting words can do the task too."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: TaskOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.stride = min(options.doc_stride, options.max_length // 2)

    @classmethod
    def learn(
        cls, rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, options: TaskOptions
    ) -> Self:
        """The task that training rows describe, such as their labels."""
        return cls(tokenizer, options)

    @classmethod
    def open(
        cls, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, options: TaskOptions
    ) -> Self:
        """The task of a saved model."""
        return cls(tokenizer, options)

    @classmethod
    def backbone_class(cls, config: PretrainedConfig) -> Any:
        """The transformers class that opens a saved model, where not all architectures take the same."""
        return cls.model_class

    def new_class(self, model_config: str) -> Any:
        """The transformers class of a model from scratch, by the name of its shape."""
        return self.model_class

    def pretrained_class(self, model_path: str) -> Any:
        """The transformers class of a model to start from."""
        return self.model_class

    def saved_options(self) -> dict[str, Any]:
        """Options that the model's config does not hold, for description.json."""
        return {}

    def config_fields(self) -> dict[str, Any]:
        """What a model's config says of the task."""
        return {}

    def finish_directory(self, directory: Path, config: PretrainedConfig) -> None:  # noqa: B027
        """Write what a model directory holds beside the plain files; nothing by default."""

    def read_directory(self, directory: Path, device: torch.device) -> None:  # noqa: B027
        """Read what `finish_directory` wrote."""

    @abstractmethod
    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """The inputs of rows, with `labels` where a row has them.

        Raises:
            RowError: a row lacks a field, or has a label that training never saw.
        """

    def labelled_features(self, rows: Sequence[Row]) -> list[Feature]:
        """The inputs of rows to learn from or to measure by.

        Raises:
            RowError: as `features`, or a row has no label where the task needs one.
        """
        features = self.features(rows)
        bare = next((feature for feature in features if "labels" not in feature), None)
        if self.needs_labels and bare is not None:
            row = rows[bare["row"]]
            raise RowError(
                f"{place(row)}a row to learn from or to measure by needs a label; found the fields "
                f"{names_of(row)}"
            )
        return features

    def num_targets(self, feature: Feature) -> int:
        """What a feature weighs in the mean of the loss."""
        return 1

    def length(self, feature: Feature) -> int:
        """Tokens of a feature, to put similar ones into a batch."""
        return len(feature["input_ids"])

    def num_tokens(self, feature: Feature) -> int:
        """Tokens that the model reads for a feature."""
        return self.length(feature)

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Tensors (B, T), padded on the right; `labels` where all features have them."""
        batch: Batch = {}
        for name in features[0]:
            if name == "labels" and not all(name in feature for feature in features):
                continue
            if name == "input_ids" or (name in _PADDING and isinstance(features[0][name], list)):
                padding = _PADDING.get(name, self.tokenizer.pad_token_id)
                batch[name] = pad([feature[name] for feature in features], padding)
        if "labels" not in batch and all("labels" in feature for feature in features):
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        return batch

    def forward(self, backbone: Backbone, batch: Batch) -> Tensor:
        """The model's scores, B first."""
        inputs = {name: tensor for name, tensor in batch.items() if name in MODEL_INPUTS}
        scores: Tensor = backbone(**inputs).logits
        return scores

    @abstractmethod
    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """The loss, summed over the targets of a batch."""

    @abstractmethod
    def predictions(
        self, rows: Sequence[Row], features: Sequence[Feature], scores: Sequence[Tensor]
    ) -> list[Prediction]:
        """JSON for each row.

        Args:
            rows: those that the features were made of.
            features: all features of the rows, in their order.
            scores: of each feature, on the processor, in fp32; may have padding at its end.
        """

    @abstractmethod
    def figures(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Figures:
        """What the predictions are worth; the first figure says most."""

    @abstractmethod
    def is_right(self, row: Row, prediction: Prediction) -> float:
        """How right a prediction is, to put the worst errors first: higher is better, below 0.5 is wrong."""

    def predict(
        self, rows: Sequence[Row], backbone: Backbone, *, batch_size: int = 32
    ) -> list[Prediction]:
        """JSON for each row, whatever the batch size.

        Args:
            rows: labels are not needed.
            backbone: in evaluation mode.
            batch_size: features that are computed together.
        """
        return self.predict_features(rows, self.features(rows), backbone, batch_size=batch_size)

    @torch.inference_mode()
    def predict_features(
        self,
        rows: Sequence[Row],
        features: Sequence[Feature],
        backbone: Backbone,
        *,
        batch_size: int = 32,
    ) -> list[Prediction]:
        """As `predict`, with the features of all rows at hand."""
        device = next(backbone.parameters()).device
        order = sorted(range(len(features)), key=lambda number: self.length(features[number]))
        scores: list[Tensor] = [torch.empty(0)] * len(features)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = self.collate([features[number] for number in numbers])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            for number, found in zip(
                numbers, self.forward(backbone, batch).float().cpu(), strict=True
            ):
                scores[number] = found
        return self.predictions(rows, features, scores)

    def encode_pair(self, text: str, text_pair: str | None) -> Feature:
        """One or two texts between the tokenizer's own marks, cut to the longest that is allowed."""
        encoding = self.tokenizer(
            text, text_pair, truncation="longest_first", max_length=self.options.max_length
        )
        return {name: encoding[name] for name in self.input_names}

    @property
    def input_names(self) -> list[str]:
        """What the tokenizer makes that the model takes."""
        return [name for name in self.tokenizer.model_input_names if name in MODEL_INPUTS]


MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def pad(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """(B, T) int64, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])


def field(row: Row, name: str, kind: type | tuple[type, ...], task: str) -> Any:
    """A field of a row, of the type that its task needs.

    Raises:
        RowError: it is missing, or something else.
    """
    value = row.get(name)
    if isinstance(value, kind):
        return value
    expected = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
    found = f"{type(value).__name__} there" if name in row else f"the fields {names_of(row)}"
    raise RowError(f"{place(row)}a row of {task} should have {name!r}, a {expected}; found {found}")


def texts_of(row: Row, name: str, task: str) -> list[str]:
    """A field of a row that is a list of texts.

    Raises:
        RowError: it is missing, or something else.
    """
    values: list[Any] = field(row, name, list, task)
    wrong = next((value for value in values if not isinstance(value, str)), "")
    if not isinstance(wrong, str):
        raise RowError(
            f"{place(row)}a row of {task} should have {name!r}, a list of str; found {wrong!r} in it"
        )
    return values


def names_of(row: Row) -> str:
    """The fields of a row, for an error."""
    return ", ".join(name for name in row if name != "_place") or "of an empty object"


def place(row: Row) -> str:
    """Where a row stands, for an error: what its reader noted under `_place`."""
    return f"{row['_place']}: " if "_place" in row else ""
