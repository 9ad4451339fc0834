"""One training step, for every task: forward, loss, gradient clipping, optimizer, schedule, logging.

    batch ──task.forward──> scores ──task.training_losses──> mean over the targets of the optimizer step

Knows no task by name: what differs is asked of the task.
"""

import contextlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.datasets.replay import replayed_part
from full_stack_transformer.errors import TrainingError, UsageError
from full_stack_transformer.modelling.adapters import fingerprint_of_base, has_adapter
from full_stack_transformer.tasks.task import CorpusTask, RowTask, Task
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks.profiling import FORWARD, LOSS
from full_stack_transformer.training.data.batches import EpochDataModule
from full_stack_transformer.training.data.rows import BaseDataModule
from full_stack_transformer.training.optimization import Plan, make_optimizer, make_schedule
from full_stack_transformer.training.sharding import (
    filled,
    is_sharded,
    shard,
    whole_norm,
    whole_weights,
)

# Key in a checkpoint of an adapter: what tells the weights of its base.
BASE_KEY = "base_sha256"


class TrainingModule(pl.LightningModule):
    """A backbone that learns a task.

    Args:
        backbone: with the task's head.
        arguments: the options of the training.
        task: what is learned.

    Attributes:
        plan: the lengths of the training; known once Lightning has set it up.
        learning_rate: that of the last optimizer step.
        gradient_norm: that of the last optimizer step, before clipping.
        reserved_seconds: what comes after the last step will take: validation, samples, saving.
    """

    plan: Plan

    def __init__(self, backbone: Backbone, arguments: TrainArguments, task: Task) -> None:
        super().__init__()
        self.backbone = backbone
        # A checkpoint of an adapter holds nothing else: its base does not change.
        self.strict_loading = not has_adapter(backbone)
        # from_pretrained hands out evaluation mode, and Lightning keeps it.
        self.backbone.train()
        if arguments.activation_checkpointing:
            _checkpoint_activations(backbone)
        if arguments.neftune_alpha:
            _add_noise(backbone, arguments.neftune_alpha)
        task.prepare_backbone(backbone)
        self.task = task
        self.learning_rate = 0.0
        self.gradient_norm = torch.zeros(())
        self.reserved_seconds = 0.0
        self._arguments = arguments
        self._began: float | None = None
        self._started = time.monotonic()
        self._seconds = 0.0
        self._loss_of_step = torch.zeros(())
        self._validation_sums: dict[str, Tensor] = {}
        self._scores: dict[int, Tensor] = {}
        self._skeletons: list[Backbone] = []  # in a list, so that it is no part of the module

    def configure_model(self) -> None:
        """Keep this process's part of the weights, where the strategy shards them."""
        if is_sharded(self.trainer) and not self._skeletons:
            if has_adapter(self.backbone):
                _ = self._base_fingerprint  # of whole weights
            mesh = self.device_mesh
            assert mesh is not None
            self._skeletons = [shard(self.backbone, mesh["data_parallel"])]

    def whole_backbone(self) -> Backbone | None:
        """The backbone with whole weights, in the main process; all processes must call it."""
        if not self._skeletons:
            return self.backbone if self.trainer.is_global_zero else None
        weights = whole_weights(self.backbone)
        return filled(self._skeletons[0], weights) if self.trainer.is_global_zero else None

    def setup(self, stage: str) -> None:
        """Make the plan, now that the number of processes is known."""
        self.task.num_processes = self.trainer.world_size
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, EpochDataModule)
        self.plan = Plan.of(self._arguments, num_batches_per_epoch=data.num_batches_per_epoch)

    def training_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        """The loss of the batch, so weighted that gradients add up to that of the mean over the targets.

        Lightning divides by the batches of a step, and several processes average their gradients; both
        are undone here, since batches hold different numbers of targets. Beside it the cross entropy
        alone, which Lightning does not divide.
        """
        # Dropout is a function of the position: nothing to restore in a training that is resumed.
        _seed(self.device, _seed_of_batch(self._arguments.seed, self.global_rank, batch_index))
        loss, shown = self.mean_losses(batch)
        self._loss_of_step = self._loss_of_step.to(loss.device) + loss.detach()
        num_processes = self.trainer.world_size
        return {
            "loss": loss * (num_processes * self.trainer.accumulate_grad_batches),
            **{name: value * num_processes for name, value in shown.items()},
        }

    def mean_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """This batch's parts of the means over all targets of its optimizer step.

        Returns:
            The loss, and what curves show of it, without a gradient: `CROSS_ENTROPY` of the batch's own
            targets, `REPLAY_LOSS` of those that are replayed beside it.
        """
        with self.profiled(FORWARD):
            scores = self.task.forward(self.backbone, batch)
        with self.profiled(LOSS):
            loss_sum, shown_sum = self.task.training_losses(scores, batch)
        if "is_filler" in batch:  # computed, since all processes compute together
            loss_sum, shown_sum = loss_sum * 0.0, shown_sum * 0.0
        num_targets = batch["num_targets"]
        if "num_replay_targets" not in batch:  # in the whole optimizer step
            return loss_sum / num_targets, {
                metric_names.CROSS_ENTROPY: shown_sum.detach() / num_targets
            }
        replay_sum = self._replay_loss_sum(batch)
        num_replayed = batch["num_replay_targets"]
        num_own = (num_targets - num_replayed).clamp(min=1)
        return (loss_sum + replay_sum) / num_targets, {
            metric_names.CROSS_ENTROPY: shown_sum.detach() / num_own,
            metric_names.REPLAY_LOSS: replay_sum.detach() / num_replayed,
        }

    def _replay_loss_sum(self, batch: Batch) -> Tensor:
        """Cross entropy of the next tokens of what is replayed beside a batch, in nats."""
        replayed = replayed_part(batch)
        if replayed is None:
            return torch.zeros((), device=self.device)
        with self.profiled(FORWARD):
            scores = self.task.forward(self.backbone, replayed)
        with self.profiled(LOSS):
            return self.task.loss_sum(scores, replayed)

    def on_validation_epoch_start(self) -> None:
        """Forget the validation before."""
        self._validation_sums = {}
        self._scores = {}

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add up losses and counts, and keep the scores of rows, which metrics need as a whole."""
        with self.profiled(FORWARD):
            scores = self.task.forward(self.backbone, batch)
        with self.profiled(LOSS):
            sums = self.task.validation_sums(scores, batch)
        for name, value in sums.items():
            total = self._validation_sums.get(name, torch.zeros((), dtype=torch.float64))
            self._validation_sums[name] = total + value.cpu().double()  # Apple's GPU has no fp64
        if "numbers" in batch:  # without one where other processes have a feature more
            self._scores.update(zip(batch["numbers"].tolist(), scores.float().cpu(), strict=False))

    def on_validation_epoch_end(self) -> None:
        """Make the mean over all targets of all processes, and the metrics, known to the callbacks.

        Raises:
            UsageError: --metric_for_best_model is none of them.
        """
        totals = torch.stack(list(self._validation_sums.values()))
        if self.trainer.world_size > 1:
            totals = totals.to(self.device)
            totals = self.trainer.strategy.reduce(totals, reduce_op="sum").cpu()
        sums = dict(zip(self._validation_sums, totals.tolist(), strict=True))
        loss = sums["loss"] / max(1, sums["targets"])
        metrics = {metric_names.LOSS: loss, **self._validation_metrics(loss, sums)}
        chosen = self._arguments.metric_for_best_model
        if chosen not in metrics:
            raise unknown_metric(chosen, metrics)
        sign = 1.0 if metric_names.is_better_when_lower(chosen) else -1.0
        # Each process knows the same already, but Lightning warns unless it may average.
        for name, value in metrics.items():
            self._tell(f"{metric_names.VALID}/{name}", value)
        self._tell(metric_names.SELECTION, sign * metrics[chosen])

    def _validation_metrics(self, loss: float, sums: dict[str, float]) -> dict[str, float]:
        """The metrics beside the loss; each process computes the same."""
        if isinstance(self.task, CorpusTask):
            return self.task.validation_metrics(loss, sums)
        assert isinstance(self.task, RowTask)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, BaseDataModule)
        rows, predictions = data.predictions_of(_gathered(self._scores, self.trainer.world_size))
        return self.task.metrics(rows, predictions).scalars if rows else {}

    def _tell(self, name: str, value: float) -> None:
        # On the device: NCCL, which averages between GPUs, takes nothing from a processor.
        tensor = torch.tensor(value, dtype=torch.float32, device=self.device)
        self.log(name, tensor, logger=False, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and the schedule, stepped with every optimizer step."""
        options = self._arguments
        optimizer = make_optimizer(
            self,
            name=options.optimizer,
            learning_rate=options.peak_learning_rate,
            weight_decay=options.weight_decay,
            scales_gradients=self.trainer.scaler is not None,
            is_shared=self.trainer.world_size > 1,
        )
        schedule = make_schedule(
            optimizer,
            self.progress,
            name=options.lr_schedule,
            num_warmup_steps=options.warmup_steps,
            num_cycles=options.num_cycles,
            decay_fraction=options.decay_fraction,
            min_ratio=options.min_learning_rate_ratio,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of the whole gradient; keep it, and the rate that this step takes.

        Lightning's own refuses a fused optimizer with bf16 (Lightning issue #21435).
        """
        limit = self._arguments.gradient_clip_val or math.inf
        self.gradient_norm = whole_norm(torch.nn.utils.clip_grad_norm_(self.parameters(), limit))
        self._stop_unless_finite()
        # AdamW's, which is what --learning_rate means; with Muon its own comes first.
        self.learning_rate = optimizer.param_groups[-1]["lr"]

    def _stop_unless_finite(self) -> None:
        """End before the weights are spoilt.

        Each process decides the same: the gradient is that of all of them.
        """
        loss, self._loss_of_step = self._loss_of_step, torch.zeros_like(self._loss_of_step)
        if self.trainer.scaler is not None:
            # fp16 finds its scale by gradients that overflow; such a step is skipped.
            is_finite = not greatest(self.trainer, float(not torch.isfinite(loss)))
        else:
            is_finite = bool(torch.isfinite(self.gradient_norm))
        if is_finite:
            return
        what = "gradient's norm" if torch.isfinite(loss) else "loss"
        value = self.gradient_norm if torch.isfinite(loss) else loss
        raise TrainingError(
            f"the {what} became {value.item()} at step {self.global_step + 1}; the model and the "
            "checkpoints from before are intact: lower --learning_rate or use --precision 32"
        )

    def count_time_from(self, moment: float) -> None:
        """Start the clock of --max_minutes at a value of time.monotonic(), such as the command's start.

        While it trains, the clock is set anew.
        """
        self._began = self._started = moment

    def on_train_start(self) -> None:
        """Add the time of earlier runs."""
        began = time.monotonic() if self._began is None else self._began
        self._started = began - self._seconds

    def read_clock(self) -> None:
        """Look how long the training has taken up to now, validations and earlier runs included."""
        self._seconds = time.monotonic() - self._started
        if self.plan.max_seconds is not None:
            # The learning rate depends on it: each process must read the same.
            self._seconds = greatest(self.trainer, self._seconds)

    @property
    def seconds(self) -> float:
        """What the clock of this and earlier runs showed last."""
        return self._seconds

    def progress(self, step: int) -> float:
        """Part of the optimizer steps that is over after `step` of them, 0 to 1; by steps or minutes."""
        reserved = self.reserved_seconds
        return self.plan.progress(step, self._seconds, reserved_seconds=reserved)

    def is_over(self, step: int, seconds_of_next: float) -> bool:
        """Whether the training ends after `step` optimizer steps: no other one is left, or fits."""
        seconds = self._seconds + seconds_of_next
        return self.plan.progress(step, seconds, reserved_seconds=self.reserved_seconds) >= 1.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the clock; of a model with an adapter the adapter alone, and what tells its base."""
        checkpoint["seconds"] = self._seconds
        if has_adapter(self.backbone):
            trained = self._names_of_trained()
            checkpoint["state_dict"] = {
                name: value for name, value in checkpoint["state_dict"].items() if name in trained
            }
            checkpoint[BASE_KEY] = self._base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the clock.

        Raises:
            TrainingError: the base is not the one that the adapter was trained on up to now.
        """
        self._seconds = checkpoint["seconds"]
        if not has_adapter(self.backbone):
            return
        if (
            checkpoint.get(BASE_KEY) != self._base_fingerprint
            or checkpoint["state_dict"].keys() != self._names_of_trained()
        ):
            raise TrainingError(
                f"the model at --model_path {self._arguments.model_path} has other weights than when this "
                "training started; put them back, or start a new training without --resume"
            )

    def _names_of_trained(self) -> set[str]:
        return {name for name, one in self.named_parameters() if one.requires_grad}

    @cached_property
    def _base_fingerprint(self) -> str:
        return fingerprint_of_base(self.backbone)

    def profiled(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Tells the profiler, where there is one, into what the time goes."""
        if self._trainer is None:
            return contextlib.nullcontext()
        return self.trainer.profiler.profile(name)  # type: ignore[attr-defined,no-any-return]


def unknown_metric(chosen: str, names: Iterable[str]) -> UsageError:
    """The error for a --metric_for_best_model that is none of the metrics."""
    return UsageError(
        f"--metric_for_best_model must be one of {', '.join(names)}; found {chosen!r}"
    )


@dataclass(frozen=True)
class ValidationMetrics:
    """What a validation found: its loss, and the metrics of the task."""

    step: int
    """Optimizer steps before it."""
    loss: float
    """Mean loss of the targets, in nats where it is a cross entropy."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the task: perplexity and bits per byte, or accuracy, or …"""
    selection: float | None = None
    """What decides which model is the best one: lower is better. None: the loss."""

    @property
    def decisive(self) -> float:
        """`selection`, or the loss."""
        return self.loss if self.selection is None else self.selection

    def words(self) -> str:
        """For a person: `perplexity 12.18, 1.500 bits per byte`."""
        return ", ".join(_words(name, value) for name, value in self.metrics.items())


def _words(name: str, value: float) -> str:
    if name == metric_names.PERPLEXITY:
        return f"perplexity {value:,.2f}"
    if name == metric_names.BITS_PER_BYTE:
        return f"{value:.3f} bits per byte"
    return f"{name} {value:.4f}"


def validation_metrics(trainer: pl.Trainer) -> ValidationMetrics:
    """Those of the validation that ends now, which the module logged."""
    found = {
        name.removeprefix(f"{metric_names.VALID}/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(f"{metric_names.VALID}/")
    }
    loss = found.pop(metric_names.LOSS)
    selection = trainer.callback_metrics.get(metric_names.SELECTION)
    return ValidationMetrics(
        step=trainer.global_step,
        loss=loss,
        metrics=found,
        selection=None if selection is None else float(selection),
    )


def greatest(trainer: pl.Trainer, value: float) -> float:
    """The largest `value` of all processes; all of them must call this."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(tensor, reduce_op="max"))


def _gathered(scores: dict[int, Tensor], world_size: int) -> dict[int, Tensor]:
    """Those of all processes."""
    if world_size == 1:
        return scores
    parts: list[dict[int, Tensor] | None] = [None] * world_size
    torch.distributed.all_gather_object(parts, scores)
    return {number: score for part in parts if part for number, score in part.items()}


def _add_noise(backbone: Backbone, alpha: float) -> None:
    """NEFTune (Jain et al. 2023, arXiv 2310.05914), with the padded length as transformers has it."""

    def noisy(module: nn.Module, _: Any, embeddings: Tensor) -> Tensor:
        if not module.training:
            return embeddings
        limit = alpha / math.sqrt(embeddings.shape[1] * embeddings.shape[2])
        return embeddings + torch.empty_like(embeddings).uniform_(-limit, limit)

    backbone.get_input_embeddings().register_forward_hook(noisy)


def _checkpoint_activations(backbone: Backbone) -> None:
    try:
        backbone.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UsageError(f"--activation_checkpointing: {error}") from error


def _seed(device: torch.device, seed: int) -> None:
    """Seed what a step draws from; torch.manual_seed asks all kinds of devices, for 0.1 to 0.5 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _seed_of_batch(seed: int, rank: int, batch_index: int) -> int:
    """Independent streams for neighbouring seeds, ranks and batches."""
    state = np.random.SeedSequence((seed, rank, batch_index)).generate_state(1, np.uint64)
    return int(state[0])
