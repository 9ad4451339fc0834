"""What a task is: everything in which one objective differs from another.

    CorpusTask   a dataset directory ──samples, collator──┐
    RowTask      labelled rows ──features──collate────────┴─> batch ──forward──> scores ──loss_sum──> loss
                                                                                 └─predictions──> JSON

A row is a dict as it stands in a JSON Lines file. A feature is one input of the model: most rows have one,
a long text that is searched in windows has several. Loaders, optimizer, checkpoints, command line and
service are written once and ask the task.

Legend: B batch, T tokens, L labels, C choices.
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import WindowOptions
from full_stack_transformer.datasets.batches import Samples
from full_stack_transformer.datasets.collators import Batch, Collator, PaddedCollator
from full_stack_transformer.datasets.corpus import (
    Corpus,
    DatasetDirectory,
    Kind,
    prepare_command,
)
from full_stack_transformer.errors import DatasetError, RowError
from full_stack_transformer.metrics.classification import ClassificationMetrics, ClassRow
from full_stack_transformer.modelling.losses import perplexity
from full_stack_transformer.modelling.model_card import TaskWords
from full_stack_transformer.rows.fields import (
    Columns,
    Row,
    alike_labels,
    all_but_labels,
    counted,
    label_name,
    names_of,
    place,
)
from full_stack_transformer.tasks.catalogue import TASK_OF_KIND
from full_stack_transformer.tasks.routes import Form, Route
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL
from full_stack_transformer.tokenization.transformers_tokenizer import (
    open_tokenizer,
    special_token_ids,
)

logger = logging.getLogger(__name__)

Feature = dict[str, Any]
"""`input_ids` and the like as lists, `labels` where the row has any, `row`: the index of its row."""
Prediction = Any
"""What becomes JSON."""

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Names of a feature that are padded with this; `input_ids` is padded with the tokenizer's own token.
_PADDING = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORED_LABEL}


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of a task; each has the name of its option of `fst train`. A task with more derives from it."""

    max_length: int = 128
    """Tokens of a feature, at most."""

    @classmethod
    def of(cls, arguments: object) -> Self:
        """Those of a command's options that this task has."""
        names = [field.name for field in fields(cls) if hasattr(arguments, field.name)]
        return cls(**{name: getattr(arguments, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class WindowTaskOptions(WindowOptions, TaskOptions):
    """Options of tasks that read long texts in windows."""

    @property
    def stride(self) -> int:
        """Tokens that two windows of a text share: `doc_stride`, but half of a window at most."""
        return min(self.doc_stride, self.max_length // 2)


@dataclass(frozen=True)
class Metrics:
    """How good predictions are."""

    scalars: dict[str, float]
    """The first one says most."""
    per_class: tuple[ClassRow, ...] = ()
    """The table of classes, where there are classes."""
    labels: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    """Row: the expected one of `labels`, column: the predicted one."""

    @classmethod
    def of_classes(cls, found: ClassificationMetrics, labels: Sequence[str]) -> Self:
        """Those of decisions between classes."""
        scalars = found.scalars()
        if found.confusion:  # of one class each, where it is the accuracy
            del scalars["f1_micro"]
        return cls(scalars, found.per_class, tuple(labels), found.confusion)


@dataclass(frozen=True, kw_only=True)
class TrainingDefaults:
    """Options of a training where nobody chose them; None leaves that of all tasks."""

    learning_rate: float | None = None
    adapter_learning_rate: float | None = None
    """The same of an adapter, which needs higher ones."""
    num_warmup_steps: int | None = None
    max_epochs: int | None = None
    max_length: int | None = None

    def options(self, *, has_adapter: bool) -> dict[str, Any]:
        """Those that are not None, by name."""
        found = asdict(self)
        rate = found.pop("adapter_learning_rate")
        if has_adapter:
            found["learning_rate"] = rate
        return {name: value for name, value in found.items() if value is not None}


class Task(ABC):
    """An objective, with the tokenizer and the options of one model.

    Args:
        tokenizer: what `open_tokenizer` returns.
        options: of the class `options_class`.
    """

    name: ClassVar[str]
    model_class: ClassVar[Any]
    """The transformers class that opens a saved model with all of its weights."""
    heads: ClassVar[tuple[str, ...]] = ()
    """How the names of model classes end that this task can use."""
    marker_file: ClassVar[str] = ""
    """A file of a model directory that tells of this task, whatever head the weights still hold."""
    options_class: ClassVar[type[TaskOptions]] = TaskOptions
    generates: ClassVar[bool] = False
    """Whether models continue texts: they are served by the engine, and show samples while they train."""
    card: ClassVar[TaskWords]
    """Words of the model card."""
    routes: ClassVar[tuple[Route, ...]] = ()
    """HTTP routes beside those of all models."""
    form: ClassVar[Form | None] = None
    """What the playground shows."""
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults()
    saved_as: ClassVar[str] = ""
    """The task of a saved model, where it is another: a tuned model goes on as what it was."""
    new_head: ClassVar[bool] = False
    """Whether a model to start from may lack the head, which then gets random weights."""

    def __init__(self, tokenizer: Any, options: Any) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.num_processes = 1
        """That train together; a loss over a whole batch then looks at that of all of them."""

    @classmethod
    def open_tokenizer(cls, directory: Path) -> Any:
        """The tokenizer of a model directory: by default the one of transformers."""
        return open_tokenizer(directory)

    @classmethod
    def open(cls, config: PretrainedConfig, tokenizer: Any, options: Any) -> Self:
        """The task of a saved model."""
        return cls(tokenizer, options)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.tokenizer)

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Ids under `begin`, `end` and `pad`."""
        return special_token_ids(self.tokenizer)

    @property
    def control_tokens(self) -> list[str]:
        """Tokens that a text for this task may name."""
        return []

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

    def prepare_backbone(self, backbone: Backbone) -> None:  # noqa: B027
        """Exchange parts of a model before it is trained; nothing by default."""

    def pretrained_fields(self) -> dict[str, Any]:
        """What the config of a model to start from is to say instead of what it says."""
        return {}

    def config_fields(self) -> dict[str, Any]:
        """What a model's config says of the task."""
        return {}

    def saved_options(self) -> dict[str, Any]:
        """Options that the model's config does not hold and opening needs."""
        return {}

    def description_fields(self) -> dict[str, Any]:
        """What description.json says beside the rest."""
        return {"task_options": self.saved_options()}

    @classmethod
    def options_of(cls, description: Mapping[str, Any]) -> dict[str, Any]:
        """The options that `description_fields` saved."""
        options: dict[str, Any] = description.get("task_options", {})
        return options

    def finish_directory(self, directory: Path, config: PretrainedConfig) -> None:  # noqa: B027
        """Write what a model directory holds beside the plain files; nothing by default."""

    def read_directory(self, directory: Path, device: torch.device) -> None:  # noqa: B027
        """Read what `finish_directory` wrote."""

    def forward(self, backbone: Backbone, batch: Batch) -> Tensor:
        """The model's scores, B first."""
        inputs = {name: tensor for name, tensor in batch.items() if name in MODEL_INPUTS}
        scores: Tensor = backbone(**inputs).logits
        return scores

    @abstractmethod
    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """The loss, summed over the targets of a batch."""

    def training_losses(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums over the targets of a batch: what is minimized, and what curves show of it."""
        loss_sum = self.loss_sum(scores, batch)
        return loss_sum, loss_sum

    @abstractmethod
    def validation_sums(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What a validation adds up: `loss`, `targets` (their number), and what the metrics need."""


class CorpusTask(Task):
    """A task that learns from the samples of a dataset directory; `read_dataset` comes first."""

    new_head = False
    batchings: ClassVar[tuple[str, ...]] = ("length",)
    """Values of --batching that it knows."""
    kinds: ClassVar[tuple[Kind, ...]] = ("documents",)
    """Datasets that it learns from."""
    replays: ClassVar[bool] = False
    """Whether documents can be learned beside the dataset: `loss_sum` is the cross entropy of next tokens."""
    dataset: DatasetDirectory
    model_path: str = "MODEL_DIRECTORY"
    """Where the model is that reads the dataset, for messages."""

    @classmethod
    def tokenizer_files(cls, dataset: DatasetDirectory, place: Callable[[], Path]) -> Path:
        """Where the files of the model's tokenizer are: those of the dataset, or others in `place()`."""
        return dataset.tokenizer_directory

    def read_dataset(self, dataset: DatasetDirectory) -> None:
        """Take the dataset to learn from, or to be measured on.

        Raises:
            DatasetError: it was prepared with another tokenizer, or for other tasks.
        """
        self.dataset = dataset
        if dataset.kind not in self.kinds:
            raise DatasetError(
                f"{dataset.directory} holds {dataset.kind}, and --task {self.name} learns from "
                f"{' or '.join(self.kinds)}; pass --task {TASK_OF_KIND[dataset.kind]}"
            )
        for name, token_id in dataset.description.get("special_token_ids", {}).items():
            if not 0 <= token_id < self.vocab_size:
                raise DatasetError(
                    f"description.json of {dataset.directory} names {token_id} as the token {name}, but "
                    f"the tokenizer has {self.vocab_size:,} tokens; prepare the dataset again"
                )
        for corpus in (dataset.train, dataset.valid):
            corpus.limit_ids(self.vocab_size)

    def other_vocabulary(self, dataset: DatasetDirectory, num_tokens: int) -> DatasetError:
        """The error for a dataset of another tokenizer, which has so many tokens."""
        return DatasetError(
            f"{dataset.directory} was prepared with another tokenizer ({num_tokens:,} tokens) than that of "
            f"{self.model_path} ({self.vocab_size:,} tokens); prepare it for this model: "
            f"{prepare_command(dataset, self.model_path)}; or fst train --resize_embeddings new gives the "
            "model the tokens of the dataset"
        )

    @classmethod
    def row_length(cls, dataset: DatasetDirectory, options: Any) -> int:
        """Tokens of a packed row, and of the longest sample."""
        length: int = dataset.description["max_sample_length"]
        return length

    def samples(self, corpus: Corpus) -> Samples:
        """What batches are made of."""
        return corpus

    def learned(self, corpus: Corpus) -> Corpus:
        """A corpus whose marks say which tokens this task learns."""
        return corpus

    def collator(self, corpus: Corpus, *, seed: int) -> Collator:
        """What makes tensors of samples, one in a row; the seed of a validation is 0."""
        return PaddedCollator(corpus, pad_id=self.dataset.description["special_token_ids"]["pad"])

    def pretrained_fields(self) -> dict[str, Any]:
        """Nothing: the model stays what it is."""
        return {}

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Those of the dataset."""
        ids: dict[str, int] = self.dataset.description["special_token_ids"]
        return ids

    def description_fields(self) -> dict[str, Any]:
        """Nothing where there are no options to save."""
        options = self.saved_options()
        return {"task_options": options} if options else {}

    def validation_sums(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The loss, and how many labels there are."""
        num_targets = (batch["labels"] != IGNORED_LABEL).sum()
        return {"loss": self.loss_sum(scores, batch), "targets": num_targets}

    def validation_metrics(self, loss: float, sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics beside the mean loss, from what `validation_sums` added up."""
        return {"perplexity": perplexity(loss)}

    def evaluation(self, loss: float, sums: Mapping[str, float]) -> dict[str, Any]:
        """What `fst evaluate` prints of all validation samples."""
        return {
            "task": self.name,
            "loss": loss,
            **self.validation_metrics(loss, sums),
            "num_samples": len(self.dataset.valid),
            "num_targets": int(sums["targets"]),
        }


class RowTask(Task):
    """A task on labelled rows: rows to features, features to a batch, scores to predictions."""

    new_head = True
    needs_labels: ClassVar[bool] = True
    """Whether rows to learn from must have a label."""
    measured_by: ClassVar[str] = "a label"
    """What a row must have to be measured by, for an error."""
    columns: ClassVar[Columns] = Columns()
    """Its fields, which --text_column and --label_column name."""
    reads_words: ClassVar[bool] = False
    """Whether its rows are words with a label each, as CoNLL files have them."""

    @classmethod
    def learn(cls, rows: Sequence[Row], tokenizer: Any, options: Any) -> Self:
        """The task that training rows describe, such as their labels."""
        return cls(tokenizer, options)

    @classmethod
    def named(cls, row: Row) -> Row:
        """A row of a published data set under the names that this task reads; others stay as they are."""
        return row

    @classmethod
    def texts(cls, row: Row) -> Mapping[str, Any]:
        """What this task reads of a row beside its label; rows with the same texts stay together in a split.

        Args:
            row: as it was read, with the names of its data set.
        """
        return all_but_labels(row)

    @classmethod
    def has_label(cls, row: Row) -> bool:
        """Whether a row can be learned from."""
        return not cls.needs_labels or row.get(cls.columns.label) is not None

    def label_counts(self, rows: Sequence[Row]) -> Counter[str]:
        """How often each class occurs; empty where there are none."""
        labels = [row.get("label") for row in rows]
        return Counter(
            label_name(label) for label in labels if isinstance(label, str | int | float)
        )

    @property
    def class_names(self) -> list[str]:
        """Those that were learned; none where labels are no classes."""
        fields = self.config_fields()
        is_number = fields.get("problem_type") == "regression"
        return [] if is_number else list(fields.get("id2label", {}).values())

    def unknown_labels(self, rows: Sequence[Row]) -> Counter[str]:
        """The classes of rows that this task has not learned; empty where there are none."""
        return Counter()

    def describe_labels(self, rows: Sequence[Row]) -> str:
        """The classes of rows to learn from with their counts, to be checked before training."""
        counts = self.label_counts(rows)
        return f"labels: {counted(counts)}" if counts else ""

    def log_labels(self, rows: Sequence[Row], source: str) -> None:
        """Log the classes of rows to learn from, and those that are probably one class."""
        described = self.describe_labels(rows)
        if described:
            logger.info("%s training rows of %s, %s", f"{len(rows):,}", source, described)
        for alike in alike_labels(self.label_counts(rows)):
            logger.warning(
                "%s: the labels %s differ by case or white space only; if they mean the same, correct them",
                source,
                " and ".join(map(repr, alike)),
            )

    def log_unknown_labels(self, rows: Sequence[Row], source: str) -> None:
        """Log classes that only rows to measure by have.

        Raises:
            RowError: they have no others.
        """
        unknown = self.unknown_labels(rows)
        num_labels = self.label_counts(rows).total()
        if unknown and unknown.total() >= num_labels:
            raise RowError(
                f"{source}: none of its labels ({counted(unknown)}) is one of the training rows' "
                f"({', '.join(self.class_names)})"
            )
        if unknown:
            logger.warning(
                "%s: %s of %s labels are none of the training rows' and count as errors: %s",
                source,
                f"{unknown.total():,}",
                f"{num_labels:,}",
                counted(unknown),
            )

    def pretrained_fields(self) -> dict[str, Any]:
        """Labels, and the token that fills up rows."""
        return {**self.config_fields(), "pad_token_id": self.tokenizer.pad_token_id}

    @abstractmethod
    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """The inputs of rows, with `labels` where a row has them.

        Raises:
            RowError: a row lacks a field.
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
                f"{names_of(row)}; name the right one with --label_column, or leave out rows without a label "
                "with --on_bad_row skip"
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

    def validation_sums(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The loss; `weights` (B,) are the targets of the features, none in a batch that fills up."""
        # Computed for a filler too: the processes may compute it together.
        loss = self.loss_sum(scores, batch)
        loss = loss if len(batch["weights"]) else torch.zeros_like(loss)
        return {"loss": loss, "targets": batch["weights"].sum()}

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
    def metrics(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Metrics:
        """How good the predictions are; the first metric says most."""

    @abstractmethod
    def is_right(self, row: Row, prediction: Prediction) -> float:
        """How right a prediction is, to put the worst errors first: higher is better, below 0.5 is wrong."""

    def baselines(
        self, train_rows: Sequence[Row], rows: Sequence[Row]
    ) -> dict[str, list[Prediction]]:
        """Predictions without a model, by the name of the baseline; none by default.

        Args:
            train_rows: labelled, what the baselines learn from.
            rows: what they predict.
        """
        return {}

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
        order = sorted(range(len(features)), key=lambda index: self.length(features[index]))
        scores: list[Tensor] = [torch.empty(0)] * len(features)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = self.collate([features[index] for index in indices])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            found = self.forward(backbone, batch).float().cpu()
            for index, score in zip(indices, found, strict=True):
                scores[index] = score
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


def pad(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """(B, T) int64, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
