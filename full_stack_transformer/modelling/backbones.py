"""New models with the head that a task needs, from a preset or a config.

Knows nothing of datasets and of training.
"""

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import MODEL_PRESETS
from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.machine import check_free_memory
from full_stack_transformer.quantization.codes import CODES_NAME

# name -> (layers, hidden size, attention heads). Decoders with rotary positions, RMSNorm, SwiGLU and tied
# embeddings: at the same number of parameters and tokens they reach a lower loss than GPT-2's shape.
DECODER_PRESETS: dict[str, tuple[int, int, int]] = {
    "tiny": (2, 64, 2),
    "micro": (2, 128, 2),
    "mini": (4, 192, 3),
    "small": (6, 384, 6),
    "base": (12, 768, 12),
}
GPT2_PRESET = "gpt2"
# Encoders have the same sizes and ModernBERT's architecture, with pre-norm. BERT's own post-norm does not
# learn from scratch at these sizes.
ENCODER_PREFIX, DECODER_PREFIX = "encoder-", "decoder-"


def new_backbone(
    model_config: str,
    *,
    vocab_size: int,
    max_length: int,
    special_token_ids: dict[str, int],
    dropout: float = 0.0,
    model_class: Any = AutoModelForCausalLM,
    **fields: Any,
) -> Backbone:
    """A model with random weights.

    Args:
        model_config: name of a preset, or a JSON file with the fields of a transformers config. A preset
            is a decoder for a causal language model and an encoder otherwise; the prefix `encoder-` or
            `decoder-` decides explicitly.
        vocab_size: number of token ids.
        max_length: context length in tokens.
        special_token_ids: ids under `begin`, `end` and `pad`.
        dropout: probability, if the architecture has dropout.
        model_class: of transformers: the body with the head that the task needs.
        fields: more fields of the config, from the task.

    Raises:
        UsageError: there is no such preset or file.
        ModelError: the file does not describe a model with such a head.
    """
    shared = {
        **fields,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_length,
        "bos_token_id": special_token_ids["begin"],
        "eos_token_id": special_token_ids["end"],
        "pad_token_id": special_token_ids["pad"],
    }
    config = (
        _encoder_config(model_config, shared, dropout, is_default=not is_causal(model_class))
        or _config_from_preset(model_config.removeprefix(DECODER_PREFIX), shared, dropout)
        or _config_from_file(model_config, shared)
    )
    return backbone_of_config(config, model_class, model_config)


def backbone_of_config(config: PretrainedConfig, model_class: Any, origin: str) -> Backbone:
    """A model of this config with random weights.

    Raises:
        ModelError: the architecture has no such head.
        MachineError: memory is short for its weights.
    """
    expected = getattr(model_class, "config_class", None)
    if expected is not None and not isinstance(config, expected):
        raise ModelError(
            f"{origin} describes a model of type {config.model_type!r}, but {model_class.__name__} has type "
            f"{expected.model_type!r}; pass a JSON file with that model_type as --model_config"
        )
    try:
        # A custom class has no `from_config`.
        if not hasattr(model_class, "from_config"):
            return model_class(config)
        device = torch.get_default_device()
        if device.type != "meta":
            with torch.device("meta"):  # nothing is allocated or drawn there
                size = num_parameters(model_class.from_config(config, trust_remote_code=False))
            check_free_memory(4 * size, f"the weights of {origin}", device)
        return model_class.from_config(config, trust_remote_code=False)
    except ValueError as error:
        what = describe(model_class)
        raise ModelError(f"{origin} does not describe {what}: {error}") from error


def convert(backbone: Backbone, dtype: torch.dtype) -> Backbone:
    """The backbone with weights of this type, changed in place, as if transformers had opened it so.

    What transformers keeps in fp32 stays: rotary frequencies in bfloat16 put the tokens at positions above
    2,000 in places that the model has not been trained on.
    """
    if dtype == torch.float32:
        return backbone.to(dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            opened = type(backbone)(backbone.config)
    finally:
        torch.set_default_dtype(default)
    tensors = [*opened.named_parameters(), *opened.named_buffers()]
    dtypes = {name: tensor.dtype for name, tensor in tensors}
    exact = getattr(backbone, "_keep_in_fp32_modules_strict", None) or ()
    patterns = [re.compile(name.replace("*", ".*")) for name in exact]
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        is_exact = any(pattern.search(name) for pattern in patterns)
        tensor.data = tensor.data.to(torch.float32 if is_exact else dtypes.get(name, dtype))
    return backbone


def quieten_transformers() -> None:
    """No progress bar for each file, and no report of tensors: missing ones raise an error here.

    transformers also recommends a mask for padding on the right, which a causal model never sees, and lists
    layers that tensor parallelism would not split.
    """
    transformers.utils.logging.disable_progress_bar()
    for name in ("modeling_utils", "distributed.tensor_parallel"):
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)


