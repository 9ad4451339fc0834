"""Batches of the samples of a dataset directory."""

from collections.abc import Callable
from pathlib import Path

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
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.errors import DatasetError, UsageError
from full_stack_transformer.modelling.model_files import check_generates
from full_stack_transformer.modelling.pretrained import open_config
from full_stack_transformer.tasks.task import CorpusTask
from full_stack_transformer.tokenization.document_tokenizer import (
    copy_chat_templates,
    copy_tokenizer_files,
    local_tokenizer,
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
        self.description = dataset.description
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
        arguments, corpus = self.arguments, self.dataset.train
        samples: Samples = (
            ConcatenatedSamples(corpus.num_tokens, self._row_length)
            if arguments.batching == "concatenated"
            else self.task.samples(corpus)
        )
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

    def train_collator(self) -> Collator:
        """As --batching says."""
        if self.arguments.batching == "packed":
            pad_id = self.description["special_token_ids"]["pad"]
            corpus = self.task.learned(self.dataset.train)
            return PackedCollator(corpus, pad_id=pad_id, row_length=self._row_length)
        return self.task.collator(self.dataset.train, seed=self.arguments.seed)
