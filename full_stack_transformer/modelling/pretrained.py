"""Pretrained models: opened from a directory or the hub, with config and weights compared.

transformers fills missing tensors with noise, and passes over those that the config does not use: both are
refused here. What the files alone tell is in model_files.py.
"""

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers import PreTrainedModel as Backbone
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.hub import cached_file

from full_stack_transformer.errors import ModelError
from full_stack_transformer.machine import check_free_memory, memory_for
from full_stack_transformer.modelling.backbones import describe, is_causal, quieten_transformers
from full_stack_transformer.modelling.model_files import (
    check_config,
    check_generates,
    check_start,
    num_weights,
    read_config,
    rounded_files,
    weight_files,
)
from full_stack_transformer.modelling.other_files import CONFIG_FILE_NAME
from full_stack_transformer.storage import read_json, write_json

logger = logging.getLogger(__name__)

GENERATION_CONFIG_FILE_NAME = "generation_config.json"
_DTYPES = ("float32", "bfloat16", "float16")
LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError),
    *(SafetensorError, UnpicklingError),
)
# Tensors that are computed from the config; older versions of transformers saved them.
_BUFFER = re.compile(
    r"(^|\.)(attn|attention|self_attn)\.(masked_)?bias$|inv_freq$|position_ids$|token_type_ids$|"
    r"(cos|sin)_cached$|num_batches_tracked$"
)


def pretrained_backbone(
    model_path: str,
    *,
    vocab_size: int,
    model_class: Any = AutoModelForCausalLM,
    new_head: bool = False,
    **fields: Any,
) -> Backbone:
    """A pretrained model with fp32 weights, and embeddings for `vocab_size` tokens at least.

    Args:
        model_path: directory or hub name.
        vocab_size: number of token ids; some models have more embeddings than that.
        model_class: of transformers.
        new_head: allow a model without such a head, and give it one with random weights.
        fields: of the config, to override the saved ones.

    Raises:
        ModelError: there is no such model here or on the hub, or weights are missing.
    """
    backbone = load_backbone(
        model_path, dtype=torch.float32, model_class=model_class, new_head=new_head, **fields
    )
    if backbone.get_input_embeddings().num_embeddings < vocab_size:
        # New rows are drawn around the mean of the old ones, so that new tokens do not start out likely.
        backbone.resize_token_embeddings(vocab_size, mean_resizing=True)
    return backbone


