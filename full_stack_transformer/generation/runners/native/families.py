"""Which models the C++ decoder computes: what sets their families apart, and where their weights are.

A family is a few lines of data. Where a configuration asks for more, the model goes through PyTorch. Knows
nothing of the C++ library.

    backbone --why_not_family--> a reason, or none --shape_of--> numbers --parts_of--> weights
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from full_stack_transformer.quantization.codes import (
    CODES_NAME,
    Codes,
    CodesDtype,
    joined,
    nearest,
)

_LANES = 16
# As model.h numbers them.
_ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish"), 0),
    **dict.fromkeys(("gelu", "gelu_python"), 1),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), 2),
}
NORMS = (
    *("attention_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm"),
    *("query_norm", "key_norm"),
)
"""Norms that a layer may have, as model.h orders them: before and after attention and MLP, of all queries and
keys or of each head's."""


# ------------------------------------------------------------------ families


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of the modules and of the configuration's fields, and what the layers compute."""

    embeddings: str = "model.embed_tokens"
    positions: str | None = None
    """Embeddings of positions."""
    layers: str = "model.layers"
    last_norm: str = "model.norm"
    rotary: str | None = "model.rotary_emb"
    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    norms: Mapping[str, str]
    """Of `NORMS`."""

    activation: str = "hidden_act"
    epsilon: str | float = "rms_norm_eps"
    scale_of: str | None = None
    """Scores are divided by the root of this field; none for the size of a head."""
    attention_scale: str | None = None
    """Scores are multiplied by this field instead."""
    embedding_scale: str | None = None
    residual_scale: str | None = None
    logit_divisor: str | None = None
    attention_cap: str | None = None
    logit_cap: str | None = None
    is_parallel: str | bool = False
    """Whether MLPs read what attention reads."""
    has_rotary: str | None = None
    """For each layer; none if all have."""

    windows: Literal["none", "all", "layer_types"] = "none"
    """Layers that see the last `sliding_window` tokens."""
    is_gated: bool = True
    centers_in_norm: bool = False
    added_to_norms: float = 0.0
    """What is added to the weights of norms."""
    scales_embeddings: bool = False
    """By the root of the hidden size."""
    turns_a_part: bool = False
    """Rotary positions may turn a part of each head."""
    by_head: bool = False
    """Query, key and value of a head stand together."""
    plain: Mapping[str, Any] = field(default_factory=dict)
    """What other fields must say."""


