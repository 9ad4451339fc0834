"""Labelled rows as batches: the data module that a data set of one's own derives from.

How to bring a data set of your own: derive from `BaseDataModule`, override `all_rows` (or `rows` where the
data set has its own splits, `prepare` to download or make it, `augment` to change training rows), and name
the class: `fst run_experiment --data_class my_module.MyData`.
"""

import copy
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.batches import BatchSpans, LengthBatches, SortedBatches
from full_stack_transformer.datasets.order import make_key
from full_stack_transformer.errors import RowError, UsageError
from full_stack_transformer.rows.fields import named_rows
from full_stack_transformer.rows.files import Row, read_rows
from full_stack_transformer.rows.splits import (
    SPLITS,
    Split,
    describe_rows,
    find_splits,
    hub_rows,
    num_repeated,
    split_by_hash,
)
from full_stack_transformer.tasks.task import Feature, Task
from full_stack_transformer.training.data.batches import Collator, EpochDataModule, ValidationLoader

logger = logging.getLogger(__name__)

# Without splits of its own a data set is cut into these parts.
_PARTS = {"train": 0.8, "valid": 0.1, "test": 0.1}


class FeatureSamples:
    """Features as samples: they begin at their own number.

    Args:
        lengths: (features,) tokens of each.
        num_targets: (features,) what each weighs.
    """

    def __init__(self, lengths: Sequence[int], num_targets: Sequence[int]) -> None:
        self._lengths = np.array(lengths, dtype=np.int64)
        self._num_targets = np.array(num_targets, dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all features together."""
        return int(self._lengths.sum())

    def __len__(self) -> int:
        return len(self._lengths)

    def spans(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The numbers themselves, and tokens of each."""
        return numbers, self._lengths[numbers]

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """What each of the features weighs."""
        return self._num_targets[starts]


class BaseDataModule(EpochDataModule):
    """Prepare, split, tokenize and batch labelled rows; see the module for how to derive from it.

    Args:
        arguments: the options of the training.

    Attributes:
        task_name: what the rows are for.
        task: known once `open` was called.
    """

    task_name: str = "sequence_classification"
    task: Task

    def __init__(self, arguments: TrainArguments) -> None:
        super().__init__(
            accumulate_grad_batches=arguments.accumulate_grad_batches,
            max_epochs=arguments.max_epochs,
            limit_train_batches=arguments.limit_train_batches,
        )
        self.arguments = arguments

    def prepare(self) -> None:
        """Download or make the data, once, before anything is read; nothing by default."""

    def all_rows(self) -> Iterable[Row]:
        """The rows of a data set without splits of its own."""
        raise NotImplementedError(f"{type(self).__name__} must override all_rows or rows")

    def rows(self, split: Split) -> Iterable[Row]:
        """The rows of a split; without an override a part of `all_rows` that a hash of their text decides."""
        return self._split_rows[split]

    def augment(self, row: Row, random: np.random.Generator) -> Row:
        """A training row as it is seen this time; itself by default."""
        return row

    @property
    def data_name(self) -> str:
        """For logs and descriptions."""
        return type(self).__name__

    def describe(self) -> dict[str, Any]:
        """What tells this data from other data: a training that is resumed compares it."""
        return {"data_class": f"{type(self).__module__}.{type(self).__qualname__}"}

    def named_rows(self, split: Split) -> list[Row]:
        """The rows of a split under the names that the task reads; read once."""
        return self._named_rows[split]

    def open(self, task: Task) -> None:
        """Make features of the rows, now that labels and tokenizer are known."""
        self.task = task

    @property
    def input_dims(self) -> tuple[int, int]:
        """Tokens of the longest feature, and of the vocabulary."""
        longest = max(map(self.task.length, self.features("train")))
        return (longest, len(self.task.tokenizer))

    @property
    def output_dims(self) -> tuple[int, ...]:
        """Number of classes, or of what else the task predicts."""
        fields = self.task.config_fields()
        return (int(fields["num_labels"]),) if "num_labels" in fields else ()

    @property
    def mapping(self) -> list[str]:
        """The names of the classes, in the order of their numbers."""
        return list(self.task.config_fields().get("id2label", {}).values())

    def with_arguments(self, arguments: TrainArguments) -> Self:
        """The same rows and features in other batches."""
        other = copy.copy(self)
        other.arguments = arguments
        other._max_epochs = arguments.max_epochs
        other._accumulate_grad_batches = arguments.accumulate_grad_batches
        other._limit_train_batches = arguments.limit_train_batches
        return other

    def config(self) -> dict[str, Any]:
        """`input_dims`, `output_dims` and `mapping`, for a model class that wants to know them."""
        names = ("input_dims", "output_dims", "mapping")
        return {name: getattr(self, name) for name in names}

    def features(self, split: Split) -> list[Feature]:
        """The features of a split; made once."""
        if split not in self._features:
            rows = self.named_rows(split)
            self._features[split] = self.task.features(rows)
            unlabelled = next((f for f in self._features[split] if not self._has_labels(f)), None)
            if split != "test" and unlabelled is not None:
                row = rows[unlabelled["row"]]
                raise RowError(
                    f"{row.get('_place', 'a row')} has no label; a row to {split} with needs one"
                )
        return self._features[split]

    def train_plan(self, rank: int, world_size: int) -> LengthBatches:
        """Features of similar length share a batch."""
        samples = self._samples("train")
        if len(samples) < world_size:
            raise UsageError(
                f"{self.data_name} has {len(samples)} training rows, fewer than the {world_size} devices"
            )
        return LengthBatches(
            samples,
            batch_size=self.arguments.batch_size,
            seed=self.arguments.seed,
            rank=rank,
            world_size=world_size,
        )

    def train_collator(self) -> Collator:
        """Features to tensors, augmented where the class says how."""
        is_augmented = type(self).augment is not BaseDataModule.augment
        return RowCollator(self, "train", augments=is_augmented)

    def valid_plan(self, rank: int, world_size: int) -> SortedBatches:
        """Every validation feature, by its length."""
        return self._sorted("valid", rank, world_size)

    def valid_collator(self) -> Collator:
        """Features to tensors."""
        return RowCollator(self, "valid")

    def test_dataloader(self) -> ValidationLoader:
        """Every test feature, by its length."""
        plan = self._sorted("test", *self._rank_and_world_size)
        return ValidationLoader(plan, RowCollator(self, "test"))

    def _sorted(self, split: Split, rank: int, world_size: int) -> SortedBatches:
        return SortedBatches(
            self._samples(split),
            batch_size=self.arguments.batch_size,
            limit=self.arguments.limit_val_batches,
            rank=rank,
            world_size=world_size,
        )

    def _samples(self, split: Split) -> FeatureSamples:
        if split not in self._made_samples:
            features = self.features(split)
            self._made_samples[split] = FeatureSamples(
                [self.task.length(feature) for feature in features],
                [self.task.num_targets(feature) for feature in features],
            )
        return self._made_samples[split]

    def _has_labels(self, feature: Feature) -> bool:
        return "labels" in feature or not self.task.needs_labels

    @cached_property
    def _features(self) -> dict[Split, list[Feature]]:
        return {}

    @cached_property
    def _made_samples(self) -> dict[Split, FeatureSamples]:
        return {}

    @cached_property
    def _split_rows(self) -> dict[str, list[Row]]:
        lists = split_by_hash(self.all_rows(), list(_PARTS.values()))
        return dict(zip(_PARTS, lists, strict=True))

    @cached_property
    def _named_rows(self) -> dict[Split, list[Row]]:
        return {split: named_rows(self.rows(split), self.task_name) for split in SPLITS}


class RowCollator:
    """Features of a data module -> tensors, with `numbers` (B,) of the features; empty for a filler.

    Args:
        data: where the features are.
        split: which of them.
        augments: make features anew of rows as `augment` changes them, by seed, epoch and row.
    """

    def __init__(self, data: BaseDataModule, split: Split, *, augments: bool = False) -> None:
        self._data = data
        self._split = split
        self._augments = augments

    def __call__(self, spans: BatchSpans) -> dict[str, Tensor]:
        """What the task's `collate` makes, and `numbers`."""
        data = self._data
        features = [data.features(self._split)[number] for number in spans.starts]
        if self._augments:
            features = [self._augmented(number, spans.epoch) for number in spans.starts]
        numbers = [] if spans.is_filler else spans.starts.tolist()
        batch = data.task.collate(features)
        return {**batch, "numbers": torch.tensor(numbers, dtype=torch.int64)}

    def _augmented(self, place: int, epoch: int) -> Feature:
        data = self._data
        features = data.features(self._split)
        number = features[place]["row"]
        window = 0  # of those of the row
        while place > window and features[place - window - 1]["row"] == number:
            window += 1
        random = np.random.default_rng(make_key(data.arguments.seed, epoch, number))
        changed = data.task.features([data.augment(data.named_rows("train")[number], random)])
        return {**changed[min(window, len(changed) - 1)], "row": number}


class FileRows(BaseDataModule):
    """Rows out of --train_file, --validation_file and --test_file, or out of a --dataset_dir."""

    def __init__(self, arguments: TrainArguments) -> None:
        super().__init__(arguments)
        self.task_name = arguments.task
        data = arguments.dataset_dir
        if data is not None and data.is_file():
            raise UsageError(f"--dataset_dir {data} is a file of rows; pass it as --train_file")
        self._hub = hub_rows(str(data)) if data is not None and not data.is_dir() else None
        self._paths = _paths(arguments, has_directory=self._hub is None)
        self._data_name = (arguments.dataset_dir or self._paths["train"]).name

    @property
    def data_name(self) -> str:
        """That of the directory or the training file."""
        return self._data_name

    def describe(self) -> dict[str, Any]:
        """The files, by their checksums."""
        described: dict[str, Any] = {}
        if self._hub is not None:
            described["data_set"] = str(self.arguments.dataset_dir)
        for split, path in self._paths.items():
            described[split] = describe_rows(path)
        return described

    def rows(self, split: Split) -> list[Row]:
        """Those of the split's file; without one for validation a part of the training rows."""
        return self._rows_of_splits[split]

    @cached_property
    def _rows_of_splits(self) -> dict[Split, list[Row]]:
        found = dict(self._hub or {})
        found |= {split: list(read_rows(path)) for split, path in self._paths.items()}
        part = self.arguments.validation_fraction
        if "valid" not in found and part > 0:
            found["train"], found["valid"] = split_by_hash(found["train"], [1 - part, part])
        held_out: tuple[Split, ...] = ("valid", "test")
        counts = num_repeated(found.get("train", []), *(found.get(one, []) for one in held_out))
        for split, repeated in zip(held_out, counts, strict=True):
            if repeated:
                logger.warning(
                    "%s of %s rows of %s are among those to train on too: their figures flatter the model",
                    f"{repeated:,}",
                    f"{len(found[split]):,}",
                    split,
                )
        return {split: found.get(split, []) for split in SPLITS}


def _paths(arguments: TrainArguments, *, has_directory: bool) -> dict[Split, Path]:
    paths: dict[Split, Path] = {}
    if arguments.train_file is not None:
        paths["train"] = arguments.train_file
    elif has_directory and arguments.dataset_dir is not None:
        paths = find_splits(arguments.dataset_dir)
    if arguments.validation_file is not None:
        paths["valid"] = arguments.validation_file
    if arguments.test_file is not None:
        paths["test"] = arguments.test_file
    return paths
