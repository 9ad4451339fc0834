"""TensorBoard gets every curve, with the right values at the right steps."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.modelling.losses import perplexity
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks.meter import Meter
from full_stack_transformer.training.callbacks.progress import RecordCurves
from tests.training.small_training import SmallTraining

_BYTES_PER_TARGET = 2.0


def _record(meter: Meter, *, histograms: bool = False) -> RecordCurves:
    return RecordCurves(
        meter,
        log_every_n_steps=2,
        histograms=histograms,
    )


class _Watch(pl.Callback):
    """Remembers what each step was, the plain way."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.norms: dict[int, float] = {}
        self.rates: dict[int, float] = {}
        self._loss = 0.0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters()]
        squares = sum(float(one.double().square().sum()) for one in gradients if one is not None)
        self.norms[trainer.global_step + 1] = math.sqrt(squares)
        self.rates[trainer.global_step + 1] = optimizer.param_groups[-1]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        # Lightning has divided the loss of a batch by the batches of a step.
        self._loss += float(outputs["loss"])
        if trainer.global_step not in self.losses and trainer.global_step in self.norms:
            self.losses[trainer.global_step], self._loss = self._loss, 0.0


@pytest.fixture(scope="module")
def watched(
    dataset: DatasetDirectory, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EventAccumulator, _Watch]:
    """Nine steps of two batches each, with three validations and histograms."""
    directory = tmp_path_factory.mktemp("watched")
    meter, watch = Meter(num_context_tokens=40), _Watch()
    training = SmallTraining(
        dataset,
        directory,
        bytes_per_target=_BYTES_PER_TARGET,
        max_steps=9,
        limit_train_batches=10.0,
        val_check_interval=6,
        accumulate_grad_batches=2,
    )
    training.fit(watch, meter, _record(meter, histograms=True))
    events = EventAccumulator(str(directory), size_guidance={"histograms": 0})
    events.Reload()
    return events, watch


def _points(watched: tuple[EventAccumulator, _Watch], name: str) -> dict[int, float]:
    return {event.step: event.value for event in watched[0].Scalars(name)}


def test_every_curve_is_there(watched: tuple[EventAccumulator, _Watch]) -> None:
    constants = {
        value for name, value in vars(metric_names).items() if name.isupper() and "/" in value
    }
    beside = {metric_names.CUDA_MEGABYTES, metric_names.ARGUMENTS_TEXT, metric_names.DATASET_TEXT}
    beside |= {metric_names.TRAIN_REPLAY_LOSS}
    expected = constants - beside
    assert set(watched[0].Tags()["scalars"]) == expected


def test_a_point_is_that_of_the_whole_step(watched: tuple[EventAccumulator, _Watch]) -> None:
    """Each second step, numbered by the steps taken; with the batches of a step added up."""
    watch = watched[1]
    for name, plain in (
        (metric_names.TRAIN_LOSS, watch.losses),
        (metric_names.GRADIENT_NORM, watch.norms),
        (metric_names.LEARNING_RATE, watch.rates),
    ):
        points = _points(watched, name)
        assert list(points) == [2, 4, 6, 8]
        for step, value in points.items():
            assert value == pytest.approx(plain[step], rel=1e-5), name
    epochs = _points(watched, metric_names.EPOCH)
    assert epochs == pytest.approx({2: 0.4, 4: 0.8, 6: 1.2, 8: 1.6})


def test_a_validation_has_its_three_metrics(watched: tuple[EventAccumulator, _Watch]) -> None:
    losses = _points(watched, metric_names.VALID_LOSS)
    assert list(losses) == [3, 6, 9]
    for step, loss in losses.items():
        assert _points(watched, metric_names.VALID_PERPLEXITY)[step] == pytest.approx(
            math.exp(loss), rel=1e-5
        )
        assert _points(watched, metric_names.VALID_BITS_PER_BYTE)[step] == pytest.approx(
            loss / math.log(2) / _BYTES_PER_TARGET, rel=1e-5
        )


def test_throughput_and_memory_are_plausible(watched: tuple[EventAccumulator, _Watch]) -> None:
    rates = _points(watched, metric_names.TOKENS_PER_SECOND)
    utilization = _points(watched, metric_names.MODEL_FLOPS_UTILIZATION)
    assert all(rate > 100 for rate in rates.values())
    # One is a multiple of the other, by a figure that was measured once.
    ratios = [utilization[step] / rates[step] for step in rates]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-4)
    assert all(0 < part < 1.5 for part in utilization.values())
    memory = _points(watched, metric_names.RESIDENT_MEGABYTES)
    assert all(100 < megabytes < 50_000 for megabytes in memory.values())


def test_histograms_are_those_of_each_validation(watched: tuple[EventAccumulator, _Watch]) -> None:
    names = watched[0].Tags()["histograms"]
    kinds = {name.split("/")[0] for name in names}
    assert kinds == {metric_names.WEIGHT_HISTOGRAM, metric_names.GRADIENT_HISTOGRAM}
    gradient = f"{metric_names.GRADIENT_HISTOGRAM}/model.layers.0.mlp.up_proj.weight"
    events = watched[0].Histograms(gradient)
    assert [event.step for event in events] == [3, 6, 9]
    assert all(event.histogram_value.max > 0 for event in events)


def test_the_loss_is_the_cross_entropy_alone(dataset: DatasetDirectory, tmp_path: Path) -> None:
    """Whatever is added to it: perplexities compare, and with those of a validation."""
    losses = []
    for alpha in (0.0, 3.0):
        meter = Meter(num_context_tokens=40)
        SmallTraining(dataset, tmp_path, max_steps=1, unlikelihood_alpha=alpha).fit(meter)
        losses.append(float(meter.loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_huge_loss_has_a_perplexity() -> None:
    assert perplexity(2.0) == math.exp(2.0)
    assert torch.isfinite(torch.tensor(perplexity(1e9)))
