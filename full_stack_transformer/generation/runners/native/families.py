"""What sets families of models apart that the C++ decoder computes: each a few lines of data.

Names of modules and of a configuration's fields, and what the layers compute. Knows nothing of backbones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# As model.h numbers them.
ACTIVATIONS = {
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
FAMILIES = {
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
PLAIN = {
    "is_causal": True,
    "is_heterogeneous": False,
    "use_bidirectional_attention": False,
    "is_encoder_decoder": False,
}
