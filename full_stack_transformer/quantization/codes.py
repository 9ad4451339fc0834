"""Weights of linear layers as small integers: their format, and rounding to the nearest.

    int8   rotated weight = scale of the output * code                                     codes -127 … 127
    int4   weight = scale of the output * scale of the group * (code - zero / 16)          codes 0 … 15

A group is 32 inputs of an output; its scale is 1 … 255 and its zero 0 … 255. With the codes that makes 4.5
bits a weight, as with a scale alone in fp16. Yet it represents what has a scale and a minimum (GGUF's Q4_1,
in which many models are published) almost exactly: perplexity of SmolLM2 +0.1 %, with a scale alone +24 %.

The weights of int8 are rotated before they are rounded, and so are the inputs that they are multiplied with:
see `rotated`. Without it SmolLM2's few large inputs cost 3 to 5 % of perplexity, with it 0.3 %.

Every operation is on single numbers, so the codes have the same bits on every processor. Knows nothing of
models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CodesDtype = Literal["int8", "int4"]
GROUP_SIZE = 32
CODES_NAME = "quantized_weights"
"""The attribute of a linear layer that holds its `Codes`, where they have been made before."""
_MAX_CODE, _MAX_SCALE, _MAX_ZERO, _ZERO_STEPS = 15, 255, 255, 16
# As the C++ decoder: what is smaller counts as 0.
_SMALLEST = 1e-30
# Weights rounded at once: some temporary tensors of 4 MB.
_VALUES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Codes:
    """The weights (outputs, inputs) of a linear layer."""

    codes: Tensor
    """int8: (outputs, inputs). int4: (outputs, inputs / 2) of uint8, the even input in the low half."""
    scales: Tensor
    """(outputs) in fp32."""
    group_scales: Tensor | None = None
    """int4: (outputs, inputs / 32) of uint8."""
    zeros: Tensor | None = None
    """int4: (outputs, inputs / 32) of uint8, in sixteenths of a code."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.codes.shape[0], self.codes.shape[1] * (1 if self.group_scales is None else 2)

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        named = {
            "codes": self.codes,
            "scales": self.scales,
            "group_scales": self.group_scales,
            "zeros": self.zeros,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def rows(self, order: Tensor) -> "Codes":
        """Some outputs, in this order."""
        return Codes(**{name: tensor[order] for name, tensor in self.tensors().items()})

    def weights(self) -> Tensor:
        """The weights (outputs, inputs) that they stand for, in fp32."""
        if self.group_scales is None or self.zeros is None:
            return rotated(self.codes.float() * self.scales[:, None])
        values = torch.stack([self.codes & 15, self.codes >> 4], -1).view(
            len(self.codes), -1, GROUP_SIZE
        )
        steps = self.scales[:, None] * self.group_scales.float()
        centered = values.float() - self.zeros.float()[..., None] / _ZERO_STEPS
        return (centered * steps[..., None]).view(self.shape)


def fits_groups(num_inputs: int) -> bool:
    """Whether weights with so many inputs can be rounded to int4; others stay int8."""
    return num_inputs % GROUP_SIZE == 0


def joined(parts: Sequence[Codes]) -> Codes:
    """The outputs of several layers of the same inputs, one after another."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part.tensors() for part in parts]
    return Codes(**{name: torch.cat([one[name] for one in tensors]) for name in tensors[0]})


def nearest(weights: Tensor, dtype: CodesDtype) -> Codes:
    """Each weight (outputs, inputs) rounded by itself; int8 where the inputs make no groups of 32."""
    weights = weights.detach().float()
    is_int8 = dtype == "int8" or not fits_groups(weights.shape[1])
    rounded = _nearest_int8 if is_int8 else _nearest_int4
    rows = max(1, _VALUES_AT_ONCE // weights.shape[1])
    return joined([rounded(piece) for piece in torch.split(weights, rows)])


def rotated(weights: Tensor) -> Tensor:
    """Each block of weights (outputs, inputs) times a Hadamard matrix / sqrt(block), which undoes itself.

    A block is the largest power of 2 that divides the inputs. It spreads what few inputs hold over all of
    them, so that one scale serves all: Ashkboos et al. 2024 (QuaRot, arXiv 2404.00456).
    """
    num_inputs = weights.shape[1]
    block = num_inputs & -num_inputs
    half = 1
    while half < block:
        pairs = weights.reshape(len(weights), -1, 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        weights = torch.stack([first + second, first - second], 2)
        half *= 2
    return weights.reshape(-1, num_inputs) / math.sqrt(block)


def _nearest_int8(weights: Tensor) -> Codes:
    weights = rotated(weights)
    largest = weights.abs().amax(1)
    scales = torch.where(largest > _SMALLEST, largest / 127, torch.ones_like(largest))
    return Codes((weights / scales[:, None]).round().to(torch.int8), scales)


def _nearest_int4(weights: Tensor) -> Codes:
    groups = weights.view(len(weights), -1, GROUP_SIZE)
    scales = output_scales(weights)
    group_scales, zeros = grid(groups, scales[:, None])
    codes = codes_on(groups, scales[:, None, None], group_scales[..., None], zeros[..., None])
    return packed(codes.view(weights.shape), scales, group_scales, zeros)


def output_scales(weights: Tensor) -> Tensor:
    """Scales (outputs) with which the widest group of each output has the scale 255."""
    groups = weights.view(len(weights), -1, GROUP_SIZE)
    widths = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    largest = widths.amax(1)
    scales = largest / (_MAX_CODE * _MAX_SCALE)
    return torch.where(largest > _SMALLEST, scales, torch.ones_like(scales))


def grid(groups: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros (…) of groups of weights (…, 32): from the smallest to the largest, and to 0.

    Args:
        groups: weights.
        scales: of their outputs (…).
    """
    smallest, largest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    group_scales = ((largest - smallest) / _MAX_CODE / scales).round().clamp(1, _MAX_SCALE)
    zeros = (-smallest / (group_scales * scales) * _ZERO_STEPS).round().clamp(0, _MAX_ZERO)
    return group_scales, zeros


def codes_on(weights: Tensor, scales: Tensor, group_scales: Tensor, zeros: Tensor) -> Tensor:
    """The codes of weights on a grid; all shapes fit each other."""
    steps = weights / (group_scales * scales)
    return (steps + zeros / _ZERO_STEPS).round().clamp(0, _MAX_CODE)


def values_of(codes: Tensor, scales: Tensor, group_scales: Tensor, zeros: Tensor) -> Tensor:
    """What codes on a grid stand for."""
    return (codes - zeros / _ZERO_STEPS) * (group_scales * scales)


def packed(codes: Tensor, scales: Tensor, group_scales: Tensor, zeros: Tensor) -> Codes:
    """Codes (outputs, inputs), scales (outputs), scales and zeros (outputs, groups), in few bytes."""
    pairs = codes.to(torch.uint8)
    return Codes(
        codes=pairs[:, ::2] | pairs[:, 1::2] << 4,
        scales=scales,
        group_scales=group_scales.to(torch.uint8),
        zeros=zeros.to(torch.uint8),
    )
