"""GGUF files: hyperparameters, tokenizer, chat template and weights of a causal language model."""

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from full_stack_transformer.exporting.gguf_families import Family, family_of, tensors_of
from full_stack_transformer.exporting.gguf_tokenizer import Vocabulary, vocabulary_of
from full_stack_transformer.exporting.source import Source

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

logger = logging.getLogger(__name__)

# --dtype -> type of the matrices, of embeddings and output, by GGUF's names; and the number of the file type
_TYPES: dict[str, tuple[str, str, int]] = {
    "float32": ("F32", "F32", 0),
    "float16": ("F16", "F16", 1),
    "bfloat16": ("BF16", "BF16", 32),
    "q8_0": ("Q8_0", "Q8_0", 7),
    # Rounding embeddings to 4 bits costs more than it saves; llama.cpp's own tool keeps more bits there too.
    "q4_0": ("Q4_0", "Q8_0", 2),
}
_EMBEDDINGS = ("token_embd.weight", "output.weight")
# Read by operations that know full numbers only.
_ALWAYS_FULL = ("position_embd.weight", "rope_freqs.weight")


def write_gguf(source: Source, file: Path, *, dtype: str) -> Vocabulary:
    """Write the file; returns what it says of the tokenizer.

    Args:
        source: the model.
        file: to write.
        dtype: of the matrices; biases and norms are fp32.

    Raises:
        ModelError: llama.cpp cannot compute this model.
        TokenizerError: llama.cpp cannot encode texts as its tokenizer does.
    """
    from gguf import GGUFWriter

    family = family_of(source.backbone)
    hyperparameters = family.hyperparameters(source.backbone.config)
    vocabulary = vocabulary_of(source.tokenizer, source.num_embeddings)
    writer = GGUFWriter(file, family.architecture)
    writer.add_name(source.name)
    for key, value in hyperparameters.items():
        _add(writer, f"{family.architecture}.{key}", value)
    writer.add_file_type(_TYPES[dtype][2])
    writer.add_quantization_version(2)
    _add_vocabulary(writer, source, vocabulary)
    _add_tensors(writer, source, family, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return vocabulary


def _add(writer: "GGUFWriter", key: str, value: int | float | bool | str) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_vocabulary(writer: "GGUFWriter", source: Source, vocabulary: Vocabulary) -> None:
    tokenizer = source.tokenizer
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    ends = source.end_ids
    writer.add_bos_token_id(tokenizer.begin_id)
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(vocabulary.adds_begin)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if not source.template.is_plain:
        writer.add_chat_template(source.template.source)


def _add_tensors(writer: "GGUFWriter", source: Source, family: Family, dtype: str) -> None:
    from gguf.quants import quantize

    used: Counter[str] = Counter()
    for name, tensor in tensors_of(source.backbone, family):
        kind = _kind(name, tensor, dtype)
        used[kind.name] += tensor.numel()
        values: NDArray[Any] = tensor.numpy()
        if kind.name == "F16":
            values = values.astype(np.float16)
        elif kind.name != "F32":
            values = quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(name, values, raw_dtype=kind)
    total = used.total()
    shares = ", ".join(f"{count / total:.0%} {kind}" for kind, count in used.most_common())
    logger.info("%s weights: %s", f"{total:,}", shares)


def _kind(name: str, tensor: Tensor, dtype: str) -> "GGMLQuantizationType":
    """The type of one tensor; rows that are no multiple of a block are not rounded to its bits."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if tensor.dim() < 2 or name in _ALWAYS_FULL:
        return GGMLQuantizationType.F32
    matrices, embeddings, _ = _TYPES[dtype]
    kind = GGMLQuantizationType[embeddings if name in _EMBEDDINGS else matrices]
    block_size, _ = GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[-1] % block_size == 0 else GGMLQuantizationType.F16
