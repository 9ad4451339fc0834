"""Optimizers, learning-rate schedules, and the length of a training. Knows nothing of Lightning."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.machine import multiplies_bfloat16
from full_stack_transformer.training.muon_together import DealtMatrices, own_part

Schedule = Literal["cosine", "linear", "wsd", "constant"]

# Brown et al. 2020 (GPT-3), appendix B: 0.95 forgets a bad batch sooner than 0.999.
_ADAM_BETAS = (0.9, 0.95)
# Muon's learning rate for one of AdamW, so that one option serves both. Keller Jordan's scaling of the
# updates with this factor reached 1.68 bits per byte on python_docs (4 x 192, 2 M tokens); updates of
# AdamW's size with equal rates, Liu et al. 2025 (arXiv 2502.16982), 1.72 to 1.78.
_MUON_RATE = 5.0
# Numbers of the matrices that Muon orthogonalises at once: more need memory and are no faster on a processor;
# a GPU is given few large products, not many small ones.
_MAX_NUMBERS_AT_ONCE, _MAX_NUMBERS_AT_ONCE_ON_GPU = 2**22, 2**26
# From this ratio of the sides on, products of the small Gram matrices are less work than those of the matrix.
_MIN_RATIO_FOR_GRAM = 1.5


def make_optimizer(
    module: nn.Module,
    *,
    name: Literal["adamw", "muon"],
    learning_rate: float,
    weight_decay: float,
    scales_gradients: bool = False,
    is_shared: bool = False,
) -> Optimizer:
    """An optimizer with weight decay for matrices only: not for norms, biases and embeddings.

    Args:
        module: what is trained, on its device.
        name: of the optimizer.
        learning_rate: of AdamW.
        weight_decay: of the matrices.
        scales_gradients: whether they come multiplied, as for fp16. A fused optimizer divides them itself,
            which Lightning leaves to it: then they would be clipped before.
        is_shared: whether several processes have the same gradients, and can share the work.
    """
    groups = _split_parameters(module)
    # Fused: 39 against 170 ms a step for 124 M parameters on two cores.
    fused = not scales_gradients and next(module.parameters()).device.type in ("cpu", "cuda")
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
        muon = BatchedMuon(
            groups.matrices,
            lr=_MUON_RATE * learning_rate,
            weight_decay=weight_decay,
            is_shared=is_shared,
        )
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
        if isinstance(
            getattr(part, "base_layer", part), nn.Embedding
        ):  # adapters wrap their layers
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


class BatchedMuon(Muon):
    """torch's Muon, which orthogonalises one matrix after the other and always in bf16.

    This one takes the type that the hardware multiplies, and matrices of one shape together. A step for
    the 28 matrices of the preset mini, in processor seconds of one core of an EPYC (Zen 4) without its
    AVX-512 and bf16 instructions: torch's 1.67, this one 0.09; forward and backward of 2,048 tokens 0.47.
    With them: 0.032 and 0.024 of 0.20. The state is that of torch's.

    Several processes deal the matrices out among them: see `muon_together`.

    Args:
        parameters: matrices.
        lr: learning rate.
        weight_decay: of the matrices.
        is_shared: whether several processes have the same gradients.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        is_shared: bool = False,
    ) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self._is_shared = is_shared

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """A step for all matrices that have a gradient."""
        assert closure is None, "MuonWithAdamW calls it"
        for group in self.param_groups:
            parameters = [one for one in group["params"] if one.grad is not None]
            if not parameters:
                continue
            if self._is_shared or isinstance(parameters[0], DTensor):
                self._step_together(parameters, group)
                continue
            for numbers in _batches([one.shape for one in parameters], parameters[0].device):
                batch = [parameters[number] for number in numbers]
                directions = [self._direction(one, group["momentum"]) for one in batch]
                updates = _orthogonal(directions, group)
                for parameter, update in zip(batch, updates, strict=True):
                    _apply(parameter, update, parameter.shape, group)

    def _step_together(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Orthogonalise this process's share of the matrices, and exchange the results."""
        dealt = DealtMatrices(parameters)
        own = dealt.gather(
            [own_part(self._direction(one, group["momentum"])) for one in parameters]
        )
        updates: list[Tensor] = [torch.empty(0)] * len(own)
        for numbers in _batches([one.shape for one in own], parameters[0].device):
            found = _orthogonal([own[number] for number in numbers], group)
            for number, update in zip(numbers, found, strict=True):
                updates[number] = update
        for parameter, update in zip(parameters, dealt.scatter(updates), strict=True):
            _apply(own_part(parameter), update, parameter.shape, group)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's: the gradient and the mean of the earlier ones."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)


def _batches(shapes: Sequence[torch.Size], device: torch.device) -> Iterator[list[int]]:
    """Numbers of the matrices that are orthogonalised at once: with the same sides, whichever is longer."""
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, shape in enumerate(shapes):
        by_shape[min(shape), max(shape)].append(number)
    limit = _MAX_NUMBERS_AT_ONCE_ON_GPU if device.type == "cuda" else _MAX_NUMBERS_AT_ONCE
    for (rows, columns), numbers in by_shape.items():
        num_at_once = max(1, limit // (rows * columns))
        for first in range(0, len(numbers), num_at_once):
            yield numbers[first : first + num_at_once]


def _orthogonal(directions: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The matrices with singular values near 1, each in its own shape."""
    wide = torch.stack([_wide(one) for one in directions])
    if multiplies_bfloat16(wide.device):
        wide = wide.bfloat16()
    wide = orthogonalized(wide, group["ns_coefficients"], group["ns_steps"])
    return [
        found.mT if one.shape[0] > one.shape[1] else found
        for one, found in zip(directions, wide, strict=True)
    ]


def _apply(parameter: Tensor, update: Tensor, shape: torch.Size, group: dict[str, Any]) -> None:
    """Move a matrix, or rows of one with this shape."""
    rows, columns = shape
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonalized(
    matrices: Tensor, coefficients: tuple[float, float, float], num_steps: int
) -> Tensor:
    """Matrices with singular values near 1, by Newton and Schulz's iteration as Keller Jordan 2024 has it.

    X <- a X + (b G + c G^2) X with G = X X^T. All factors of X are polynomials of the first G, so that they
    commute: for a wide matrix their product is computed without X, and G <- P G P with P = a + b G + c G^2.
    Only in fp32, where an eigenvalue of G near 0 is still exact enough.

    Args:
        matrices: (B, M, N), M not above N.
        coefficients: a, b, c.
        num_steps: iterations.
    """
    a, b, c = coefficients
    num_rows, num_columns = matrices.shape[1:]
    norms = matrices.flatten(1).norm(dim=1)
    matrices = matrices / norms.clamp(min=1e-7)[:, None, None]
    if matrices.dtype != torch.float32 or num_columns < _MIN_RATIO_FOR_GRAM * num_rows:
        for _ in range(num_steps):
            gram = matrices @ matrices.mT
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            matrices = torch.baddbmm(matrices, factor, matrices, beta=a)
        return matrices
    gram = matrices @ matrices.mT
    product: Tensor | None = None
    for step in range(num_steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if step < num_steps - 1:
            gram = factor @ gram @ factor
    return matrices if product is None else product @ matrices


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

    def progress(self, step: int, seconds: float, *, reserved_seconds: float = 0.0) -> float:
        """Fraction of the training that is done after `step` optimizer steps and `seconds`, 0 to 1.

        Args:
            step: optimizer steps.
            seconds: from the start.
            reserved_seconds: of the time limit, for what comes after the last step; half of it at most.
        """
        by_steps = step / self.num_steps if self.num_steps else float(self.num_steps == 0)
        by_time = 0.0
        if self.max_seconds is not None:
            by_time = seconds / (self.max_seconds - min(reserved_seconds, self.max_seconds / 2))
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
