"""Optimizers, learning-rate schedules, and the length of a training. Knows nothing of Lightning."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from full_stack_transformer.arguments.training import TrainArguments

Schedule = Literal["cosine", "linear", "wsd", "constant"]

# Brown et al. 2020 (GPT-3), appendix B: 0.95 forgets a bad batch sooner than 0.999.
_ADAM_BETAS = (0.9, 0.95)
# Muon's learning rate for one of AdamW, so that one option serves both. Keller Jordan's scaling of the
# updates with this factor reached 1.68 bits per byte on python_docs (4 x 192, 2 M tokens); updates of
# AdamW's size with equal rates, Liu et al. 2025 (arXiv 2502.16982), 1.72 to 1.78.
_MUON_RATE = 5.0


def make_optimizer(
    module: nn.Module,
    *,
    name: Literal["adamw", "muon"],
    learning_rate: float,
    weight_decay: float,
) -> Optimizer:
    """An optimizer with weight decay for matrices only: not for norms, biases and embeddings."""
    groups = _split_parameters(module)
    # Fused: 39 against 170 ms a step for 124 M parameters on two cores.
    fused = next(module.parameters()).device.type in ("cpu", "cuda")
    if name == "muon":
        adamw = AdamW(
            [
                {"params": groups.heads, "weight_decay": weight_decay},
                {"params": groups.others, "weight_decay": 0.0},
            ],
            lr=learning_rate,
            betas=_ADAM_BETAS,
            fused=fused,
        )
        muon = Muon(groups.matrices, lr=_MUON_RATE * learning_rate, weight_decay=weight_decay)
        return MuonWithAdamW(muon, adamw)
    decayed = {"params": groups.matrices + groups.heads, "weight_decay": weight_decay}
    kept = {"params": groups.others, "weight_decay": 0.0}
    return AdamW([decayed, kept], lr=learning_rate, betas=_ADAM_BETAS, fused=fused)


@dataclass(frozen=True)
class _Parameters:
    """The trained parameters, by how they are optimized."""

    matrices: list[nn.Parameter]
    """Hidden matrices."""
    heads: list[nn.Parameter]
    """Output matrices that are not tied to the embeddings. Not for Muon, whose updates treat all directions
    alike (Keller Jordan 2024), while rare words need smaller ones."""
    others: list[nn.Parameter]
    """Norms, biases and embeddings, tied ones included."""


def _split_parameters(module: nn.Module) -> _Parameters:
    embeddings: set[int] = set()
    heads: set[int] = set()
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            embeddings |= {id(parameter) for parameter in part.parameters()}
        elif isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            heads |= {id(parameter) for parameter in part.get_output_embeddings().parameters()}
    split = _Parameters([], [], [])
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim != 2 or id(parameter) in embeddings:
            split.others.append(parameter)
        else:
            (split.heads if id(parameter) in heads else split.matrices).append(parameter)
    return split


class MuonWithAdamW(Optimizer):
    """Muon for the matrices and AdamW for the rest, as one optimizer.

    One, because Lightning's automatic optimization and a schedule take one. Groups and state are shared
    with the two inside, so the base class saves and restores them.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self._muon, self._adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})
        self._share()

    def _share(self) -> None:
        num_muon_groups = len(self._muon.param_groups)
        self._muon.param_groups = self.param_groups[:num_muon_groups]
        self._adamw.param_groups = self.param_groups[num_muon_groups:]
        self._muon.state = self._adamw.state = self.state

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """A step of both; `closure` computes the loss and its gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()


@dataclass(frozen=True)
class Plan:
    """When a training validates and when it ends, as a function of the steps taken.

    Lightning sees one long epoch, so that batches are numbered from the first to the last of a training.
    """

    num_steps: int | None
    """Optimizer steps until the end; None without a limit."""
    max_seconds: float | None
    """Time until the end; None without a limit."""
    num_batches_between_validations: int
    """Batches of a process; a validation waits for the end of the optimizer step."""
    accumulate_grad_batches: int
    """Batches of an optimizer step."""

    @classmethod
    def of(cls, arguments: TrainArguments, *, num_batches_per_epoch: int) -> Self:
        """The plan that the options mean for epochs of `num_batches_per_epoch` batches."""
        limits = []
        if arguments.max_epochs != -1:
            num_batches = arguments.max_epochs * num_batches_per_epoch
            limits.append(-(-num_batches // arguments.accumulate_grad_batches))
        if arguments.max_steps != -1:
            limits.append(arguments.max_steps)
        interval = arguments.val_check_interval
        batches = interval if interval > 1 else interval * num_batches_per_epoch
        return cls(
            num_steps=min(limits) if limits else None,
            max_seconds=None if arguments.max_minutes is None else 60 * arguments.max_minutes,
            num_batches_between_validations=max(1, int(batches)),
            accumulate_grad_batches=arguments.accumulate_grad_batches,
        )

    def progress(self, step: int, seconds: float) -> float:
        """Fraction of the training that is done after `step` optimizer steps and `seconds`, 0 to 1."""
        by_steps = step / self.num_steps if self.num_steps else float(self.num_steps == 0)
        by_time = seconds / self.max_seconds if self.max_seconds is not None else 0.0
        return min(1.0, max(by_steps, by_time))

    def validates_after(self, num_batches: int) -> bool:
        """Whether a validation follows the optimizer step that ends with batch `num_batches`, from 1."""
        every = self.num_batches_between_validations
        return num_batches // every > (num_batches - self.accumulate_grad_batches) // every


def learning_rate_factor(
    step: int,
    progress: float,
    *,
    name: Schedule,
    num_warmup_steps: int,
    num_cycles: int,
    decay_fraction: float,
    min_ratio: float,
) -> float:
    """Fraction of the peak learning rate for the next step.

    A linear warmup, then, down to a minimum:

    - cosine: cycles of equal length with hard restarts (Loshchilov and Hutter 2017, SGDR).
    - linear: linear decay to the end.
    - wsd: constant, then linear decay over the last part (Hu et al. 2024, arXiv 2404.06395).
    - constant: no decay, no minimum.

    Args:
        step: optimizer steps taken.
        progress: fraction of the training that is done, 0 to 1, by steps or minutes.
        name: what follows the warmup.
        num_warmup_steps: steps of the warmup.
        num_cycles: cosine cycles.
        decay_fraction: fraction of the training over which `wsd` decays.
        min_ratio: fraction of the peak that is left at the end of a decay.
    """
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    # Progress at the end of the warmup, if all steps take equal time.
    start = progress * num_warmup_steps / step if step else 0.0
    position = (progress - start) / (1.0 - start) if progress < 1.0 else 1.0
    if name == "constant":
        height = 1.0
    elif name == "linear":
        height = 1.0 - position
    elif name == "wsd":
        height = min(1.0, (1.0 - progress) / decay_fraction) if decay_fraction else 1.0
    else:
        cycle = position * num_cycles % 1.0 if position < 1.0 else 1.0
        height = 0.5 * (1.0 + math.cos(math.pi * cycle))
    return min_ratio + (1.0 - min_ratio) * height


def make_schedule(
    optimizer: Optimizer,
    progress: Callable[[int], float],
    *,
    name: Schedule,
    num_warmup_steps: int,
    num_cycles: int,
    decay_fraction: float,
    min_ratio: float,
) -> LambdaLR:
    """The schedule of all parameter groups; `progress` maps steps to the fraction that is done."""

    def factor(step: int) -> float:
        return learning_rate_factor(
            step,
            progress(step),
            name=name,
            num_warmup_steps=num_warmup_steps,
            num_cycles=num_cycles,
            decay_fraction=decay_fraction,
            min_ratio=min_ratio,
        )

    return LambdaLR(optimizer, factor)
