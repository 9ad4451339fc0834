"""How the families of llama.cpp are written into GGUF: hyperparameters by its names, tensors in its layout.

Each family says what llama.cpp computes by itself, and refuses a config that asks for something else. What
is written here was compared with llama.cpp 0.3.36's loader (llama-model.cpp) and its converter
(convert_hf_to_gguf.py); docs/leaving.md names the families.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import ModelError
from full_stack_transformer.modelling.backbones import context_length

Hyperparameters = dict[str, int | float | bool | str]
# Tensors that are buffers of older versions of transformers, or follow from others.
_LEFT_OUT = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp."""

    architecture: str
    hyperparameters: Callable[[PretrainedConfig], Hyperparameters]
    change: Callable[[str, Tensor, PretrainedConfig], Tensor] = lambda _, tensor, __: tensor
    """From transformers' layout to llama.cpp's."""


def family_of(backbone: Backbone) -> Family:
    """The family of a model.

    Raises:
        ModelError: there is none, or the config asks for what llama.cpp does not compute.
    """
    kind = backbone.config.model_type
    if kind not in FAMILIES:
        raise ModelError(
            f"GGUF files are written of {', '.join(FAMILIES)}; the model is a {kind}: export it with "
            "--format huggingface, and try convert_hf_to_gguf.py of llama.cpp on that"
        )
    return FAMILIES[kind]


def tensors_of(backbone: Backbone, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Names and values as llama.cpp wants them, fp32.

    Raises:
        ModelError: llama.cpp has no place for a tensor.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    config = backbone.config
    (architecture,) = (one for one in MODEL_ARCH if MODEL_ARCH_NAMES[one] == family.architecture)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    output = backbone.get_output_embeddings()
    is_tied = output is not None and output.weight is backbone.get_input_embeddings().weight
    for name, tensor in backbone.state_dict().items():
        if name.endswith(_LEFT_OUT) or (is_tied and name == "lm_head.weight"):
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ModelError(
                f"llama.cpp's {family.architecture} has no place for the tensor {name}"
            )
        yield known, family.change(name, tensor.float(), config)
    divisors = _llama3_divisors(config)
    if divisors is not None:
        yield "rope_freqs.weight", divisors


def _require(config: PretrainedConfig, name: str, *wanted: object) -> None:
    found = getattr(config, name, wanted[0])
    if found not in wanted:
        raise ModelError(
            f"llama.cpp computes {config.model_type} with {name} = {wanted[0]} alone; config.json has {found}"
        )


# ---------------------------------------------------------------------- hyperparameters


def _shape(config: PretrainedConfig) -> Hyperparameters:
    """What all decoders with rotary positions have."""
    width, num_heads = config.hidden_size, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // num_heads
    rope = _rope_parameters(config)
    return {
        "context_length": context_length(config),
        "embedding_length": width,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": num_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or num_heads,
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(head_width * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
        **_scaling(config, rope),
    }


def _rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Of the layers that see the whole text."""
    rope = config.rope_parameters
    return dict(rope.get("full_attention", rope))


def _scaling(config: PretrainedConfig, rope: dict[str, Any]) -> Hyperparameters:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # Llama 3's are a tensor
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    raise ModelError(
        f"positions of rope_type {kind!r} are not written to GGUF; export with --format huggingface and use "
        "convert_hf_to_gguf.py of llama.cpp"
    )


def _llama3_divisors(config: PretrainedConfig) -> Tensor | None:
    """(head width / 2,): what Llama 3 divides its rotary frequencies by, as in transformers."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wave = 2 * pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    length = rope["original_max_position_embeddings"]
    smooth = ((length / wave - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return divisors.float()


def _gpt2(config: PretrainedConfig) -> Hyperparameters:
    _require(config, "activation_function", *_TANH_GELU)
    _require(config, "scale_attn_weights", True)
    _require(config, "scale_attn_by_inverse_layer_idx", False)
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "vocab_size": config.vocab_size,
    }


def _llama(config: PretrainedConfig) -> Hyperparameters:
    _require(config, "hidden_act", "silu")
    return _shape(config)


def _with_window(config: PretrainedConfig) -> Hyperparameters:
    """As long as the window of attention, within which it makes no difference."""
    shape = _llama(config)
    window = getattr(config, "sliding_window", None)
    if window:
        shape["context_length"] = min(int(shape["context_length"]), int(window))
    return shape


def _qwen(config: PretrainedConfig) -> Hyperparameters:
    _require(config, "use_sliding_window", False)
    return _llama(config)


def _granite(config: PretrainedConfig) -> Hyperparameters:
    return {
        **_llama(config),
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _smollm3(config: PretrainedConfig) -> Hyperparameters:
    _require(config, "use_sliding_window", False)
    pattern = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    _require(config, "no_rope_layers", pattern)
    return _llama(config)


def _gemma(config: PretrainedConfig) -> Hyperparameters:
    _require(config, "hidden_activation", *_TANH_GELU)
    _require(config, "query_pre_attn_scalar", config.head_dim)
    return {**_shape(config), "attention.sliding_window": config.sliding_window}


def _gemma2(config: PretrainedConfig) -> Hyperparameters:
    _require(config, "layer_types", _windows(config, every=2))
    return {
        **_gemma(config),
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _gemma3(config: PretrainedConfig) -> Hyperparameters:
    _require(config, "layer_types", _windows(config, every=6))
    _require(config, "attn_logit_softcapping", None)
    _require(config, "final_logit_softcapping", None)
    local = config.rope_parameters["sliding_attention"]
    return {**_gemma(config), "rope.freq_base_swa": float(local["rope_theta"])}


def _windows(config: PretrainedConfig, *, every: int) -> list[str]:
    """Each so many layers one sees the whole text."""
    return [
        "sliding_attention" if (layer + 1) % every else "full_attention"
        for layer in range(config.num_hidden_layers)
    ]


# ---------------------------------------------------------------------- tensors


def _transposed(name: str, tensor: Tensor, _: PretrainedConfig) -> Tensor:
    """GPT-2's Conv1D holds (inputs, outputs)."""
    is_conv1d = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
    return tensor.T.contiguous() if is_conv1d else tensor


def _interleaved(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    """llama.cpp turns neighbouring pairs of a head, transformers pairs of its halves."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }
    part = name.rsplit(".", 2)[-2]
    if part not in heads:
        return tensor
    rows = tensor.reshape(heads[part], 2, -1, *tensor.shape[1:])
    return rows.swapaxes(1, 2).reshape(tensor.shape)


def _plus_one(name: str, tensor: Tensor, _: PretrainedConfig) -> Tensor:
    """Gemma's norms multiply by 1 + weight."""
    return tensor + 1 if name.endswith("norm.weight") else tensor


# model_type -> its family; those with `_interleaved` are llama.cpp's of LLAMA_ROPE_TYPE_NORM.
FAMILIES: dict[str, Family] = {
    "gpt2": Family("gpt2", _gpt2, _transposed),
    "llama": Family("llama", _llama, _interleaved),
    "mistral": Family("llama", _with_window, _interleaved),
    "granite": Family("granite", _granite, _interleaved),
    "smollm3": Family("smollm3", _smollm3, _interleaved),
    "qwen2": Family("qwen2", _qwen),
    "qwen3": Family("qwen3", _qwen),
    "olmo2": Family("olmo2", _llama),
    "gemma2": Family("gemma2", _gemma2, _plus_one),
    "gemma3_text": Family("gemma3", _gemma3, _plus_one),
}
