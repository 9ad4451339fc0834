"""Where the weights of a backbone are, as the C++ decoder takes them.

    backbone --parts_of--> weights of each layer, norms, rotary positions, embeddings, head

Knows nothing of the C++ library.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.generation.runners.native.families import FAMILIES, Family
from full_stack_transformer.quantization.codes import CODES_NAME, Codes, CodesDtype, joined, nearest


@dataclass(frozen=True)
class Linear:
    """A linear layer: the outputs of several of them, in this order."""

    parts: tuple[nn.Module, ...]
    order: Tensor | None = None
    """Of their outputs; none if they stand as the decoder takes them."""

    def weights(self) -> Tensor:
        """Weights (outputs, inputs) in fp32."""
        parts = [weights_of(part) for part in self.parts]
        # A head alone may be the largest of all: it is not copied.
        weights = parts[0] if len(parts) == 1 else torch.cat(parts)
        return weights if self.order is None else weights[self.order].contiguous()

    @property
    def has_codes(self) -> bool:
        """Whether they were rounded before."""
        return hasattr(self.parts[0], CODES_NAME)

    def codes(self, dtype: CodesDtype) -> Codes:
        """Weights as small integers; rounded here, unless the parts bring their own."""
        codes = joined(
            [
                getattr(part, CODES_NAME, None) or nearest(weights_of(part), dtype)
                for part in self.parts
            ]
        )
        return codes if self.order is None else codes.rows(self.order)

    def bias(self) -> Tensor | None:
        """Biases (outputs) in fp32; none where there are none."""
        if all(part.bias is None for part in self.parts):
            return None
        sizes = [size_of(part)[0] for part in self.parts]
        biases = [
            part.bias.float() if isinstance(part.bias, Tensor) else torch.zeros(size)
            for part, size in zip(self.parts, sizes, strict=True)
        ]
        bias = torch.cat(biases)
        return bias if self.order is None else bias[self.order].contiguous()

    def size(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return sum(size_of(part)[0] for part in self.parts), size_of(self.parts[0])[1]


@dataclass(frozen=True)
class Norm:
    """A norm of as many numbers as it has weights."""

    module: Any
    added: float
    """To its weights."""

    def weight(self) -> Tensor:
        """In fp32."""
        weight: Tensor | None = getattr(self.module, "weight", None)
        if weight is None:
            return torch.ones(self.module.normalized_shape)
        return (weight.float() + self.added).contiguous()

    def bias(self) -> Tensor | None:
        """In fp32; none where there is none."""
        bias = getattr(self.module, "bias", None)
        return bias.float().contiguous() if bias is not None else None


@dataclass(frozen=True)
class Rotary:
    """Rotary positions."""

    frequencies: Tensor
    """(half of what is turned of each head), radians per position."""
    scaling: float
    """What cosines and sines are multiplied by."""


@dataclass(frozen=True)
class Layer:
    """The weights of a layer, named as in model.h."""

    attention_in: Linear
    """Queries, keys and values."""
    attention_out: Linear
    mlp_in: Linear
    """Gate and up, where it is gated."""
    mlp_out: Linear
    norms: Mapping[str, Norm]
    """Of `NORMS`, those that there are."""
    window: int
    """Tokens that one sees, with itself; 0 for all."""
    rotary: int
    """Which one of the model; -1 for none."""


@dataclass(frozen=True)
class Parts:
    """The weights of a backbone."""

    token_embeddings: Tensor
    """(vocabulary, hidden)."""
    position_embeddings: Tensor | None
    """(positions, hidden)."""
    rotaries: tuple[Rotary, ...]
    layers: tuple[Layer, ...]
    last_norm: Norm
    head: Linear


def parts_of(backbone: Backbone) -> Parts:
    """Where the weights of a backbone are."""
    family = FAMILIES[backbone.config.model_type]

    def module(name: str) -> Any:
        return backbone.get_submodule(name)

    return Parts(
        token_embeddings=module(family.embeddings).weight,
        position_embeddings=module(family.positions).weight if family.positions else None,
        rotaries=_rotaries(family, backbone),
        layers=tuple(
            _layer(family, backbone.config, number, layer)
            for number, layer in enumerate(module(family.layers))
        ),
        last_norm=Norm(module(family.last_norm), family.added_to_norms),
        head=Linear((backbone.get_output_embeddings(),)),
    )


def _layer(family: Family, config: PretrainedConfig, number: int, layer: nn.Module) -> Layer:
    order = _order_by_part(config) if family.by_head else None
    return Layer(
        attention_in=linear_of(layer, family.attention_in, order),
        attention_out=linear_of(layer, family.attention_out),
        mlp_in=linear_of(layer, family.mlp_in),
        mlp_out=linear_of(layer, family.mlp_out),
        norms={
            name: Norm(layer.get_submodule(path), family.added_to_norms)
            for name, path in family.norms.items()
        },
        window=_window(family, config, number),
        rotary=_rotary(family, config, number),
    )


def linear_of(
    layer: nn.Module, names: str | tuple[str, ...], order: Tensor | None = None
) -> Linear:
    names = (names,) if isinstance(names, str) else names
    return Linear(tuple(layer.get_submodule(name) for name in names), order)


def _order_by_part(config: PretrainedConfig) -> Tensor:
    """All queries, then all keys and all values, of outputs that stand by heads."""
    rows = torch.arange(3 * config.hidden_size).view(config.num_attention_heads, 3, -1)
    return rows.transpose(0, 1).flatten()


def _window(family: Family, config: PretrainedConfig, number: int) -> int:
    if family.windows == "none":
        return 0
    if family.windows == "layer_types" and config.layer_types[number] != "sliding_attention":
        return 0
    return config.sliding_window or 0


def _rotary(family: Family, config: PretrainedConfig, number: int) -> int:
    if family.rotary is None or (
        family.has_rotary and not getattr(config, family.has_rotary)[number]
    ):
        return -1
    kinds = list(ropes_of(config))
    return kinds.index(f"{config.layer_types[number]}_") if len(kinds) > 1 else 0


def ropes_of(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Prefix of the buffers of rotary positions -> what the configuration says of them."""
    ropes: dict[str, Any] = config.rope_parameters
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if any(kind in ropes for kind in kinds):
        return {f"{kind}_": ropes[kind] for kind in kinds}
    return {"": ropes}


