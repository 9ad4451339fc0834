"""Whether the C++ decoder can compute a backbone of transformers, and the numbers that it is to know.

Where a configuration asks for more than families.py says, the model goes through PyTorch. Knows nothing of
the C++ library.

    backbone --why_not_family--> a reason, or none --shape_of--> numbers
"""

from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from full_stack_transformer.generation.runners.native.families import (
    ACTIVATIONS,
    FAMILIES,
    PLAIN,
    Family,
)
from full_stack_transformer.generation.runners.native.parts import linear_of, ropes_of, size_of
from full_stack_transformer.modelling.adapters import has_adapter

_LANES = 16


def why_not_family(backbone: Backbone) -> str | None:
    """Why the decoder cannot compute such a backbone; none if it can."""
    config = backbone.config
    if has_adapter(backbone):  # the weights that it would read are those of the base
        return "it has an adapter that is not merged into its weights"
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"it knows {', '.join(FAMILIES)}, not {config.model_type}"
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    if type(backbone) is not getattr(transformers, name):
        return f"it knows {name}, not {type(backbone).__name__}"
    return next(_problems(family, backbone), None)


def _problems(family: Family, backbone: Backbone) -> Iterator[str]:
    config = backbone.config
    for name, value in (PLAIN | dict(family.plain)).items():
        found = getattr(config, name, value)
        if (found or None) != (value or None):
            yield f"its {name} is {found}"
    activation = getattr(config, family.activation)
    if activation not in ACTIVATIONS:
        yield f"it knows {', '.join(ACTIVATIONS)}, not {activation}"
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
    for prefix, rope in ropes_of(backbone.config).items():
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
        found = {name: linear_of(layer, getattr(family, name)).size() for name in expected}
        if found != expected:
            yield f"its layers have sizes {found}, not {expected}"
    if size_of(linears[0]) != (vocab_size, hidden):
        yield f"its head has sizes {size_of(linears[0])}, not {(vocab_size, hidden)}"


def shape_of(backbone: Backbone) -> dict[str, float]:
    """Fields of `DecoderShape` that follow from the backbone alone."""
    config = backbone.config
    family = FAMILIES[config.model_type]
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
        "activation": ACTIVATIONS[getattr(config, family.activation)],
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
    return size_of(layers[0].get_submodule(family.mlp_out))[1]
