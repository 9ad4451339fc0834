"""Batches for Lightning: those of any data, and those of a dataset directory."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from full_stack_transformer.datasets.batches import (
    BatchPlan,
    BatchSpans,
    ConcatenatedSamples,
    LengthBatches,
    PackedBatches,
    Samples,
    SortedBatches,
    limited,
)
from full_stack_transformer.datasets.collators import PackedCollator, PaddedCollator
from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.datasets.description import DatasetDirectory
from full_stack_transformer.datasets.masking import MaskedCollator, MaskedSamples, Masking
from full_stack_transformer.errors import UsageError

Batch = dict[str, Tensor]
Collator = Callable[[BatchSpans], Batch]

# Batches of a training without --max_epochs: a thousand a second for thirty years.
UNLIMITED_NUM_BATCHES = 1 << 40


class BatchLoader:
    """The training batches of one rank, of all epochs in a chain.

    Batch number n is a function of n alone, so the whole state is how many were handed out, and loading
    goes on in the middle of an epoch at once. `num_targets` of a batch is a scalar, float32: the targets of
    its whole optimizer step, over all batches of the step and all ranks. Steps of several batches go on
    over the end of an epoch; the last step of a training has the batches that are left.

    Args:
        plan: which samples form a batch.
        collate: makes tensors of them.
        num_batches: of all epochs; less than a multiple of an epoch is fine.
        num_batches_per_epoch: the first so many of each epoch are used; all if None.
        accumulate_grad_batches: batches of an optimizer step.
    """

    def __init__(
        self,
        plan: BatchPlan,
        collate: Collator,
        *,
        num_batches: int,
        num_batches_per_epoch: int | None = None,
        accumulate_grad_batches: int = 1,
    ) -> None:
        self._plan = plan
        self._collate = collate
        self._num_batches = num_batches
        self._num_batches_per_epoch = num_batches_per_epoch or plan.num_batches_per_epoch
        self._accumulate_grad_batches = accumulate_grad_batches
        self._num_handed_out = 0

    def __len__(self) -> int:
        """Batches of the whole training, those that were handed out before too."""
        return self._num_batches

    def state_dict(self) -> dict[str, int]:
        """How many batches were handed out."""
        return {"num_batches": self._num_handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration begins after so many batches."""
        self._num_handed_out = state["num_batches"]

    def __iter__(self) -> Iterator[Batch]:
        step, num_targets = -1, torch.zeros(())
        while self._num_handed_out < self._num_batches:
            number = self._num_handed_out
            if number // self._accumulate_grad_batches != step:
                step = number // self._accumulate_grad_batches
                # A step without targets must not become a division by zero.
                num_targets = torch.tensor(float(max(1, self._num_targets(step))))
            batch = self._collate(self._plan.batch(*divmod(number, self._num_batches_per_epoch)))
            self._num_handed_out = number + 1
            yield {**batch, "num_targets": num_targets}

    def _num_targets(self, step: int) -> int:
        first = step * self._accumulate_grad_batches
        end = min(first + self._accumulate_grad_batches, self._num_batches)
        return sum(
            self._plan.num_targets(*divmod(number, self._num_batches_per_epoch))
            for number in range(first, end)
        )


class ValidationLoader:
    """The validation batches of one rank, from the first one at each iteration.

    `num_targets` of a batch are those of all ranks.
    """

    def __init__(self, plan: SortedBatches, collate: Collator) -> None:
        self._plan = plan
        self._collate = collate

    def __len__(self) -> int:
        return self._plan.num_batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        for position in range(len(self)):
            num_targets = torch.tensor(float(max(1, self._plan.num_targets(0, position))))
            yield {**self._collate(self._plan.batch(0, position)), "num_targets": num_targets}


