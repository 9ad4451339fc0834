"""An adapter's matrices as the C++ decoder takes them: those beside each of its linear layers, joined.

    AdapterWeights, names of layers that a decoder has joined ──> Joined: down, up, and whose ranks are whose

Knows nothing of the C++ library.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import ModelError
from full_stack_transformer.generation.runners.native.parts import Linear, Parts, size_of
from full_stack_transformer.modelling.adapter_weights import AdapterWeights, LowRank


@dataclass(frozen=True)
class Place:
    """A linear layer of the decoder, by the names that its parts have in the backbone."""

    layer: int
    """-1 for the head."""
    name: int
    """As model.h numbers them."""
    parts: tuple[str, ...]
    num_outputs: tuple[int, ...]
    """Of each part."""
    order: Tensor | None
    """Of the outputs; none if they stand as the decoder takes them."""


@dataclass(frozen=True)
class Joined:
    """What stands beside a linear layer of the decoder, in fp32."""

    down: Tensor
    """(ranks of all parts, inputs)."""
    up: Tensor
    """(outputs, most ranks of a part); an output has the first ones."""
    first_ranks: Tensor
    """(outputs,) where the ranks of an output's part begin."""
    ranks: Tensor
    """(outputs,) how many they are."""


def places_of(parts: Parts, backbone: Backbone) -> list[Place]:
    """All linear layers of a decoder."""
    names = {part: name for name, part in backbone.named_modules()}

    def place(layer: int, number: int, linear: Linear) -> Place:
        sizes = tuple(size_of(part)[0] for part in linear.parts)
        return Place(layer, number, tuple(names[one] for one in linear.parts), sizes, linear.order)

    return [
        *(
            place(layer, number, linear)
            for layer, one in enumerate(parts.layers)
            for number, linear in enumerate(
                (one.attention_in, one.attention_out, one.mlp_in, one.mlp_out)
            )
        ),
        place(-1, 0, parts.head),
    ]


def joined(adapter: AdapterWeights, places: list[Place]) -> Iterator[tuple[Place, Joined]]:
    """What stands beside each linear layer that the adapter changes.

    Raises:
        ModelError: it changes another one.
    """
    others = set(adapter.layers) - {name for place in places for name in place.parts}
    if others:
        raise ModelError(
            f"the adapter {adapter.directory} does not fit: the C++ decoder has no layer {min(others)}"
        )
    for place in places:
        matrices = [adapter.layers.get(name) for name in place.parts]
        if any(matrices):
            yield place, _join(matrices, place)


def num_numbers(adapter: AdapterWeights, places: list[Place]) -> int:
    """What the decoder keeps of it, with what fills up ranks and outputs."""
    total = 0
    for place in places:
        matrices = [adapter.layers.get(name) for name in place.parts]
        found = [one for one in matrices if one]
        if found:
            num_ranks = sum(one.rank for one in found)
            total += -(-num_ranks // 4) * 4 * found[0].down.shape[1]
            total += sum(-(-len(one.up) // 32) * 32 * one.rank for one in found)
    return total


def _join(matrices: list[LowRank | None], place: Place) -> Joined:
    ranks = [one.rank if one else 0 for one in matrices]
    up = torch.zeros(sum(place.num_outputs), max(ranks))
    first_ranks, own_ranks = torch.zeros(2, len(up), dtype=torch.int32)
    row, first = 0, 0
    for one, rank, num_outputs in zip(matrices, ranks, place.num_outputs, strict=True):
        rows = slice(row, row + num_outputs)
        if one:
            up[rows, :rank] = one.up
        first_ranks[rows], own_ranks[rows] = first, rank
        row, first = row + num_outputs, first + rank
    if place.order is not None:
        up, first_ranks, own_ranks = (one[place.order] for one in (up, first_ranks, own_ranks))
    down = torch.cat([one.down for one in matrices if one])
    return Joined(down.contiguous(), up.contiguous(), first_ranks, own_ranks)
