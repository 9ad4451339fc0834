"""Batches for Lightning, of any data: loaders that begin anywhere, and the data module that makes them."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytorch_lightning as pl
import torch

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.batches import BatchPlan, SortedBatches, limited
from full_stack_transformer.datasets.collators import Batch, Collator
from full_stack_transformer.datasets.replay import Replay
from full_stack_transformer.tasks.task import Task

# Batches of a training without --max_epochs: a thousand a second for thirty years.
UNLIMITED_NUM_BATCHES = 1 << 40


class BatchLoader:
    """The training batches of one rank, of all epochs in a chain.

    Batch number n is a function of n alone, so the whole state is how many were handed out, and loading
    goes on in the middle of an epoch at once. `num_tokens` of a batch are those of its samples, replayed ones
    too. `num_targets` of a batch is a scalar, float32: the targets of its whole optimizer step, over all
    batches of the step and all ranks; `num_replay_targets` are those of them that are replayed, if any. Steps
    of several batches go on over the end of an epoch; the last step of a training has the batches that are
    left. A rank without a sample where others have some gets a batch with `is_filler`, which does not count.

    Args:
        plan: which samples form a batch.
        collate: makes tensors of them.
        num_batches: of all epochs; less than a multiple of an epoch is fine.
        num_batches_per_epoch: the first so many of each epoch are used; all if None.
        accumulate_grad_batches: batches of an optimizer step.
        replay: what is read beside each batch.
    """

    def __init__(
        self,
        plan: BatchPlan,
        collate: Collator,
        *,
        num_batches: int,
        num_batches_per_epoch: int | None = None,
        accumulate_grad_batches: int = 1,
        replay: Replay | None = None,
    ) -> None:
        self._replay = replay
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
        step, counts = -1, {}
        while self._num_handed_out < self._num_batches:
            number = self._num_handed_out
            if number // self._accumulate_grad_batches != step:
                step = number // self._accumulate_grad_batches
                counts = self._counts(step)
            spans = self._plan.batch(*divmod(number, self._num_batches_per_epoch))
            batch, num_tokens = self._collate(spans), int(spans.lengths.sum())
            if self._replay is not None:
                replayed, num_replayed = self._replay.batch(number)
                batch, num_tokens = {**batch, **replayed}, num_tokens + num_replayed
            if spans.is_filler:
                batch = {**batch, "is_filler": torch.tensor(True)}
                num_tokens -= int(spans.lengths.sum())
            self._num_handed_out = number + 1
            yield {**batch, **counts, "num_tokens": torch.tensor(num_tokens)}

    def _counts(self, step: int) -> Batch:
        """The targets of an optimizer step, over all its batches and all ranks."""
        first = step * self._accumulate_grad_batches
        numbers = range(first, min(first + self._accumulate_grad_batches, self._num_batches))
        num_own = sum(
            self._plan.num_targets(*divmod(number, self._num_batches_per_epoch))
            for number in numbers
        )
        num_replayed = sum(map(self._replay.num_targets, numbers)) if self._replay else 0
        # A step without targets must not become a division by zero.
        counts = {"num_targets": torch.tensor(float(max(1, num_own + num_replayed)))}
        if num_replayed:
            counts["num_replay_targets"] = torch.tensor(float(num_replayed))
        return counts


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
    """What one training learns from: what a batch is made of is a plan, how it becomes tensors a collator.

    Lightning sees the whole training as one epoch: see `BatchLoader`. Loads in the training process: a
    worker's copies between processes cost 10 to 100 times what they save.

    Args:
        arguments: the options of the training.

    Attributes:
        task: what is learned; known after `begin`.
        description: of the data; a training that is resumed compares it.
        tokenizer_directory: files for the model directory; known after `begin`.
    """

    task: Task
    description: dict[str, Any]
    tokenizer_directory: Path

    def __init__(self, arguments: TrainArguments) -> None:
        super().__init__()
        self.arguments = arguments

    def with_arguments(self, arguments: TrainArguments) -> Self:
        """The same data in other batches."""
        other = copy.copy(self)
        other.arguments = arguments
        return other

    @property
    @abstractmethod
    def data_place(self) -> str:
        """Where the data are, as it was typed."""

    @property
    @abstractmethod
    def amount(self) -> str:
        """What is learned from, for the log."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Tokens of context that a new model is made for."""

    @abstractmethod
    def begin(self, place: Callable[[], Path]) -> None:
        """Make the tokenizer and the task.

        Args:
            place: a directory for the files of the tokenizer; called where some are written.
        """

    @property
    @abstractmethod
    def num_context_tokens(self) -> int:
        """Tokens that attention spans: those of a mean sample, or of a row that is cut from all samples."""

    @property
    def num_row_tokens(self) -> int:
        """Tokens of a row of a batch, about."""
        return self.num_context_tokens

    @abstractmethod
    def train_plan(self, rank: int, world_size: int) -> BatchPlan:
        """Which training samples form a batch of this rank.

        Raises:
            UsageError: there is none.
        """

    @abstractmethod
    def train_collator(self) -> Collator:
        """What makes tensors of a training batch."""

    def replay(self, rank: int, world_size: int) -> Replay | None:
        """What this rank reads beside its training batches; nothing by default."""
        return None

    def remarks(self, world_size: int) -> list[str]:
        """What a person should know of the batches, for the log; nothing by default."""
        return []

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
        return limited(plan.num_batches_per_epoch, self.arguments.limit_train_batches)

    def train_dataloader(self) -> BatchLoader:
        """All epochs, in an order that the seed decides."""
        plan = self.train_plan(*self._rank_and_world_size)
        num_per_epoch = limited(plan.num_batches_per_epoch, self.arguments.limit_train_batches)
        max_epochs = self.arguments.max_epochs
        return BatchLoader(
            plan,
            self.train_collator(),
            num_batches=UNLIMITED_NUM_BATCHES if max_epochs < 0 else max_epochs * num_per_epoch,
            num_batches_per_epoch=num_per_epoch,
            accumulate_grad_batches=self.arguments.accumulate_grad_batches,
            replay=self.replay(*self._rank_and_world_size),
        )

    def val_dataloader(self) -> ValidationLoader:
        """Every validation sample once, or the part of them that the limit leaves."""
        return ValidationLoader(self.valid_plan(*self._rank_and_world_size), self.valid_collator())

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """From pinned memory where there is a GPU: from other memory a copy waits for all work before it."""
        if device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    @property
    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