class EpochDataModule(pl.LightningDataModule, ABC):
    """Batches of any data: what a batch is made of is a plan, how it becomes tensors a collator.

    Lightning sees the whole training as one epoch: see `BatchLoader`. Loads in the training process: a
    worker's copies between processes cost 10 to 100 times what they save.

    Args:
        accumulate_grad_batches: batches of an optimizer step.
        max_epochs: -1 for no limit.
        limit_train_batches: use so many batches (above 1) or this part of them in each epoch, the first
            ones, which are others in each epoch.
    """

    def __init__(
        self,
        *,
        accumulate_grad_batches: int = 1,
        max_epochs: int = 1,
        limit_train_batches: float = 1.0,
    ) -> None:
        super().__init__()
        self._accumulate_grad_batches = accumulate_grad_batches
        self._max_epochs = max_epochs
        self._limit_train_batches = limit_train_batches

    @abstractmethod
    def train_plan(self, rank: int, world_size: int) -> BatchPlan:
        """Which training samples form a batch of this rank.

        Raises:
            UsageError: there is none.
        """

    @abstractmethod
    def train_collator(self) -> Collator:
        """What makes tensors of a training batch."""

    @abstractmethod
    def valid_plan(self, rank: int, world_size: int) -> SortedBatches:
        """Which validation samples form a batch of this rank."""

    @abstractmethod
    def valid_collator(self) -> Collator:
        """What makes tensors of a validation batch."""

    @property
    def num_batches_per_epoch(self) -> int:
        """Training batches of an epoch, the same on every rank; those that the limit leaves."""
        return self.count_batches_per_epoch(self._rank_and_world_size[1])

    def count_batches_per_epoch(self, world_size: int) -> int:
        """`num_batches_per_epoch` on so many ranks: to be had before there is a trainer.

        Raises:
            UsageError: there is not one.
        """
        plan = self.train_plan(0, world_size)
        return limited(plan.num_batches_per_epoch, self._limit_train_batches)

    def train_dataloader(self) -> BatchLoader:
        """All epochs, in an order that the seed decides."""
        plan = self.train_plan(*self._rank_and_world_size)
        num_per_epoch = limited(plan.num_batches_per_epoch, self._limit_train_batches)
        is_unlimited = self._max_epochs < 0
        return BatchLoader(
            plan,
            self.train_collator(),
            num_batches=UNLIMITED_NUM_BATCHES if is_unlimited else self._max_epochs * num_per_epoch,
            num_batches_per_epoch=num_per_epoch,
            accumulate_grad_batches=self._accumulate_grad_batches,
        )

    def val_dataloader(self) -> ValidationLoader:
        """Every validation sample once, or the part of them that the limit leaves."""
        return ValidationLoader(self.valid_plan(*self._rank_and_world_size), self.valid_collator())

    @property
    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class DatasetDataModule(EpochDataModule):
    """Train and validation batches out of memory-mapped corpora.

    Args:
        dataset: both corpora; rows have its `max_sample_length`.
        batch_size: samples or rows in a batch of one rank.
        seed: decides the order together with the epoch.
        batching: of training; validation has one sample in a row whatever it is, so that losses compare.
        masking: hide tokens to be guessed, for a masked language model; --batching length alone.
        limit_val_batches: use so many batches (above 1) or this part of them in a validation, spread
            evenly over all lengths.
        options: those of `EpochDataModule`.
    """

    def __init__(
        self,
        dataset: DatasetDirectory,
        *,
        batch_size: int,
        seed: int,
        batching: Literal["length", "packed", "concatenated"] = "length",
        masking: Masking | None = None,
        limit_val_batches: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._batching = batching
        self._masking = masking
        self._limit_val_batches = limit_val_batches
        self._row_length: int = dataset.description["max_sample_length"]
        self._pad_id: int = dataset.description["special_token_ids"]["pad"]

    def valid_plan(self, rank: int, world_size: int) -> SortedBatches:
        """Every validation sample, by its length."""
        return SortedBatches(
            self._samples(self._dataset.valid),
            batch_size=self._batch_size,
            limit=self._limit_val_batches,
            rank=rank,
            world_size=world_size,
        )

    def valid_collator(self) -> Collator:
        """A sample a row; the same tokens are hidden whatever the seed, so that losses compare."""
        return self._padded(self._dataset.valid, seed=0)

    def train_plan(self, rank: int, world_size: int) -> BatchPlan:
        """As `batching` says."""
        corpus = self._dataset.train
        samples: Samples = (
            ConcatenatedSamples(corpus.num_tokens, self._row_length)
            if self._batching == "concatenated"
            else self._samples(corpus)
        )
        if len(samples) < world_size:
            raise UsageError(
                f"--batching {self._batching} makes {len(samples):,} samples of the {corpus.num_tokens:,} "
                f"training tokens in {self._dataset.directory}, fewer than the {world_size} devices; "
                "prepare more documents"
            )
        if self._batching == "packed":
            return PackedBatches(
                samples,
                batch_size=self._batch_size,
                row_length=self._row_length,
                seed=self._seed,
                rank=rank,
                world_size=world_size,
            )
        return LengthBatches(
            samples,
            batch_size=self._batch_size,
            seed=self._seed,
            rank=rank,
            world_size=world_size,
        )

    def train_collator(self) -> Collator:
        """As `batching` and `masking` say."""
        corpus = self._dataset.train
        if self._batching == "packed":
            return PackedCollator(corpus, pad_id=self._pad_id, row_length=self._row_length)
        return self._padded(corpus, seed=self._seed)

    def _samples(self, corpus: Corpus) -> Samples:
        return corpus if self._masking is None else MaskedSamples(corpus, self._masking)

    def _padded(self, corpus: Corpus, *, seed: int) -> Collator:
        if self._masking is not None:
            masking = dataclasses.replace(self._masking, seed=seed)
            return MaskedCollator(corpus, masking, pad_id=self._pad_id)
        return PaddedCollator(corpus, pad_id=self._pad_id)
