"""GGUF files of llama.cpp -> model directories with full weights.

transformers reads config, tokenizer and weights, which it computes from the rounded ones of the file. What it
returns cannot be saved (5.23: "quantized with gguf"), so the weights move into a plain model.
"""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import MissingExtraError, ModelError, install_command
from full_stack_transformer.machine import check_free_memory, memory_for
from full_stack_transformer.modelling.backbones import context_length, quieten_transformers
from full_stack_transformer.modelling.pretrained import LOADING_ERRORS, check_loading, reason_of

logger = logging.getLogger(__name__)

# Types of tensors that are not rounded.
_FULL_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Llama 3's stretched rotary frequencies come as a tensor of divisors, which transformers does not read; these
# are the other numbers of all of its releases (config.json of Llama 3.1 to 3.3).
_DIVISORS = "rope_freqs.weight"
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def convert_gguf(file: Path, target: Path, *, dtype: str) -> dict[str, Any]:
    """Write config, weights and tokenizer of a GGUF file; returns the types of its tensors.

    Args:
        file: to read.
        target: the directory to write.
        dtype: of the weights; auto is float32, or the type that all matrices have in the file.

    Raises:
        MissingExtraError: gguf is not installed.
        ModelError: the file is damaged, or transformers knows no such architecture.
    """
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise MissingExtraError(
                f"{file.name} is a GGUF file, which needs the package {package}; install it with: "
                f"{install_command('gguf')}"
            )
    header = _Header(file)
    types = sorted(set(header.types.values()))
    matrices = {kind for name, kind in header.types.items() if len(header.shapes[name]) > 1}
    chosen = dtype
    if dtype == "auto":
        chosen = (
            _FULL_TYPES.get(next(iter(matrices)), "float32") if len(matrices) == 1 else "float32"
        )
    logger.info(
        "%s: %s, weights as %s; saved as %s", file, header.architecture, ", ".join(types), chosen
    )
    backbone = _open(file, header, getattr(torch, chosen))
    backbone.save_pretrained(target)
    _save_tokenizer(file, target, backbone)
    return {"gguf_types": types}


class _Header:
    """What a GGUF file says of itself.

    Raises:
        ModelError: it is damaged, a part of several, or a model of another kind.
    """

    def __init__(self, file: Path) -> None:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(file)
            self.fields = {
                name: field.contents()
                for name, field in reader.fields.items()
                if not name.startswith("tokenizer.ggml.") or name.endswith("_id")
            }
            self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
            self.shapes = {
                tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors
            }
            divisors = [one.data for one in reader.tensors if one.name == _DIVISORS]
        except Exception as error:  # the reader knows no damaged files: any exception of NumPy
            raise ModelError(
                f"{file} is a damaged or unfinished GGUF file ({type(error).__name__}: {error}); fetch it "
                "again"
            ) from error
        self.architecture = str(self.fields.get("general.architecture"))
        self.max_divisor = float(divisors[0].max()) if divisors else 1.0
        num_parts = int(self.fields.get("split.count", 1))
        if num_parts > 1:
            raise ModelError(
                f"{file} is one of {num_parts} parts; merge them with llama.cpp: llama-gguf-split --merge "
                f"{file} WHOLE.gguf"
            )
        stretched = next((name for name in self.types if name.startswith("rope_factors_")), None)
        if stretched is not None:
            raise ModelError(
                f"{file} stretches its positions in a form that transformers does not read from GGUF "
                f"({stretched}); take the same model as a directory with safetensors"
            )
        if not self.types:
            raise ModelError(
                f"{file} holds no weights (a vocabulary alone); choose the file of the model"
            )

    @property
    def num_weights(self) -> int:
        """Numbers of all tensors."""
        return sum(int(torch.Size(shape).numel()) for shape in self.shapes.values())


def _open(file: Path, header: _Header, dtype: torch.dtype) -> Backbone:
    """A plain model with the weights of the file."""
    quieten_transformers()
    what = f"the weights of {file}"
    check_free_memory(header.num_weights * max(4, dtype.itemsize), what, torch.device("cpu"))
    try:
        with memory_for(what):
            opened, loading = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # checked below
            )
    except LOADING_ERRORS as error:
        raise ModelError(
            f"{file} ({header.architecture}) cannot be opened: {reason_of(error)}; take the same model in "
            "another form, such as a directory with safetensors"
        ) from error
    check_loading(opened, loading, str(file), new_head=False)
    config = opened.config
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    if header.max_divisor > 1:
        config.rope_parameters = {
            **config.rope_parameters, **_LLAMA3_ROPE, "factor": header.max_divisor
        }  # fmt: skip
    with torch.device("meta"):
        plain = type(opened)(config)
    plain.load_state_dict(opened.state_dict(), assign=True)
    plain.tie_weights()
    _set_ends(plain, header)
    saved: Backbone = plain
    return saved


def _set_ends(backbone: Backbone, header: _Header) -> None:
    """The tokens that end a text: of a document and of an answer."""
    named = [header.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(int(one) for one in named if one is not None))
    settings = backbone.generation_config
    if settings is not None and len(ends) > 1:
        settings.eos_token_id = ends


def _save_tokenizer(file: Path, target: Path, backbone: Backbone) -> None:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, trust_remote_code=False
        )
    except LOADING_ERRORS as error:
        raise ModelError(f"the tokenizer in {file} cannot be read: {reason_of(error)}") from error
    tokenizer.model_max_length = context_length(backbone.config)
    tokenizer.save_pretrained(target)