@dataclass(frozen=True)
class StartFacts:
    """What a tuned model keeps of the one that it was started from, beside weights, config and tokenizer."""

    dtype: str | None
    """In which its weights were saved, as its config names it."""
    generation_config: dict[str, Any] | None
    """The content of generation_config.json; None where there is no such file."""

    def save(
        self, backbone: Backbone, directory: Path, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write config, weights (those of the backbone, or others) and settings into a model directory."""
        if self.dtype is not None:
            weights = in_dtype(weights or backbone.state_dict(), getattr(torch, self.dtype))
        if self.generation_config is not None and backbone.can_generate():
            # Its own is written below as it was: transformers refuses to save some that it reads.
            backbone.generation_config = GenerationConfig.from_model_config(backbone.config)
        backbone.save_pretrained(directory, state_dict=weights)
        if self.generation_config is not None:
            write_json(directory / GENERATION_CONFIG_FILE_NAME, self.generation_config)
        if self.dtype is not None:
            config = read_json(directory / CONFIG_FILE_NAME)
            write_json(directory / CONFIG_FILE_NAME, {**config, "dtype": self.dtype})


def read_start(model_path: str) -> StartFacts:
    """The facts of a model directory or hub name that can be opened."""
    named = open_config(model_path).dtype
    file = cached_file(
        model_path,
        GENERATION_CONFIG_FILE_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    dtype = str(named).removeprefix("torch.")
    return StartFacts(
        dtype=dtype if dtype in _DTYPES else None,
        generation_config=read_json(Path(file)) if file is not None else None,
    )


def in_dtype(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in another type; those that share memory still do."""
    converted: dict[tuple[int, torch.Size], Tensor] = {}
    for weight in weights.values():
        key = (weight.data_ptr(), weight.shape)
        if key not in converted:
            converted[key] = weight.to(dtype) if weight.is_floating_point() else weight
    return {name: converted[weight.data_ptr(), weight.shape] for name, weight in weights.items()}


def load_backbone(
    model_path: str,
    *,
    dtype: torch.dtype,
    model_class: Any = AutoModelForCausalLM,
    new_head: bool = False,
    **fields: Any,
) -> Backbone:
    """Load a model from a directory or hub name, and check that config and weights belong together.

    Args:
        model_path: directory or hub name.
        dtype: of the weights.
        model_class: of transformers.
        new_head: the weights of the head may be missing or have another shape.
        fields: of the config, to override the saved ones.

    Raises:
        ModelError: the model cannot be opened, or tensors are missing (transformers would fill in noise),
            have another shape, or are not used.
        MachineError: memory is short.
    """
    quieten_transformers()
    place = Path(model_path)
    check_start(model_path)
    config = open_config(model_path)
    if getattr(config, "auto_map", None):
        logger.warning(
            "%s names code of its own (auto_map), which is never run; transformers' class for %s is used",
            *(model_path, config.model_type),
        )
    if is_causal(model_class):
        check_generates(config.to_dict(), place)
    if rounded_files(place) and not weight_files(place):
        raise ModelError(
            f"{place} holds rounded weights only ({rounded_files(place)[0].name}), which fst generate and "
            "fst serve run on a processor; for anything else take the model that they were made from"
        )
    what = f"the weights at {model_path}"
    check_free_memory(num_weights(place) * dtype.itemsize, what, torch.device("cpu"))
    try:
        with memory_for(what):
            backbone, loading = model_class.from_pretrained(
                model_path,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # checked below, with the names that differ
                **fields,
            )
    except LOADING_ERRORS as error:
        reason = reason_of(error)
        if reason.startswith("Unrecognized configuration class"):
            reason = f"it holds {_described(config)}, which has no such head"
        raise ModelError(f"no {describe(model_class)} at {model_path!r}: {reason}") from error
    if not _reads_tokens(backbone):
        raise ModelError(
            f"{model_path} holds {_described(config)}, which reads other things than texts; choose a model "
            "of texts"
        )
    check_loading(backbone, loading, model_path, new_head=new_head)
    return backbone


def _reads_tokens(backbone: Backbone) -> bool:
    """Whether it is a model of texts, not of pictures or sounds."""
    try:
        return hasattr(backbone.get_input_embeddings(), "num_embeddings")
    except (NotImplementedError, AttributeError):
        return False


def open_config(model_path: str | Path) -> PretrainedConfig:
    """The config of a model directory or hub name.

    Raises:
        ModelError: transformers does not know such a model, or no command here can use it.
    """
    directory = Path(model_path)
    content = read_config(directory) if directory.is_dir() else {}
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    except Exception as error:  # strict configs and the hub's client have a dozen exceptions
        raise ModelError(_why_no_config(directory, content, error)) from error
    check_config(config.to_dict(), directory)
    return config


def _why_no_config(directory: Path, content: Mapping[str, Any], error: Exception) -> str:
    if not content:
        return (
            f"{str(directory)!r} is not a directory, and cannot be fetched from the hub "
            f"({type(error).__name__}); name a model directory, or a model of the hub where it can be reached"
        )
    kind, version = content["model_type"], transformers.__version__
    if kind in CONFIG_MAPPING:
        reason = " ".join(str(error).split())[:300]
        return f"{directory / 'config.json'} does not describe a {kind} model: {reason}"
    if content.get("auto_map"):
        return (
            f"{directory / 'config.json'} names code of its own (auto_map: "
            f"{', '.join(map(str, content['auto_map'].values()))}), which is never run, and transformers "
            f"{version} has no class for its model_type {kind!r}; choose a model of a type that it knows, or "
            "a copy of this one that was converted to such a type"
        )
    close = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), 1)
    meant = f"did you mean {close[0]!r}?" if close else "choose a model of a type that it knows"
    return (
        f"{directory / 'config.json'} names the model_type {kind!r}, which transformers {version} does not "
        f"know; {meant}"
    )


