"""GPTQ: weights rounded input by input, so that those to come make up for the errors so far.

Frantar, Ashkboos, Hoefler and Alistarh 2022 (arXiv 2210.17323), sections 3 and 4. With the inputs X of a
linear layer, H = 2 X X^T and U the upper Cholesky factor of its inverse, rounding the weights w of input k
to q changes those of later inputs j by -(w - q) / U_kk * U_kj. As in the paper H is damped by 1 % of its
mean diagonal, and later blocks are changed once a block. Here a block is a group of 32 inputs, whose scale
and zero are chosen when it is reached; of some narrower grids the one with the least squared error is taken.
Where rounding to the nearest changes the outputs less, as with weights that came from 4 bits, that is taken.

    token ids ──> first layer's inputs ──layer──> … ──> last layer      one layer at a time: its inputs are
                       │ X of each linear layer                         those that the rounded layers before
                       └──> codes, put into the layer before it runs    it make

Memory: the model, the hidden states of the text, and X X^T of one layer.
Shapes: N outputs, K inputs, B samples of T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel as Backbone
from transformers.pytorch_utils import Conv1D

from full_stack_transformer.generation.runners.native.parts import (
    Layer,
    Linear,
    parts_of,
    weights_of,
)
from full_stack_transformer.quantization.codes import (
    CODES_NAME,
    GROUP_SIZE,
    Codes,
    codes_on,
    fits_groups,
    grid,
    nearest,
    output_scales,
    packed,
    values_of,
)

_DAMPING = 0.01
_NARROWER = (1.0, 0.95, 0.9, 0.85, 0.8)


def round_nearest(backbone: Backbone, dtype: Any) -> None:
    """Give every linear layer of the decoder its codes; the head has int8."""
    parts = parts_of(backbone)
    for layer in parts.layers:
        for linear in _linears(layer):
            for part in linear.parts:
                setattr(part, CODES_NAME, nearest(weights_of(part), dtype))
    round_head(parts.head)


def round_head(head: Linear) -> None:
    """Give the head int8 codes: it is where rounding costs most."""
    for part in head.parts:
        setattr(part, CODES_NAME, nearest(weights_of(part), "int8"))


@torch.inference_mode()
def calibrate(
    backbone: Backbone, batches: Sequence[Tensor], report: Callable[[int, int, float], None]
) -> None:
    """Give every linear layer of the decoder codes of 4 bits; its weights become what they stand for.

    Args:
        backbone: in evaluation mode, in fp32.
        batches: token ids (B, T) of a text, all of one shape.
        report: called after each layer with its number, the number of layers, and the part of the squared
            outputs of its linear layers that rounding changed.
    """
    parts = parts_of(backbone)
    modules = _layer_modules(backbone, parts.layers)
    states, calls = _first_states(backbone, modules, batches)
    for number, (module, layer) in enumerate(zip(modules, parts.layers, strict=True)):
        args, kwargs = calls[number]
        linears = _linears(layer)
        with _gathered(linears) as gathered:
            for state in states:
                module(state, *args, **kwargs)
        changed, total = 0.0, 0.0
        for linear, hessian in zip(linears, gathered, strict=True):
            one_changed, one_total = _round(linear, hessian)
            changed, total = changed + one_changed, total + one_total
        states = [_hidden(module(state, *args, **kwargs)) for state in states]
        report(number + 1, len(modules), changed / max(total, 1e-30))
    round_head(parts.head)


def _linears(layer: Layer) -> tuple[Linear, ...]:
    return layer.attention_in, layer.attention_out, layer.mlp_in, layer.mlp_out


def _layer_modules(backbone: Backbone, layers: Sequence[Layer]) -> list[nn.Module]:
    """The module of each layer: what the names of its linear layers begin with."""
    names = {module: name for name, module in backbone.named_modules()}
    found = []
    for layer in layers:
        inner = [names[part].split(".") for linear in _linears(layer) for part in linear.parts]
        common = takewhile(lambda words: len(set(words)) == 1, zip(*inner, strict=False))
        found.append(backbone.get_submodule(".".join(words[0] for words in common)))
    return found


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class _ReachedError(Exception):
    """The first layer has been called."""


def _first_states(
    backbone: Backbone, modules: Sequence[nn.Module], batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What the first layer reads of each batch, and what else each layer is called with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    states: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append((args[1:], others))

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedError

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    backbone(batches[0], use_cache=False)
    for handle in handles:
        handle.remove()
    handle = modules[0].register_forward_pre_hook(stop, with_kwargs=True)
    for batch in batches:
        with suppress(_ReachedError):
            backbone(batch, use_cache=False)
    handle.remove()
    return states, calls


@contextmanager
def _gathered(linears: Sequence[Linear]) -> Iterator[list[Tensor]]:
    """X X^T (K, K) of the inputs that each linear layer gets inside the `with`."""
    sums: list[Tensor] = [torch.zeros(()) for _ in linears]

    def adder(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[number] = sums[number] + rows.T @ rows

        return add

    handles = [
        linear.parts[0].register_forward_pre_hook(adder(number))
        for number, linear in enumerate(linears)
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _round(linear: Linear, hessian: Tensor) -> tuple[float, float]:
    """Give the parts of a linear layer their codes; returns the squared change of outputs, and outputs."""
    originals = [weights_of(part) for part in linear.parts]
    weights = torch.cat(originals)
    codes = nearest(weights, "int4")
    change = _squares(codes.weights() - weights, hessian)
    if fits_groups(weights.shape[1]):
        calibrated = rounded_with_errors_passed_on(weights, hessian)
        calibrated_change = _squares(calibrated.weights() - weights, hessian)
        # Weights that came from 4 bits are nearly right as they are; making up for errors would move them.
        if calibrated_change < change:
            codes, change = calibrated, calibrated_change
    ends = torch.tensor([len(one) for one in originals]).cumsum(0).tolist()
    for part, original, end in zip(linear.parts, originals, ends, strict=True):
        own = codes.rows(torch.arange(end - len(original), end))
        setattr(part, CODES_NAME, own)
        values = own.weights()
        assert isinstance(part.weight, Tensor)
        part.weight.data.copy_(values.T if isinstance(part, Conv1D) else values)
    return change, _squares(weights, hessian)


def _squares(weights: Tensor, hessian: Tensor) -> float:
    """The squared outputs of weights (N, K)."""
    return float(((weights @ hessian) * weights).sum())


def rounded_with_errors_passed_on(weights: Tensor, hessian: Tensor) -> Codes:
    """Codes of 4 bits of the weights (N, K) of a layer whose inputs have the products X X^T (K, K)."""
    num_inputs = weights.shape[1]
    factor = _factor(hessian)
    scales = output_scales(weights)
    left = weights.T.contiguous()  # (K, N): what is changed lies together
    codes, all_scales, all_zeros = torch.empty_like(left), [], []
    for start in range(0, num_inputs, GROUP_SIZE):
        end = start + GROUP_SIZE
        group = left[start:end]
        group_scales, zeros = _best_grid(group.T, scales)
        all_scales.append(group_scales)
        all_zeros.append(zeros)
        errors = torch.empty_like(group)
        for place in range(GROUP_SIZE):
            k, now = start + place, group[place]
            codes[k] = codes_on(now, scales, group_scales, zeros)
            rest = now - values_of(codes[k], scales, group_scales, zeros)
            errors[place] = rest / factor[k, k]
            group[place + 1 :] -= factor[k, k + 1 : end, None] * errors[place]
        left[end:] -= factor[start:end, end:].T @ errors
    return packed(
        codes.T.contiguous(), scales, torch.stack(all_scales, 1), torch.stack(all_zeros, 1)
    )


def _factor(hessian: Tensor) -> Tensor:
    """U (K, K); an input that is always 0 changes nothing."""
    exact = hessian.double()
    diagonal = exact.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(exact))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _best_grid(group: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros (N) of a group of weights (N, 32), with the least squared error."""
    middle = (group.amax(-1, keepdim=True) + group.amin(-1, keepdim=True)) / 2
    best: tuple[Tensor, Tensor] | None = None
    least = torch.empty(0)
    for narrower in _NARROWER:
        group_scales, zeros = grid(middle + (group - middle) * narrower, scales)
        columns = scales[:, None], group_scales[:, None], zeros[:, None]
        errors = (values_of(codes_on(group, *columns), *columns) - group).square().sum(-1)
        if best is None:
            best, least = (group_scales, zeros), errors
            continue
        is_better = errors < least
        best = (
            torch.where(is_better, group_scales, best[0]),
            torch.where(is_better, zeros, best[1]),
        )
        least = torch.where(is_better, errors, least)
    assert best is not None
    return best
