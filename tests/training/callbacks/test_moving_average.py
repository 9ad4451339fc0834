"""The average of the weights is the formula, is what is validated, and survives a resume bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor

from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.errors import UsageError
from full_stack_transformer.training.callbacks.moving_average import AveragedWeights
from tests.training.small_training import SmallTraining

Weights = dict[str, Tensor]


class _Watch(pl.Callback):
    """Copies of the weights of each step, of each validation and of what is exported after it."""

    def __init__(self) -> None:
        self.steps: list[Weights] = []
        self.validations: list[Weights] = []
        self.exported: list[Weights] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps = [_copy(pl_module)]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        if trainer.global_step == len(self.steps):
            self.steps.append(_copy(pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validations.append(_copy(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.exported.append(_copy(pl_module))


class _Save(pl.Callback):
    """Writes a checkpoint after step `at`."""

    def __init__(self, at: int, path: Path) -> None:
        self._at, self._path = at, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._at and not self._path.exists():
            trainer.save_checkpoint(self._path)


def _copy(module: torch.nn.Module) -> Weights:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _assert_equal(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def _train(
    dataset: DatasetDirectory,
    directory: Path,
    *callbacks: pl.Callback,
    checkpoint: Path | None = None,
    **options: Any,
) -> SmallTraining:
    given = {"max_steps": 6, "val_check_interval": 3, "batch_size": 4, **options}
    training = SmallTraining(dataset, directory, **given)
    training.fit(*callbacks, checkpoint=checkpoint)
    return training


def test_the_average_is_validated_and_exported(dataset: DatasetDirectory, tmp_path: Path) -> None:
    watch = _Watch()
    _train(dataset, tmp_path, watch, AveragedWeights(decay=0.3))
    assert len(watch.steps) == 7
    average = watch.steps[0]
    after: list[Weights] = []
    for step in range(1, 7):
        kept = min(0.3, (1 + step) / (10 + step))
        average = {
            name: kept * average[name] + (1 - kept) * weight
            for name, weight in watch.steps[step].items()
        }
        after.append(average)
    for seen, expected in zip(watch.validations, (after[2], after[5]), strict=True):
        torch.testing.assert_close(seen, expected)
        assert not torch.equal(seen["backbone.model.norm.weight"], torch.ones(64))
    for exported, validated in zip(watch.exported, watch.validations, strict=True):
        _assert_equal(exported, validated)


def test_the_training_is_not_changed(dataset: DatasetDirectory, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_steps": 4}
    plain = _train(dataset, tmp_path / "plain", **options)
    averaged = _train(dataset, tmp_path / "averaged", AveragedWeights(decay=0.99), **options)
    _assert_equal(averaged.backbone.state_dict(), plain.backbone.state_dict())


@pytest.mark.parametrize("save_at", [3, 4], ids=["before a validation", "between"])
def test_a_resumed_average_goes_on_bit_for_bit(
    save_at: int, dataset: DatasetDirectory, tmp_path: Path
) -> None:
    path = tmp_path / "x.ckpt"
    whole, resumed = _Watch(), _Watch()
    uninterrupted = _train(
        dataset, tmp_path / "whole", whole, AveragedWeights(decay=0.9), _Save(save_at, path)
    )
    again = _train(
        dataset, tmp_path / "again", resumed, AveragedWeights(decay=0.9), checkpoint=path
    )
    _assert_equal(again.backbone.state_dict(), uninterrupted.backbone.state_dict())
    _assert_equal(resumed.validations[-1], whole.validations[-1])
    _assert_equal(resumed.steps[0], whole.steps[save_at])


def test_a_checkpoint_shows_the_average_to_who_opens_it(
    dataset: DatasetDirectory, tmp_path: Path
) -> None:
    watch, path = _Watch(), tmp_path / "x.ckpt"
    _train(dataset, tmp_path / "run", watch, AveragedWeights(decay=0.9), _Save(3, path))
    content = torch.load(path, weights_only=True)
    _assert_equal(content["state_dict"], watch.validations[0])
    _assert_equal(content["trained_weights"], watch.steps[3])


def test_parts_of_weights_are_refused() -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.__class__ = ModelParallelStrategy
    with pytest.raises(UsageError, match=r"--ema_decay.*--strategy fsdp"):
        AveragedWeights(decay=0.9).setup(trainer, pl.LightningModule(), "fit")
