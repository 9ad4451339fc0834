"""What the C++ decoder needs to know of a backbone of transformers: its sizes, and where its weights are.

Knows nothing of the C++ library.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone

_LANES = 16


@dataclass(frozen=True)
class Linear:
    """A linear layer: the outputs of several of them, in this order."""

    parts: tuple[nn.Module, ...]

    def weights(self) -> Tensor:
        """Weights (outputs, inputs) in fp32."""
        return torch.cat([_weights(part) for part in self.parts])

    def bias(self) -> Tensor | None:
        """Biases (outputs) in fp32; none where there are none."""
        biases = [part.bias for part in self.parts if isinstance(part.bias, Tensor)]
        return torch.cat(biases).float().contiguous() if biases else None


@dataclass(frozen=True)
class Layer:
    """The weights of a layer, named as in model.h."""

    attention_in: Linear
    """Queries, keys and values."""
    attention_out: Linear
    mlp_in: Linear
    """Gate and up, where it is gated."""
    mlp_out: Linear
    attention_norm: nn.Module
    mlp_norm: nn.Module


@dataclass(frozen=True)
class Parts:
    """The weights of a backbone."""

    token_embeddings: Tensor
    """(vocabulary, hidden)."""
    position_embeddings: Tensor | None
    """(positions, hidden)."""
    rotary: tuple[Tensor, float] | None
    """Radians per position (head size / 2), and what cosines and sines are multiplied by."""
    layers: tuple[Layer, ...]
    last_norm: nn.Module
    head: Linear


def why_not_family(config: PretrainedConfig) -> str | None:
    """Why the decoder cannot compute such a backbone; none if it can."""
    if config.model_type not in _PARTS:
        return f"it knows llama and gpt2, not {config.model_type}"
    problem = _why_not_llama(config) if config.model_type == "llama" else _why_not_gpt2(config)
    sizes = (config.hidden_size, _head_size(config), _intermediate_size(config))
    if problem is None and any(size % _LANES for size in sizes):
        problem = f"its sizes {sizes} are no multiples of {_LANES}"
    return problem


def _why_not_llama(config: PretrainedConfig) -> str | None:
    if config.hidden_act != "silu":
        return f"it knows SwiGLU, not {config.hidden_act}"
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        return "its rotary positions depend on the length"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "its rotary positions turn a part of each head"
    return None


def _why_not_gpt2(config: PretrainedConfig) -> str | None:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        return f"it knows gelu_new, not {config.activation_function}"
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return "its attention is scaled in an unusual way"
    return None


def shape_of(config: PretrainedConfig) -> dict[str, float]:
    """Fields of `DecoderShape` that follow from the configuration alone."""
    is_llama = config.model_type == "llama"
    head_size = _head_size(config)
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads
        if is_llama
        else config.num_attention_heads,
        "head_size": head_size,
        "intermediate_size": _intermediate_size(config),
        "is_gated": is_llama,
        "centers_in_norm": not is_llama,
        "has_rotary": is_llama,
        "norm_epsilon": config.rms_norm_eps if is_llama else config.layer_norm_epsilon,
        "attention_scale": head_size**-0.5,
    }


def parts_of(backbone: Backbone) -> Parts:
    """Where the weights of a backbone are."""
    return _PARTS[backbone.config.model_type](backbone)


def _llama_parts(backbone: Any) -> Parts:
    model = backbone.model
    frequencies = _rotary_frequencies(model.rotary_emb, backbone.config)
    return Parts(
        token_embeddings=model.embed_tokens.weight,
        position_embeddings=None,
        rotary=(frequencies, float(model.rotary_emb.attention_scaling)),
        layers=tuple(_llama_layer(layer) for layer in model.layers),
        last_norm=model.norm,
        head=Linear((backbone.lm_head,)),
    )


def _llama_layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        attention_in=Linear((attention.q_proj, attention.k_proj, attention.v_proj)),
        attention_out=Linear((attention.o_proj,)),
        mlp_in=Linear((mlp.gate_proj, mlp.up_proj)),
        mlp_out=Linear((mlp.down_proj,)),
        attention_norm=layer.input_layernorm,
        mlp_norm=layer.post_attention_layernorm,
    )


def _gpt2_parts(backbone: Any) -> Parts:
    model = backbone.transformer
    return Parts(
        token_embeddings=model.wte.weight,
        position_embeddings=model.wpe.weight,
        rotary=None,
        layers=tuple(_gpt2_layer(layer) for layer in model.h),
        last_norm=model.ln_f,
        head=Linear((backbone.lm_head,)),
    )


def _gpt2_layer(layer: Any) -> Layer:
    return Layer(
        attention_in=Linear((layer.attn.c_attn,)),
        attention_out=Linear((layer.attn.c_proj,)),
        mlp_in=Linear((layer.mlp.c_fc,)),
        mlp_out=Linear((layer.mlp.c_proj,)),
        attention_norm=layer.ln_1,
        mlp_norm=layer.ln_2,
    )


_PARTS: dict[str, Callable[[Any], Parts]] = {"llama": _llama_parts, "gpt2": _gpt2_parts}


def _weights(linear: nn.Module) -> Tensor:
    """Weights (outputs, inputs) in fp32; GPT-2's Conv1D has them the other way round."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return (weight if isinstance(linear, nn.Linear) else weight.T).float().contiguous()


def _rotary_frequencies(rotary: Any, config: PretrainedConfig) -> Tensor:
    """Radians per position (head size / 2) as transformers computes them, but the same bits everywhere.

    PyTorch's powers in fp32 depend on the processor. Computed again in fp64 for the usual kinds: Su et al.
    2021 (RoFormer), stretched, and as Llama 3 stretches its slow ones.
    """
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        theirs: Tensor = rotary.inv_freq.float().contiguous()
        return theirs
    half = len(rotary.inv_freq)
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


def _intermediate_size(config: PretrainedConfig) -> int:
    if config.model_type == "gpt2":
        return int(config.n_inner or 4 * config.hidden_size)
    return int(config.intermediate_size)
