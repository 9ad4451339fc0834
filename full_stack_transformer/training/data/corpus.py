"""Batches of the samples of a dataset directory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from full_stack_transformer.arguments.fine_tuning import parsed_replay
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.batches import (
    BatchPlan,
    ConcatenatedSamples,
    LengthBatches,
    PackedBatches,
    Samples,
    SortedBatches,
)
from full_stack_transformer.datasets.collators import Collator, PackedCollator
from full_stack_transformer.datasets.corpus import (
    CORPUS_FILE_NAME,
    DatasetDirectory,
    open_dataset,
    prepare_command,
)
from full_stack_transformer.datasets.replay import Replay, ReplaySource, num_targets_of
from full_stack_transformer.errors import DatasetError, UsageError
from full_stack_transformer.modelling.model_files import check_generates
from full_stack_transformer.modelling.pretrained import open_config
from full_stack_transformer.tasks.task import CorpusTask
from full_stack_transformer.tokenization.document_tokenizer import (
    copy_chat_templates,
    copy_tokenizer_files,
    local_tokenizer,
    open_saved_tokenizer,
)
from full_stack_transformer.training.data.batches import EpochDataModule


class CorpusDataModule(EpochDataModule):
    """Train and validation batches out of memory-mapped corpora.

    Validation has one sample in a row, whatever --batching is, so that losses compare.

    Args:
        arguments: the options of the training.
        dataset: both corpora; rows have its `max_sample_length`.
        task_class: what is learned.

    Raises:
        DatasetError: there are no validation samples.
        UsageError: the task does not know this --batching.
    """

    task: CorpusTask

    def __init__(
        self, arguments: TrainArguments, dataset: DatasetDirectory, task_class: type[CorpusTask]
    ) -> None:
        super().__init__(arguments)
        if len(dataset.valid) == 0:
            raise DatasetError(
                f"{dataset.directory} has no validation samples; prepare it with some"
            )
        if arguments.batching not in task_class.batchings:
            raise UsageError(
                f"--task {task_class.name} knows --batching {', '.join(task_class.batchings)}; found "
                f"{arguments.batching}"
            )
        self.dataset = dataset
        self._replay_datasets = [
            (open_dataset(place, arguments), share)
            for place, share in parsed_replay(arguments.replay)
        ]
        self.description = _described(dataset, self._replay_datasets)
        self._task_class = task_class
        self._row_length = task_class.row_length(dataset, arguments)

    @property
    def data_place(self) -> str:
        """The dataset directory."""
        return self.dataset.data_place

    @property
    def amount(self) -> str:
        """Tokens, and the name of the dataset."""
        num_tokens = self.description["number_of_train_tokens"]
        return f"{num_tokens:,} tokens of {self.description['dataset_name']}"

    @property
    def max_length(self) -> int:
        """Tokens of the longest sample that the dataset may hold."""
        return self._row_length

    def begin(self, place: Callable[[], Path]) -> None:
        """The tokenizer is that of the model to start from, else of the dataset or for the task."""
        cls = self._task_class
        start = self.arguments.model_path
        if start is None or self.arguments.resize_embeddings == "new":
            self.tokenizer_directory = cls.tokenizer_files(self.dataset, place)
        else:
            if cls.generates:
                check_generates(open_config(start).to_dict(), Path(start))
            self.tokenizer_directory = place()
            copy_tokenizer_files(local_tokenizer(start), self.tokenizer_directory)
            if self.dataset.kind != "documents":  # the model learns the one that rendered them
                copy_chat_templates(self.dataset.tokenizer_directory, self.tokenizer_directory)
        tokenizer = cls.open_tokenizer(self.tokenizer_directory)
        self.task = cls(tokenizer, cls.options_class.of(self.arguments))
        if start is not None:
            self.task.model_path = start
        self.task.read_dataset(self.dataset)
        for dataset, _ in self._replay_datasets:
            self._check_replay(dataset)

    def _check_replay(self, dataset: DatasetDirectory) -> None:
        """Refuse what cannot be learned beside this dataset."""
        if dataset.kind != "documents" or not len(dataset.train):
            found = dataset.kind if len(dataset.train) else "no training samples"
            raise DatasetError(
                f"--replay {dataset.directory} holds {found}; what is replayed are documents"
            )
        theirs = open_saved_tokenizer(dataset.tokenizer_directory)
        ours = open_saved_tokenizer(self.tokenizer_directory)
        if theirs.backend.get_vocab() != ours.backend.get_vocab():
            raise DatasetError(
                f"--replay {dataset.directory} was prepared with another tokenizer ({theirs.vocab_size:,} "
                f"tokens) than {self.dataset.directory} ({ours.vocab_size:,} tokens); prepare it for this "
                f"model: {prepare_command(dataset, self._tokenizer_name)}"
            )
        dataset.train.limit_ids(self.task.vocab_size)

    @property
    def _tokenizer_name(self) -> str:
        """What --tokenizer_path takes."""
        start = self.arguments.model_path
        return str(self.dataset.tokenizer_directory) if start is None else start

    @property
    def _replayed(self) -> list[ReplaySource]:
        return [
            ReplaySource(str(dataset.description.get("dataset_name", "")), dataset.train, share)
            for dataset, share in self._replay_datasets
        ]

    @property
    def num_context_tokens(self) -> int:
        """Of a mean sample, or of a row that is cut from all samples."""
        if self.arguments.batching == "concatenated":
            return self._row_length
        num_samples = max(1, self.description["number_of_train_samples"])
        mean = int(self.description["number_of_train_tokens"] / num_samples)
        return min(mean, self._row_length)

    @property
    def num_row_tokens(self) -> int:
        """Packed and concatenated rows are full."""
        return self.num_context_tokens if self.arguments.batching == "length" else self._row_length

    def valid_plan(self, rank: int, world_size: int) -> SortedBatches:
        """Every validation sample, by its length."""
        return SortedBatches(
            self.task.samples(self.dataset.valid),
            batch_size=self.arguments.batch_size,
            limit=self.arguments.limit_val_batches,
            rank=rank,
            world_size=world_size,
        )

    def valid_collator(self) -> Collator:
        """What the task makes of a sample, whatever the seed, so that losses compare."""
        return self.task.collator(self.dataset.valid, seed=0)

    def train_plan(self, rank: int, world_size: int) -> BatchPlan:
        """As --batching says."""
        arguments, corpus, samples = self.arguments, self.dataset.train, self._train_samples
        if len(samples) < world_size:
            raise UsageError(
                f"--batching {arguments.batching} makes {len(samples):,} samples of the "
                f"{corpus.num_tokens:,} training tokens in {self.dataset.directory}, fewer than the "
                f"{world_size} devices; prepare more documents"
            )
        if arguments.batching == "packed":
            return PackedBatches(
                samples,
                batch_size=arguments.batch_size,
                row_length=self._row_length,
                seed=arguments.seed,
                rank=rank,
                world_size=world_size,
            )
        return LengthBatches(
            samples,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            rank=rank,
            world_size=world_size,
        )

    @property
    def _train_samples(self) -> Samples:
        corpus = self.dataset.train
        if self.arguments.batching == "concatenated":
            layout = corpus.layout_of_pieces(self._row_length)
            return ConcatenatedSamples(corpus.num_tokens, self._row_length, layout)
        return self.task.samples(corpus)

    def replay(self, rank: int, world_size: int) -> Replay | None:
        """The documents of --replay; packed where --batching is."""
        if not self._replayed:
            return None
        longest = max(self._row_length, self.longest_replayed)
        num_batches = self.train_plan(rank, world_size).num_batches_per_epoch
        return Replay(
            self._replayed,
            targets_per_batch=num_targets_of(self._train_samples) / num_batches,
            pad_id=self.description["special_token_ids"]["pad"],
            seed=self.arguments.seed,
            row_length=longest if self.arguments.batching == "packed" else None,
            rank=rank,
            world_size=world_size,
        )

    def remarks(self, world_size: int) -> list[str]:
        """What is replayed."""
        replay = self.replay(0, world_size)
        return replay.words() if replay is not None else []

    @property
    def longest_replayed(self) -> int:
        """Tokens that a replayed sample may have; 0 without any."""
        lengths = (one.description["max_sample_length"] for one, _ in self._replay_datasets)
        return max(lengths, default=0)

    def train_collator(self) -> Collator:
        """As --batching says."""
        if self.arguments.batching == "packed":
            pad_id = self.description["special_token_ids"]["pad"]
            corpus = self.task.learned(self.dataset.train)
            return PackedCollator(corpus, pad_id=pad_id, row_length=self._row_length)
        return self.task.collator(self.dataset.train, seed=self.arguments.seed)


def _described(
    dataset: DatasetDirectory, replayed: Sequence[tuple[DatasetDirectory, float]]
) -> dict[str, Any]:
    """The dataset, and what a resumed training must find of the replayed ones."""
    if not replayed:
        return dataset.description
    described = []
    for one, share in replayed:
        files = one.description.get("output_files", {})
        stem = f"train/{CORPUS_FILE_NAME.partition('.')[0]}"
        corpora = [facts for name, facts in files.items() if name.startswith(stem)]
        described.append(
            {
                "dataset_name": one.description.get("dataset_name"),
                "share": share,
                "corpus": corpora if "shards" in one.description else next(iter(corpora), None),
            }
        )
    return {**dataset.description, "replay": described}
