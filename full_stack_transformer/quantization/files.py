"""Rounded weights in a model directory: one file of safetensors, complete or absent, and its opening.

    quantized_int4.safetensors
        LAYER.codes  LAYER.scales  LAYER.group_scales  LAYER.zeros     of each linear layer, see codes.py
        everything else by its own name: embeddings in bf16, norms and biases in fp32
        metadata: a description with method, calibration, versions, and the SHA-256 of the weights it is of

A model opens from it without its full weights: neither read nor converted. When the full weights beside it
have changed, it is passed over, which the log says.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import MachineError, ModelError
from full_stack_transformer.modelling.model_files import weight_files
from full_stack_transformer.modelling.other_files import CODES_FILE_NAMES
from full_stack_transformer.modelling.pretrained import open_config
from full_stack_transformer.quantization.codes import CODES_NAME, Codes, CodesDtype
from full_stack_transformer.storage import file_facts, share, sync_directory, why_not_written

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_DESCRIPTION = "description"
_CODES_PARTS = ("codes", "scales", "group_scales", "zeros")
_DTYPE_NAME = "quantized_dtype"
_GENERATION_CONFIG = "generation_config.json"


def codes_dtype_of(backbone: Backbone) -> CodesDtype | None:
    """What the weights of an opened model were rounded to before; none for full weights."""
    dtype: CodesDtype | None = getattr(backbone, _DTYPE_NAME, None)
    return dtype


# ---------------------------------------------------------------------- writing


def write_codes(
    directory: Path, backbone: Backbone, dtype: CodesDtype, description: dict[str, Any]
) -> Path:
    """Write the codes of a model whose linear layers have them, atomically.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    target = directory / CODES_FILE_NAMES[dtype]
    partial = target.with_name(f".{target.name}.partial")
    content = {"format_version": _FORMAT_VERSION, "dtype": dtype, **description}
    try:
        save_file(_tensors(backbone), partial, {_DESCRIPTION: json.dumps(content)})
        share([partial])
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
        sync_directory(directory)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise MachineError(
            f"writing {target} failed: {why_not_written(error)}; no incomplete file was left"
        ) from error
    return target


def _tensors(backbone: Backbone) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, module in backbone.named_modules():
        codes: Codes | None = getattr(module, CODES_NAME, None)
        if codes is not None:
            for part, tensor in codes.tensors().items():
                tensors[f"{name}.{part}"] = tensor.contiguous()
    embeddings = backbone.get_input_embeddings().weight
    for name, parameter in backbone.named_parameters():
        owner, _, leaf = name.rpartition(".")
        has_codes = hasattr(backbone.get_submodule(owner), CODES_NAME)
        if leaf != "weight" or not has_codes or parameter is embeddings:
            dtype = torch.bfloat16 if parameter is embeddings else torch.float32
            tensors[name] = parameter.detach().to(dtype).contiguous()
    return tensors


def source_facts(directory: Path) -> dict[str, Any]:
    """Size, time and SHA-256 of the full weights, for a description."""
    facts = {}
    for path in weight_files(directory):
        facts[path.name] = {**file_facts(path), "mtime_ns": path.stat().st_mtime_ns}
    return facts


# ---------------------------------------------------------------------- opening


def read_description(path: Path) -> dict[str, Any]:
    """What is said of the rounded weights.

    Raises:
        ModelError: it is none of our files, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})[_DESCRIPTION])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ModelError(
            f"{path} is damaged, or was not written by fst quantize ({error}); remove it"
        ) from error
    if content.get("format_version") != _FORMAT_VERSION:
        raise ModelError(
            f"{path} has format version {content.get('format_version')!r}, expected {_FORMAT_VERSION}; "
            "remove it and run fst quantize again"
        )
    found: dict[str, Any] = content
    return found


def is_current(directory: Path, description: dict[str, Any]) -> bool:
    """Whether the full weights in the directory are those that were rounded; also where there are none."""
    files = weight_files(directory)
    if not files:
        return True
    expected = description["source"]
    if {path.name for path in files} != expected.keys():
        return False
    for path in files:
        facts, stat = expected[path.name], path.stat()
        if stat.st_size != facts["size_bytes"]:
            return False
        # The time spares reading it; a copy has another one.
        if stat.st_mtime_ns != facts["mtime_ns"] and file_facts(path)["sha256"] != facts["sha256"]:
            return False
    return True


def open_rounded(directory: Path, weights_dtype: str) -> Backbone | None:
    """The model with weights that were rounded before, where the directory has them.

    Args:
        directory: a model directory.
        weights_dtype: what is asked for; auto takes rounded weights only where there are no others.

    Raises:
        ModelError: the file is damaged, or there are only weights of another type.
    """
    has_full = bool(weight_files(directory))
    there = [one for one in get_args(CodesDtype) if (directory / CODES_FILE_NAMES[one]).is_file()]
    if weights_dtype == "auto" and not has_full and there:
        weights_dtype = there[-1]
    if weights_dtype not in there:
        if not has_full and there:
            raise ModelError(
                f"{directory} holds {' and '.join(there)} weights only, which fst generate and fst serve run "
                f"with --weights_dtype {there[-1]} on a processor; for anything else take the model that "
                "they were made from"
            )
        return None
    path = directory / CODES_FILE_NAMES[weights_dtype]
    description = read_description(path)
    if not is_current(directory, description):
        logger.warning(
            "%s was made from other weights than those beside it and is not used; run fst quantize again",
            path,
        )
        return None
    return _opened(directory, path, description)


def _opened(directory: Path, path: Path, description: dict[str, Any]) -> Backbone:
    config = open_config(directory)
    with _parameters_without_memory():
        backbone: Backbone = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if (directory / _GENERATION_CONFIG).is_file():
        backbone.generation_config = GenerationConfig.from_pretrained(directory)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged ({error}); remove it") from error
    try:
        _put(backbone, tensors)
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{path} does not fit config.json ({error}); remove it and run fst quantize again"
        ) from error
    setattr(backbone, _DTYPE_NAME, description["dtype"])
    return backbone.eval()


def _put(backbone: Backbone, tensors: dict[str, Tensor]) -> None:
    """Give the modules their codes, weights and biases."""
    for name, module in backbone.named_modules():
        if f"{name}.codes" in tensors:
            found = {part: tensors.pop(f"{name}.{part}", None) for part in _CODES_PARTS}
            codes = Codes(**{part: one for part, one in found.items() if one is not None})
            setattr(module, CODES_NAME, codes)
            # Nobody reads them; the shape is what counts.
            weight = module.weight
            assert isinstance(weight, Tensor)
            module.weight = _parameter(torch.zeros(1).expand(weight.shape))
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(backbone.get_submodule(owner), leaf, _parameter(tensor))
    missing = [name for name, one in backbone.named_parameters() if one.is_meta]
    if missing:
        raise KeyError(f"no {missing[0]}")


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Let new modules have parameters of the meta device, yet buffers with values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else _parameter(parameter.to("meta")))

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
