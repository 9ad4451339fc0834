"""The loader hands out each batch of each epoch once, wherever it goes on, with its step's targets."""

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.errors import UsageError
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL
from full_stack_transformer.training.data.batches import (
    UNLIMITED_NUM_BATCHES,
    BatchLoader,
)
from full_stack_transformer.training.data.corpus import CorpusDataModule
from tests.datasets.corpora import PAD_ID, write_corpus
from tests.training.small_training import causal_data

ROW_LENGTH = 32
BATCHINGS = ["length", "packed", "concatenated"]

each_batching = pytest.mark.parametrize("batching", BATCHINGS)


def _dataset(directory: Path, *, num_samples: int) -> DatasetDirectory:
    random = np.random.default_rng(0)
    description: dict[str, Any] = {
        "max_sample_length": ROW_LENGTH,
        "special_token_ids": {"pad": PAD_ID},
    }
    train = write_corpus(directory / "train", random.integers(2, ROW_LENGTH + 1, num_samples))
    valid = write_corpus(directory / "valid", random.integers(2, ROW_LENGTH + 1, 101))
    return DatasetDirectory(directory, description, train, valid)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> DatasetDirectory:
    """1,003 training samples."""
    return _dataset(tmp_path_factory.mktemp("small"), num_samples=1003)


def _module(dataset: DatasetDirectory, **options: Any) -> CorpusDataModule:
    arguments = TrainArguments(
        dataset_dir=dataset.directory,
        **{"batch_size": 4, "seed": 5, "max_steps": 10**9, **options},
    )
    return causal_data(dataset, arguments)


def _data(
    dataset: DatasetDirectory, *, rank: int = 0, world_size: int = 1, **options: Any
) -> CorpusDataModule:
    data = _module(dataset, **options)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    return data


def _content(batch: Batch) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def _num_targets(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED_LABEL).sum())


@each_batching
def test_loading_goes_on_where_it_was(small: DatasetDirectory, batching: str) -> None:
    options: dict[str, Any] = {"batching": batching, "max_epochs": 3, "accumulate_grad_batches": 3}
    uninterrupted = _data(small, **options).train_dataloader()
    batches = [_content(batch) for batch in uninterrupted]
    assert len(batches) == len(uninterrupted)
    assert uninterrupted.state_dict() == {"num_batches": len(batches)}
    assert list(uninterrupted) == []
    positions = np.random.default_rng(0).integers(1, len(batches), 10).tolist()
    for position in [0, *positions, len(batches) - 1]:
        resumed = _data(small, **options).train_dataloader()
        resumed.load_state_dict({"num_batches": position})
        iterator = iter(resumed)
        for number in range(position, min(position + 3, len(batches))):
            assert _content(next(iterator)) == batches[number]
            assert resumed.state_dict() == {"num_batches": number + 1}
        assert len(resumed) == len(batches)


@each_batching
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_processes_goes_on_with_the_samples_that_are_left(
    small: DatasetDirectory, batching: str, world_size: int
) -> None:
    """The same batches of all of them together, after two have handed out the first five."""
    alone = [_samples_in(batch) for batch in _loader(small, batching, 0, 1)]
    loaders = [_loader(small, batching, rank, world_size) for rank in range(world_size)]
    for loader in loaders:
        loader.load_state_dict({"num_batches": 5})
    left = [sum(map(_samples_in, batches), Counter()) for batches in zip(*loaders, strict=True)]
    two = zip(*(_loader(small, batching, rank, 2) for rank in range(2)), strict=True)
    before = [sum(map(_samples_in, batches), Counter()) for batches in itertools.islice(two, 5)]
    assert before + left == alone


def _loader(dataset: DatasetDirectory, batching: str, rank: int, world_size: int) -> BatchLoader:
    data = _data(
        dataset, rank=rank, world_size=world_size, batching=batching, batch_size=8 // world_size
    )
    return data.train_dataloader()


def _samples_in(batch: Batch) -> Counter[tuple[int, ...]]:
    """The learned tokens of each row that has some."""
    rows = [tuple(one for one in row if one != IGNORED_LABEL) for row in batch["labels"].tolist()]
    return Counter() if "is_filler" in batch else Counter(row for row in rows if row)


@each_batching
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 3, 8])
def test_a_batch_knows_the_targets_of_its_step(
    small: DatasetDirectory, batching: str, world_size: int, accumulate: int
) -> None:
    """Over all ranks, over the end of an epoch, and in the last step, which may be smaller."""
    by_rank = [
        list(
            _data(
                small,
                rank=rank,
                world_size=world_size,
                batching=batching,
                max_epochs=2,
                accumulate_grad_batches=accumulate,
                limit_train_batches=37,
            ).train_dataloader()
        )
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in by_rank} == {2 * 37}
    for first in range(0, 2 * 37, accumulate):
        step = [batch for batches in by_rank for batch in batches[first : first + accumulate]]
        expected = float(sum(map(_num_targets, step)))
        assert {float(batch["num_targets"]) for batch in step} == {expected}
        assert all(batch["num_targets"].dtype == torch.float32 for batch in step)
        assert all(batch["num_targets"].ndim == 0 for batch in step)