def check_loading(
    backbone: Backbone, loading: Mapping[str, Any], model_path: str, *, new_head: bool
) -> None:
    """Compare the tensors of the file with those of the model.

    Raises:
        ModelError: some of the body are missing, have another shape or are not used.
    """
    is_body_alone = backbone.base_model is backbone
    missing = sorted(loading["missing_keys"])
    if new_head or is_body_alone:
        missing = [name for name in missing if _is_of_body(name, backbone)]
    if missing:
        others = sorted(loading["unexpected_keys"])[:1]
        raise ModelError(
            f"the weights at {model_path!r} lack {len(missing)} tensors that the model needs "
            f"({', '.join(missing[:3])} …){f', and hold others such as {others[0]}' if others else ''}; "
            f"{_what_is_there(backbone, missing, model_path)}"
        )
    for name, found, expected in sorted(loading["mismatched_keys"], key=str):
        if not new_head or _is_of_body(name, backbone):
            raise ModelError(
                f"the weights at {model_path!r} do not fit config.json: {name} has the shape {(*found,)}, by "
                f"config.json it has {(*expected,)} ({len(loading['mismatched_keys'])} tensors differ); "
                "take both files from the same model"
            )
    unused = sorted(name for name in loading["unexpected_keys"] if not _BUFFER.search(name))
    wrong = [name for name in unused if _is_of_body(name, backbone)]
    if wrong:
        raise ModelError(
            f"the weights at {model_path!r} hold {len(wrong)} tensors that config.json does not use "
            f"({', '.join(wrong[:3])} …){_layers_in(wrong, backbone.config)}; take both files from the same "
            "model"
        )
    if unused:
        logger.info("%s: tensors of other heads are not used: %s", model_path, ", ".join(unused))


def _is_of_body(name: str, backbone: Backbone) -> bool:
    """Whether a tensor is of the body of a model, not of a head; BERT's pooler counts as a head.

    It is not saved with a masked language model, and not used by the poolings here.
    """
    body, prefix = backbone.base_model, f"{backbone.base_model_prefix}."
    inner = name.removeprefix(prefix)
    if "pooler." in name:
        return False
    parts = {key for key, _ in (*body.named_children(), *body.named_parameters(recurse=False))}
    return inner.partition(".")[0] in parts or (inner != name and body is not backbone)


def _what_is_there(backbone: Backbone, missing: Sequence[str], model_path: str) -> str:
    """Why tensors may be missing."""
    architecture = (backbone.config.architectures or [""])[0]
    if any(_is_of_body(name, backbone) for name in missing) or not architecture:
        return "it is damaged, or config.json is of another model"
    return (
        f"it belongs to another task: config.json says {architecture}; fst serve {model_path} serves what it "
        f"does, fst train --model_path {model_path} trains another head on it"
    )


def _layers_in(names: Sequence[str], config: PretrainedConfig) -> str:
    numbers = [int(one) for name in names for one in re.findall(r"\.(\d+)\.", f".{name}")]
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or not numbers or max(numbers) < layers:
        return ""
    return f": it names {layers} layers, the weights have {max(numbers) + 1}"


def _described(config: PretrainedConfig) -> str:
    return str((config.architectures or [f"a model of type {config.model_type}"])[0])


def reason_of(error: Exception) -> str:
    """The first line of an error of a library; torch's own advice on code in a file is to run it."""
    if isinstance(error, UnpicklingError):
        return "it holds more than tensors and plain values, such as code, which is never run"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