_BEFORE = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_AFTER = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_OF_QUERIES = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_LLAMA = Family(norms=_BEFORE)
_GEMMA_2 = Family(
    norms={
        "attention_norm": "input_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        **_AFTER,
    },
    activation="hidden_activation",
    scale_of="query_pre_attn_scalar",
    attention_cap="attn_logit_softcapping",
    logit_cap="final_logit_softcapping",
    windows="layer_types",
    added_to_norms=1.0,
    scales_embeddings=True,
)
_FAMILIES = {
    "gpt2": Family(
        embeddings="transformer.wte",
        positions="transformer.wpe",
        layers="transformer.h",
        last_norm="transformer.ln_f",
        rotary=None,
        attention_in=("attn.c_attn",),
        attention_out="attn.c_proj",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        norms={"attention_norm": "ln_1", "mlp_norm": "ln_2"},
        activation="activation_function",
        epsilon="layer_norm_epsilon",
        is_gated=False,
        centers_in_norm=True,
        plain={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, windows="all"),
    "qwen2": replace(_LLAMA, windows="layer_types"),
    "qwen3": replace(_LLAMA, windows="layer_types", norms=_BEFORE | _OF_QUERIES),
    "smollm3": replace(_LLAMA, windows="layer_types", has_rotary="no_rope_layers"),
    "olmo2": replace(_LLAMA, norms=_AFTER | _OF_QUERIES),
    "phi3": replace(
        _LLAMA,
        attention_in=("self_attn.qkv_proj",),
        mlp_in=("mlp.gate_up_proj",),
        windows="all",
        turns_a_part=True,
    ),
    "gemma2": _GEMMA_2,
    "gemma3_text": replace(
        _GEMMA_2,
        norms={**_GEMMA_2.norms, **_OF_QUERIES},
        attention_cap=None,
        plain={"attn_logit_softcapping": None},
    ),
    "gpt_neox": Family(
        embeddings="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        last_norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
        attention_in=("attention.query_key_value",),
        attention_out="attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        norms=_BEFORE,
        epsilon="layer_norm_eps",
        is_parallel="use_parallel_residual",
        is_gated=False,
        centers_in_norm=True,
        turns_a_part=True,
        by_head=True,
    ),
    "granite": replace(
        _LLAMA,
        attention_scale="attention_multiplier",
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    "olmo": replace(_LLAMA, epsilon=1e-5, centers_in_norm=True, plain={"clip_qkv": None}),
    "phi": Family(
        last_norm="model.final_layernorm",
        attention_out="self_attn.dense",
        mlp_in=("mlp.fc1",),
        mlp_out="mlp.fc2",
        norms=dict.fromkeys(("attention_norm", "mlp_norm"), "input_layernorm"),
        epsilon="layer_norm_eps",
        is_parallel=True,
        is_gated=False,
        centers_in_norm=True,
        turns_a_part=True,
        plain={"qk_layernorm": False},
    ),
    "stablelm": replace(
        _LLAMA,
        epsilon="layer_norm_eps",
        centers_in_norm=True,
        turns_a_part=True,
        plain={"qk_layernorm": False, "use_parallel_residual": False},
    ),
    "starcoder2": replace(
        _LLAMA,
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        epsilon="norm_epsilon",
        windows="all",
        is_gated=False,
        centers_in_norm=True,
    ),
}
# Of any family: what transformers lets every configuration say.
_PLAIN = {
    "is_causal": True,
    "is_heterogeneous": False,
    "use_bidirectional_attention": False,
    "is_encoder_decoder": False,
}


# ------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Linear:
    """A linear layer: the outputs of several of them, in this order."""

    parts: tuple[nn.Module, ...]
    order: Tensor | None = None
    """Of their outputs; none if they stand as the decoder takes them."""

    def weights(self) -> Tensor:
        """Weights (outputs, inputs) in fp32."""
        weights = torch.cat([weights_of(part) for part in self.parts])
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
        sizes = [_size(part)[0] for part in self.parts]
        biases = [
            part.bias.float() if isinstance(part.bias, Tensor) else torch.zeros(size)
            for part, size in zip(self.parts, sizes, strict=True)
        ]
        bias = torch.cat(biases)
        return bias if self.order is None else bias[self.order].contiguous()

    def size(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return sum(_size(part)[0] for part in self.parts), _size(self.parts[0])[1]


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


# ------------------------------------------------------------------ from a backbone


def why_not_family(backbone: Backbone) -> str | None:
    """Why the decoder cannot compute such a backbone; none if it can."""
    config = backbone.config
    family = _FAMILIES.get(config.model_type)
    if family is None:
        return f"it knows {', '.join(_FAMILIES)}, not {config.model_type}"
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    if type(backbone) is not getattr(transformers, name):
        return f"it knows {name}, not {type(backbone).__name__}"
    return next(_problems(family, backbone), None)


def _problems(family: Family, backbone: Backbone) -> Iterator[str]:
    config = backbone.config
    for name, value in (_PLAIN | dict(family.plain)).items():
        found = getattr(config, name, value)
        if (found or None) != (value or None):
            yield f"its {name} is {found}"
    activation = getattr(config, family.activation)
    if activation not in _ACTIVATIONS:
        yield f"it knows {', '.join(_ACTIVATIONS)}, not {activation}"
    if family.windows == "layer_types":
        unknown = set(config.layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            yield f"it has layers of {', '.join(sorted(unknown))}"
        if "sliding_attention" in config.layer_types and not config.sliding_window:
            yield f"its sliding_window is {config.sliding_window}"
    yield from _problems_of_rotary(family, backbone)
    yield from _problems_of_sizes(family, backbone)


def _problems_of_rotary(family: Family, backbone: Backbone) -> Iterator[str]:
    if family.rotary is None:
        return
    module: Any = backbone.get_submodule(family.rotary)
    for prefix, rope in _ropes(backbone.config).items():
        kind = rope.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            yield "its rotary positions depend on the length"
        elif kind not in ("default", "linear", "llama3", "yarn"):
            yield f"its rotary positions are of kind {kind}"
        num_turned = 2 * len(getattr(module, f"{prefix}inv_freq"))
        if num_turned != _head_size(backbone.config) and not family.turns_a_part:
            yield "its rotary positions turn a part of each head"


def _problems_of_sizes(family: Family, backbone: Backbone) -> Iterator[str]:
    config, hidden = backbone.config, backbone.config.hidden_size
    linears = [backbone.get_output_embeddings()]
    names = (*family.attention_in, family.attention_out, *family.mlp_in, family.mlp_out)
    layers: Any = backbone.get_submodule(family.layers)
    linears += [layer.get_submodule(name) for layer in layers for name in names]
    # Weights that are packed or adapted have classes of their own.
    for linear in linears:
        if type(linear) not in (nn.Linear, Conv1D):
            yield f"it has layers of class {type(linear).__name__}"
            return
    inner, head_size = _intermediate_size(family, backbone), _head_size(config)
    sizes = (hidden, head_size, inner)
    if any(size % _LANES for size in sizes):
        yield f"its sizes {sizes} are no multiples of {_LANES}"
    num_heads, num_kv_heads = config.num_attention_heads, _num_key_value_heads(config)
    if num_heads % num_kv_heads:
        yield f"its {num_heads} heads of queries do not share {num_kv_heads} of keys evenly"
    attended = num_heads * head_size
    expected = {
        "attention_in": (attended + 2 * num_kv_heads * head_size, hidden),
        "attention_out": (hidden, attended),
        "mlp_in": (inner * (2 if family.is_gated else 1), hidden),
        "mlp_out": (hidden, inner),
    }
    vocab_size = backbone.get_input_embeddings().num_embeddings
    for layer in layers:
        found = {name: _linear(layer, getattr(family, name)).size() for name in expected}
        if found != expected:
            yield f"its layers have sizes {found}, not {expected}"
    if _size(linears[0]) != (vocab_size, hidden):
        yield f"its head has sizes {_size(linears[0])}, not {(vocab_size, hidden)}"


def shape_of(backbone: Backbone) -> dict[str, float]:
    """Fields of `DecoderShape` that follow from the backbone alone."""
    config = backbone.config
    family = _FAMILIES[config.model_type]
    head_size = _head_size(config)

    def value(name: str | float | None, default: float = 0.0) -> float:
        """What the field of this name says, or the number itself."""
        if isinstance(name, str):
            name = getattr(config, name)
        return default if name is None else float(name)

    own_scale = value(family.scale_of, head_size) ** -0.5
    root = config.hidden_size**0.5 if family.scales_embeddings else 1.0
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": _num_key_value_heads(config),
        "head_size": head_size,
        "intermediate_size": _intermediate_size(family, backbone),
        "activation": _ACTIVATIONS[getattr(config, family.activation)],
        "is_gated": family.is_gated,
        "is_parallel": int(value(family.is_parallel)),
        "centers_in_norm": family.centers_in_norm,
        "norm_epsilon": value(family.epsilon),
        "attention_scale": value(family.attention_scale, own_scale),
        "embedding_scale": value(family.embedding_scale, root),
        "residual_scale": value(family.residual_scale, 1.0),
        "logit_scale": 1 / value(family.logit_divisor, 1.0),
        "attention_cap": value(family.attention_cap),
        "logit_cap": value(family.logit_cap),
    }


def parts_of(backbone: Backbone) -> Parts:
    """Where the weights of a backbone are."""
    family = _FAMILIES[backbone.config.model_type]

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
        attention_in=_linear(layer, family.attention_in, order),
        attention_out=_linear(layer, family.attention_out),
        mlp_in=_linear(layer, family.mlp_in),
        mlp_out=_linear(layer, family.mlp_out),
        norms={
            name: Norm(layer.get_submodule(path), family.added_to_norms)
            for name, path in family.norms.items()
        },
        window=_window(family, config, number),
        rotary=_rotary(family, config, number),
    )


def _linear(layer: nn.Module, names: str | tuple[str, ...], order: Tensor | None = None) -> Linear:
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
    kinds = list(_ropes(config))
    return kinds.index(f"{config.layer_types[number]}_") if len(kinds) > 1 else 0


def _ropes(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
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
        for prefix, rope in _ropes(backbone.config).items()
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


def _head_size(config: PretrainedConfig) -> int:
    size: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return size


def _num_key_value_heads(config: PretrainedConfig) -> int:
    number: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return number


def _intermediate_size(family: Family, backbone: Backbone) -> int:
    layers: Any = backbone.get_submodule(family.layers)
    return _size(layers[0].get_submodule(family.mlp_out))[1]


def _size(linear: nn.Module) -> tuple[int, int]:
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