@each_batching
def test_epochs_follow_one_another(small: DatasetDirectory, batching: str) -> None:
    """Two epochs of one loader hold twice what one holds, in another order."""
    data = _data(small, batching=batching, max_epochs=2)
    batches = [_content(batch)["input_ids"] for batch in data.train_dataloader()]
    num_per_epoch = data.num_batches_per_epoch
    assert len(batches) == 2 * num_per_epoch
    epochs = [batches[:num_per_epoch], batches[num_per_epoch:]]
    assert epochs[0] != epochs[1]
    tokens = [
        sorted(token for batch in epoch for row in batch for token in row if token != PAD_ID)
        for epoch in epochs
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 251), (0.1, 25), (0.0001, 1), (7.0, 7)])
def test_a_limit_shortens_each_epoch(small: DatasetDirectory, limit: float, expected: int) -> None:
    data = _data(small, limit_train_batches=limit, max_epochs=3)
    assert data.num_batches_per_epoch == expected
    loader = data.train_dataloader()
    assert len(loader) == 3 * expected
    if expected == 7:
        whole = _data(small, max_epochs=3).train_dataloader()
        batches = [_content(batch)["input_ids"] for batch in whole]
        firsts = [batches[epoch * 251 + position] for epoch in range(3) for position in range(7)]
        assert [_content(batch)["input_ids"] for batch in loader] == firsts


def test_without_a_limit_of_epochs_there_is_no_end(small: DatasetDirectory) -> None:
    loader = _data(small, max_epochs=-1).train_dataloader()
    assert len(loader) == UNLIMITED_NUM_BATCHES
    loader.load_state_dict({"num_batches": 10**9})
    next(iter(loader))
    assert loader.state_dict() == {"num_batches": 10**9 + 1}


def test_the_number_of_batches_is_known_before_there_is_a_trainer(
    small: DatasetDirectory,
) -> None:
    data = _module(small, seed=0)
    assert data.count_batches_per_epoch(2) == _data(small, world_size=2).num_batches_per_epoch
    assert data.num_batches_per_epoch == 251


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_validation_sees_every_sample_whatever_the_batching(
    small: DatasetDirectory, world_size: int
) -> None:
    loaders = [
        _data(small, batching="packed", rank=rank, world_size=world_size).val_dataloader()
        for rank in range(world_size)
    ]
    for _ in range(2):  # from the first one each time
        batches = [list(loader) for loader in loaders]
        assert {len(part) for part in batches} == {len(loaders[0])}
        everything = [batch for part in batches for batch in part]
        num_targets = sum(map(_num_targets, everything))
        assert num_targets == small.valid.num_tokens - len(small.valid)
        assert num_targets == sum(float(batch["num_targets"]) for batch in batches[0])
        assert not any("document_ids" in batch for batch in everything)


def test_a_part_of_the_validation_is_enough(small: DatasetDirectory) -> None:
    loader = _data(small, limit_val_batches=5).val_dataloader()
    assert len(list(loader)) == len(loader) == 5


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, num_samples=1)
    with pytest.raises(UsageError, match="--batching length makes 1 samples of the"):
        _data(dataset, world_size=2).train_dataloader()
    with pytest.raises(UsageError, match="--batching concatenated makes 0 samples"):
        assert _data(dataset, batching="concatenated").num_batches_per_epoch


class _Recorder(pl.LightningModule):
    """Trains one number, remembers what it was given, and saves a checkpoint on the way."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.checkpoint = checkpoint
        self.seen: list[Any] = []

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        self.seen.append(_content(batch))
        return self.weight * batch["num_targets"]

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        if batch_index == 70 and not self.checkpoint.exists():
            self.trainer.save_checkpoint(self.checkpoint)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")
@each_batching
def test_lightning_goes_on_in_the_middle_of_its_one_epoch(tmp_path: Path, batching: str) -> None:
    dataset = _dataset(tmp_path, num_samples=203)
    seen = []
    for ckpt_path in (None, tmp_path / "middle.ckpt"):
        data = _module(dataset, batching=batching, max_epochs=3)
        recorder = _Recorder(tmp_path / "middle.ckpt")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        seen.append(recorder.seen)
    whole, rest = seen
    assert len(whole) == 3 * data.num_batches_per_epoch
    assert whole == [_content(batch) for batch in data.train_dataloader()]
    assert rest == whole[71:]