def is_causal(model_class: Any) -> bool:
    """Whether it opens models that continue texts."""
    return model_class is AutoModelForCausalLM


def outline_of(backbone: Backbone) -> Backbone:
    """The same layers and configuration without memory for weights."""
    nowhere: dict[int, Any] = {}
    for weights in backbone.parameters():
        empty = torch.empty_like(weights, device="meta")
        nowhere[id(weights)] = nn.Parameter(empty, requires_grad=False)
    for buffer in backbone.buffers():
        nowhere[id(buffer)] = torch.empty_like(buffer, device="meta")
    for part in backbone.modules():  # the codes of rounded weights are no parameters
        if hasattr(part, CODES_NAME):
            nowhere[id(getattr(part, CODES_NAME))] = None
    return copy.deepcopy(backbone, nowhere)


def describe(model_class: Any) -> str:
    """What it opens, in words."""
    if is_causal(model_class):
        return "causal language model"
    return f"model for {model_class.__name__.removeprefix('AutoModelFor')}"


def context_length(config: PretrainedConfig) -> int:
    """The longest input of the model, in tokens."""
    for name in ("max_position_embeddings", "n_positions"):
        length = getattr(config, name, None)
        if length:
            return int(length)
    raise ModelError(f"the config of {config.model_type} names no context length")


def num_parameters(backbone: Backbone) -> int:
    """Number of weights; tied ones count once."""
    return sum(parameter.numel() for parameter in backbone.parameters())


def _config_from_preset(
    name: str, shared: dict[str, Any], dropout: float
) -> PretrainedConfig | None:
    if name == GPT2_PRESET:
        return AutoConfig.for_model(
            "gpt2",
            **{key: value for key, value in shared.items() if key != "max_position_embeddings"},
            n_positions=shared["max_position_embeddings"],
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    if name not in DECODER_PRESETS:
        return None
    num_layers, hidden_size, num_heads = DECODER_PRESETS[name]
    return LlamaConfig(
        **shared,
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        # SwiGLU has three matrices where GELU has two: 8/3 of the width instead of 4 keeps the count.
        intermediate_size=-(-hidden_size * 8 // 3 // 64) * 64,
        num_attention_heads=num_heads,
        tie_word_embeddings=True,
        attention_dropout=dropout,
    )


def _encoder_config(
    model_config: str, shared: dict[str, Any], dropout: float, *, is_default: bool
) -> PretrainedConfig | None:
    name = model_config.removeprefix(ENCODER_PREFIX)
    if name not in DECODER_PRESETS or (name == model_config and not is_default):
        return None
    num_layers, hidden_size, num_heads = DECODER_PRESETS[name]
    return AutoConfig.for_model(
        "modernbert",
        **shared,
        cls_token_id=shared["bos_token_id"],
        sep_token_id=shared["eos_token_id"],
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        # GeGLU has three matrices where GELU has two.
        intermediate_size=-(-hidden_size * 8 // 3 // 64) * 64,
        num_attention_heads=num_heads,
        # One token cannot see past the window of a local layer; the mean of all sees everything.
        classifier_pooling="mean",
        classifier_dropout=dropout,
        mlp_dropout=dropout,
        embedding_dropout=dropout,
        attention_dropout=dropout,
    )


def _config_from_file(model_config: str, shared: dict[str, Any]) -> PretrainedConfig:
    path = Path(model_config)
    if not path.is_file():
        presets = ", ".join(MODEL_PRESETS)
        raise UsageError(
            f"--model_config must be one of {presets}, or a JSON file; found {model_config!r}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(**{**fields, **shared})
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{path} should be a JSON object with model_type and the fields of that transformers config: "
            f"{error}"
        ) from error
