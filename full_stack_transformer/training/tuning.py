"""`--find_learning_rate` and `--find_batch_size`: short trials on a copy of the model, before the training.

A trial leaves nothing behind but the value that it found, which is logged and saved in arguments.json.

Lightning's finders (2.6.6) do something else. `LearningRateFinder` gives all parameter groups the same rate,
so that Muon's matrices would be tried at a fifth of theirs, and takes the steepest place of the loss over the
rate instead of its logarithm, which favours the lowest rates: on the same curve of a model of 2 x 64 it found
1.3e-3 and not 2e-2 with AdamW, 4e-3 and not 5e-2 with Muon. `BatchSizeFinder` finds the largest batch that
fits, not the fastest one, by running out of memory, which on a processor ends the process.
"""

import contextlib
import copy
import dataclasses
import gc
import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.errors import TrainingError, UsageError
from full_stack_transformer.machine import free_memory_bytes, resident_bytes
from full_stack_transformer.training.data.batches import EpochDataModule
from full_stack_transformer.training.optimization import make_optimizer
from full_stack_transformer.training.setup import TrainingSetup

logger = logging.getLogger(__name__)

# From no effect to certain divergence, for AdamW and for Muon.
_LOWEST_RATE, _HIGHEST_RATE = 1e-6, 1.0
_NUM_RATES = 120
# Losses averaged on each side of a rate: a quarter of a power of ten.
_NUM_NEIGHBOURS = 5
# The loss has diverged when it is this many times the lowest loss.
_DIVERGED = 3.0
# The least slope that is more than rounding errors, in nats for a rate e times as high.
_LEAST_SLOPE = 1e-4
# A batch twice as large must raise the tokens per second by this factor; less is noise.
_LEAST_GAIN = 1.05
_SECONDS_PER_SIZE, _LEAST_STEPS_PER_SIZE = 2.0, 4
# With fewer batches in an epoch there is hardly an order to shuffle.
_LEAST_BATCHES_PER_EPOCH = 8
_PART_OF_MEMORY = 0.8


def tune(
    arguments: TrainArguments, setup: TrainingSetup, backbone: Backbone, trainer: pl.Trainer
) -> TrainArguments:
    """The options with the values that were found.

    Args:
        arguments: with `find_batch_size`, `find_learning_rate` or both.
        setup: its training samples are used.
        backbone: stays as it is.
        trainer: names the device and the precision.

    Raises:
        UsageError: there are several processes, which might find different values.
        TrainingError: no learning rate lowers the loss.
    """
    if trainer.world_size > 1:
        raise UsageError(
            "--find_batch_size and --find_learning_rate need a single device: pass --devices 1 "
            "--max_steps 1, then train with the values that they find"
        )
    if arguments.find_batch_size:
        size = find_batch_size(_Trial(arguments, setup, backbone, trainer))
        arguments = dataclasses.replace(arguments, batch_size=size, find_batch_size=False)
    if arguments.find_learning_rate:
        rate = find_learning_rate(_Trial(arguments, setup, backbone, trainer))
        arguments = dataclasses.replace(arguments, learning_rate=rate, find_learning_rate=False)
    if trainer.strategy.root_device.type == "cuda":  # the training needs the memory of the trials
        gc.collect()
        torch.cuda.empty_cache()
    return arguments


class _Trial:
    """A plain training loop on copies."""

    def __init__(
        self,
        arguments: TrainArguments,
        setup: TrainingSetup,
        backbone: Backbone,
        trainer: pl.Trainer,
    ) -> None:
        self.arguments = arguments
        self.device = trainer.strategy.root_device
        self._setup = setup
        self._precision = trainer.precision_plugin
        self._module = setup.make_module(copy.deepcopy(backbone), arguments).to(self.device)
        self._module.trainer = trainer
        self._optimizer = make_optimizer(
            self._module,
            name=arguments.optimizer,
            learning_rate=1.0,
            weight_decay=arguments.weight_decay,
        )
        # For a learning rate of 1: with Muon they differ between groups.
        self._base_rates = [group["lr"] for group in self._optimizer.param_groups]

    def num_batches_per_epoch(self, batch_size: int) -> int:
        """Batches of an epoch with this batch size."""
        return self._data(batch_size).count_batches_per_epoch(1)

    def steps(self, batch_size: int) -> Iterator[list[Batch]]:
        """The batches of each optimizer step, without end."""
        loader = self._data(batch_size).train_dataloader()
        while True:
            yield list(itertools.islice(loader, self.arguments.accumulate_grad_batches))

    def step(self, batches: Sequence[Batch], rate: float) -> float:
        """Take an optimizer step with a learning rate; returns the mean loss before it, in nats."""
        for group, base_rate in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base_rate * rate
        total = torch.zeros((), device=self.device)
        for batch in batches:
            moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
            with self._precision.forward_context():
                loss, _ = self._module.mean_losses(moved)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        limit = self.arguments.gradient_clip_val or math.inf
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), limit)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(total)

    def forget_gradients(self) -> None:
        """Forget those of a step that failed half-way."""
        self._optimizer.zero_grad()

    def _data(self, batch_size: int) -> EpochDataModule:
        arguments = dataclasses.replace(
            self.arguments,
            batch_size=batch_size,
            max_epochs=-1,
            max_steps=1,
            limit_train_batches=1.0,
        )
        return self._setup.make_data(arguments)