def _rotaries(family: Family, backbone: Backbone) -> tuple[Rotary, ...]:
    if family.rotary is None:
        return ()
    module: Any = backbone.get_submodule(family.rotary)
    return tuple(
        Rotary(
            _rotary_frequencies(getattr(module, f"{prefix}inv_freq"), rope),
            float(getattr(module, f"{prefix}attention_scaling")),
        )
        for prefix, rope in ropes_of(backbone.config).items()
    )


def _rotary_frequencies(theirs: Tensor, rope: dict[str, Any]) -> Tensor:
    """Radians per position (half of what is turned) as in transformers, but the same bits everywhere.

    PyTorch's powers in fp32 depend on the processor. Computed again in fp64 for the usual kinds: Su et al.
    2021 (RoFormer), stretched, and as Llama 3 stretches its slow ones.
    """
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        return theirs.float().contiguous()
    half = len(theirs)
    frequencies = [rope["rope_theta"] ** -(number / half) for number in range(half)]
    if kind == "linear":
        frequencies = [one / rope["factor"] for one in frequencies]
    elif kind == "llama3":
        frequencies = [_stretched_as_llama_3(one, rope) for one in frequencies]
    return torch.tensor(frequencies, dtype=torch.float64).float()


def _stretched_as_llama_3(frequency: float, rope: dict[str, float]) -> float:
    """Unchanged if fast, divided if slow, in between interpolated."""
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
    return (1 - smooth) * frequency / rope["factor"] + smooth * frequency


def size_of(linear: nn.Module) -> tuple[int, int]:
    """Outputs and inputs; GPT-2's Conv1D has its weights the other way round."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)


def weights_of(linear: nn.Module) -> Tensor:
    """Weights (outputs, inputs) in fp32."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return (weight if isinstance(linear, nn.Linear) else weight.T).float().contiguous()
