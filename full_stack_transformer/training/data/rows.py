"""Labelled rows as batches: the data module that a data set of one's own derives from.

How to bring a data set of your own: derive from `BaseDataModule`, override `all_rows` (or `rows` where the
data set has its own splits, `prepare` to download or make it, `augment` to change training rows), and name
the class: `fst run_experiment --data_class my_module.MyData`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.batches import BatchSpans, LengthBatches, SortedBatches
from full_stack_transformer.datasets.collators import Batch, Collator
from full_stack_transformer.datasets.order import ShardLayout, make_key
from full_stack_transformer.errors import RowError, UsageError
from full_stack_transformer.rows.fields import (
    PLACE,
    BadRows,
    Row,
    has_minus_one,
    labelled_rows,
    named_rows,
)
from full_stack_transformer.rows.files import chosen_columns, read_rows
from full_stack_transformer.rows.splits import (
    SPLITS,
    Split,
    describe_rows,
    find_splits,
    hub_rows,
    num_repeated,
    split_by_hash,
)
from full_stack_transformer.tasks.catalogue import DEFAULT_ROW_TASK
from full_stack_transformer.tasks.opening import row_task_class
from full_stack_transformer.tasks.task import Feature, Prediction, RowTask
from full_stack_transformer.tokenization.transformers_tokenizer import (
    copy_tokenizer,
    open_tokenizer,
    train_tokenizer,
)
from full_stack_transformer.training.data.batches import EpochDataModule, ValidationLoader

logger = logging.getLogger(__name__)

# Without splits of its own a data set is cut into these parts.
_PARTS = {"train": 0.8, "valid": 0.1, "test": 0.1}
# Fields of a row that hold no text to train a tokenizer on.
_NO_TEXTS = ("label", "labels", "id", "group", PLACE)


class FeatureSamples:
    """Features as samples: they begin at their own number.

    Args:
        lengths: (features,) tokens of each.
        num_targets: (features,) what each weighs.
    """

    layout: ShardLayout | None = None

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
        task_name: what the rows are for: a task of the catalogue, or my_module.MyTask.
        task_class: the same as a class.
        task: known once `begin` or `open` was called.
    """

    task_name: str = DEFAULT_ROW_TASK
    task: RowTask

    @cached_property
    def task_class(self) -> type[RowTask]:
        """What the rows are for."""
        return row_task_class(self.task_name)

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

    @property
    def data_place(self) -> str:
        """The directory, the training file or the class."""
        return str(self.arguments.dataset_dir or self.arguments.train_file or self.data_name)

    @property
    def amount(self) -> str:
        """Rows, and where they are from."""
        return f"{len(self.named_rows('train')):,} rows of {self.data_name}"

    @property
    def max_length(self) -> int:
        """Tokens of a row, at most."""
        return self.arguments.max_length

    @property
    def num_context_tokens(self) -> int:
        """Of a mean feature."""
        features = self.features("train")
        return max(1, sum(map(self.task.length, features)) // len(features))

    def read(self) -> None:
        """Prepare and read the rows to learn from and to validate on.

        Raises:
            RowError: there are none.
        """
        self.prepare()
        counts = {split: len(self.named_rows(split)) for split in SPLITS[:2]}
        if not counts["train"]:
            raise RowError(f"{self.data_name} has no rows to learn from")
        if not counts["valid"]:
            raise RowError(
                f"{self.data_name} has no validation rows; pass --validation_file, or a greater "
                "--validation_fraction"
            )
        self.description = {
            "task": self.task_class.name,
            **self.describe(),
            **{f"number_of_{split}_rows": count for split, count in counts.items()},
        }

    def begin(self, place: Callable[[], Path]) -> None:
        """Copy the tokenizer that the options name, or train one on the rows; learn the labels."""
        arguments, directory = self.arguments, place()
        self.tokenizer_directory = directory
        origin = arguments.tokenizer_path or arguments.model_path
        if not (directory / "tokenizer_config.json").is_file():
            if origin is not None:
                copy_tokenizer(origin, directory, max_length=arguments.max_length)
            else:
                train_tokenizer(
                    _texts_in(self.named_rows("train")),
                    directory,
                    vocab_size=arguments.vocab_size,
                    max_length=arguments.max_length,
                )
        cls = self.task_class
        options = cls.options_class.of(arguments)
        self.open(cls.learn(self.named_rows("train"), open_tokenizer(directory), options))
        self.task.log_labels(self.named_rows("train"), self.data_name)
        for split in SPLITS[1:]:
            self.task.log_unknown_labels(self.named_rows(split), f"the {split} rows")

    def open(self, task: RowTask) -> None:
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

    def config(self) -> dict[str, Any]:
        """`input_dims`, `output_dims` and `mapping`, for a model class that wants to know them."""
        names = ("input_dims", "output_dims", "mapping")
        return {name: getattr(self, name) for name in names}

    def features(self, split: Split) -> list[Feature]:
        """The features of a split; made once."""
        if split not in self._features:
            rows, task = self.named_rows(split), self.task
            make = task.features if split == "test" else task.labelled_features
            self._features[split] = make(rows)
        return self._features[split]

    def predictions_of(self, scores: dict[int, Tensor]) -> tuple[list[Row], list[Prediction]]:
        """Validation rows all of whose features have scores, and what those predict.

        Args:
            scores: by the index of the feature.
        """
        features, all_rows = self.features("valid"), self.named_rows("valid")
        left_out = {f["row"] for index, f in enumerate(features) if index not in scores}
        kept = [index for index in range(len(all_rows)) if index not in left_out]
        new_index = {index: position for position, index in enumerate(kept)}
        chosen = [n for n, feature in enumerate(features) if feature["row"] in new_index]
        rows = [all_rows[index] for index in kept]
        if not rows:
            return [], []
        predictions = self.task.predictions(
            rows,
            [{**features[n], "row": new_index[features[n]["row"]]} for n in chosen],
            [scores[n] for n in chosen],
        )
        return rows, predictions

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

    def weights(self, split: Split, numbers: Sequence[int]) -> Tensor:
        """(features,) targets of each of these features."""
        features = np.array(numbers, dtype=np.int64)
        return torch.from_numpy(self._samples(split).num_targets(features, features))

    def _samples(self, split: Split) -> FeatureSamples:
        if split not in self._made_samples:
            features = self.features(split)
            self._made_samples[split] = FeatureSamples(
                [self.task.length(feature) for feature in features],
                [self.task.num_targets(feature) for feature in features],
            )
        return self._made_samples[split]

    @cached_property
    def _features(self) -> dict[Split, list[Feature]]:
        return {}

    @cached_property
    def _made_samples(self) -> dict[Split, FeatureSamples]:
        return {}

    @cached_property
    def _split_rows(self) -> dict[str, list[Row]]:
        parts = list(_PARTS.values())
        lists = split_by_hash(self.all_rows(), parts, texts=self.task_class.texts)
        return dict(zip(_PARTS, lists, strict=True))

    @cached_property
    def _named_rows(self) -> dict[Split, list[Row]]:
        train = self._named("train")
        is_label = has_minus_one(train)
        return {"train": train, **{split: self._named(split, is_label) for split in SPLITS[1:]}}

    def _named(self, split: Split, minus_one_is_label: bool | None = None) -> list[Row]:
        cls = self.task_class
        bad = BadRows(f"the {split} rows", self.arguments.on_bad_row)
        rows = named_rows(
            self.rows(split), cls.named, bad=bad, minus_one_is_label=minus_one_is_label
        )
        if split != "test" and bad.action == "skip":
            rows = labelled_rows(rows, cls.has_label, bad)
        bad.log()
        return rows


class RowCollator:
    """Features of a data module -> tensors, with `numbers` (B,) of the features and `weights` (B,), what each
    weighs in the mean of a validation's loss; both empty for a filler.

    Args:
        data: where the features are.
        split: which of them.
        augments: make features anew of rows as `augment` changes them, by seed, epoch and row.
    """

    def __init__(self, data: BaseDataModule, split: Split, *, augments: bool = False) -> None:
        self._data = data
        self._split = split
        self._augments = augments

    def __call__(self, spans: BatchSpans) -> Batch:
        """What the task's `collate` makes, `numbers` and `weights`."""
        data = self._data
        features = [data.features(self._split)[number] for number in spans.starts]
        if self._augments:
            features = [self._augmented(number, spans.epoch) for number in spans.starts]
        numbers = [] if spans.is_filler else spans.starts.tolist()
        batch = data.task.collate(features)
        return {
            **batch,
            "numbers": torch.tensor(numbers, dtype=torch.int64),
            "weights": data.weights(self._split, numbers),
        }

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


def _texts_in(value: Any) -> Iterator[str]:
    """All strings of rows that are text, and not names of labels or places."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in _NO_TEXTS:
                yield from _texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_in(inner)


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
        return described | self.arguments.how_to_read()

    def rows(self, split: Split) -> list[Row]:
        """Those of the split's file; without one for validation a part of the training rows."""
        return self._rows_of_splits[split]

    @cached_property
    def _rows_of_splits(self) -> dict[Split, list[Row]]:
        arguments, cls = self.arguments, self.task_class
        found: dict[Split, list[Row]] = {
            split: list(chosen_columns(rows, arguments, cls.columns, BadRows(split)))
            for split, rows in (self._hub or {}).items()
        }
        for split, path in self._paths.items():
            rows = read_rows(path, arguments, cls.columns, has_words=cls.reads_words)
            found[split] = list(rows)
        part = arguments.validation_fraction
        if "valid" not in found and part > 0:
            parts = [1 - part, part]
            found["train"], found["valid"] = split_by_hash(found["train"], parts, texts=cls.texts)
        self._warn_of_repeated(found)
        return {split: found.get(split, []) for split in SPLITS}

    def _warn_of_repeated(self, found: Mapping[Split, list[Row]]) -> None:
        held_out: tuple[Split, ...] = ("valid", "test")
        lists = [found.get(split, []) for split in ("train", *held_out)]
        counts = num_repeated(*lists, texts=self.task_class.texts)
        for split, repeated in zip(held_out, counts, strict=True):
            if repeated:
                logger.warning(
                    "%s of %s rows of %s are among those to train on too: their metrics flatter the model",
                    f"{repeated:,}",
                    f"{len(found[split]):,}",
                    split,
                )


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