def find_learning_rate(trial: _Trial) -> float:
    """The learning rate at which the loss falls fastest, in a test of rising rates.

    The range test of Smith 2017 (arXiv 1506.01186, section 3.3), with a rate that rises exponentially
    from step to step. The paper reads two bounds off the curve; here its steepest place is taken.

    Raises:
        TrainingError: the loss never falls.
    """
    rates = np.geomspace(_LOWEST_RATE, _HIGHEST_RATE, _NUM_RATES)
    losses: list[float] = []
    for rate, batches in zip(rates, trial.steps(trial.arguments.batch_size), strict=False):
        loss = trial.step(batches, float(rate))
        if not loss < _DIVERGED * min([*losses, loss]):
            break
        losses.append(loss)
    found = steepest_descent(rates[: len(losses)].tolist(), losses)
    logger.info(
        "--find_learning_rate: tried %.1e to %.1e, the loss went from %.3f to %.3f and ended at %.3f; it "
        "falls fastest at --learning_rate %g",
        rates[0],
        rates[len(losses) - 1],
        losses[0],
        min(losses),
        losses[-1],
        found,
    )
    return found


def steepest_descent(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate, to two digits, at which the averaged loss falls fastest over the logarithm of the rate.

    Raises:
        TrainingError: the loss never falls.
    """
    width = 2 * _NUM_NEIGHBOURS + 1
    if len(losses) > width:
        averaged = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        slopes = np.gradient(averaged, np.log(rates[_NUM_NEIGHBOURS:-_NUM_NEIGHBOURS]))
        steepest = int(np.argmin(slopes))
        if slopes[steepest] < -_LEAST_SLOPE:
            return float(f"{rates[steepest + _NUM_NEIGHBOURS]:.1e}")
    raise TrainingError(
        f"--find_learning_rate: the loss does not fall at any rate from {rates[0]:g}; pass "
        "--learning_rate, or use --precision 32"
    )


def find_batch_size(trial: _Trial) -> int:
    """The fastest batch size, found by doubling --batch_size."""
    size = trial.arguments.batch_size
    best = _tokens_per_second(trial, size)
    logger.info("--find_batch_size: %s samples, %s tokens/s", size, f"{best:,.0f}")
    while True:
        reason, speed = _try_size(trial, 2 * size)
        if not reason and speed < _LEAST_GAIN * best:
            reason = f"{speed:,.0f} tokens/s are not faster"
        if reason:
            logger.info(
                "--find_batch_size: %s samples: %s; --batch_size %s", 2 * size, reason, size
            )
            return size
        size, best = 2 * size, speed
        logger.info("--find_batch_size: %s samples, %s tokens/s", size, f"{best:,.0f}")


def _try_size(trial: _Trial, size: int) -> tuple[str, float]:
    """Why a size cannot be used ("" if it can), and its speed."""
    try:
        if trial.num_batches_per_epoch(size) < _LEAST_BATCHES_PER_EPOCH:
            return f"an epoch would have fewer than {_LEAST_BATCHES_PER_EPOCH} batches", 0.0
    except UsageError:
        return "an epoch would have no batch", 0.0
    # Twice the batch takes at most twice the memory that the process has now. On a processor this cannot be
    # tried, since the system kills a process that takes too much.
    free = free_memory_bytes(trial.device)
    held = resident_bytes()
    if trial.device.type == "cpu" and free and held and held > _PART_OF_MEMORY * free:
        return "may not fit into memory", 0.0
    with contextlib.suppress(torch.OutOfMemoryError):
        return "", _tokens_per_second(trial, size)
    # After the error is gone, which holds the activations.
    trial.forget_gradients()
    torch.cuda.empty_cache()
    return "does not fit into memory", 0.0


def _tokens_per_second(trial: _Trial, size: int) -> float:
    """Targets per second, without the first step."""
    steps = trial.steps(size)
    trial.step(next(steps), 0.0)
    num_targets, num_steps, started = 0.0, 0, time.perf_counter()
    while time.perf_counter() - started < _SECONDS_PER_SIZE or num_steps < _LEAST_STEPS_PER_SIZE:
        batches = next(steps)
        trial.step(batches, 0.0)  # reads the loss, and so waits for the device
        num_targets += float(batches[0]["num_targets"])
        num_steps += 1
    return num_targets / (time.perf_counter() - started)
