"""Small GGUF files, with a tensor of each quantisation that the package gguf reads."""

import json
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import _type_traits, dequantize
from numpy.typing import NDArray

Array = NDArray[np.uint8] | NDArray[np.float32] | NDArray[np.float16]

# The widths are multiples of the largest block.
WIDTH, FFN_WIDTH, NUM_LAYERS, NUM_HEADS = 256, 512, 4, 4
QUANTISATIONS = sorted(_type_traits, key=lambda kind: kind.name)
_MATRICES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (FFN_WIDTH, WIDTH),
    "ffn_up": (FFN_WIDTH, WIDTH),
    "ffn_down": (WIDTH, FFN_WIDTH),
}


def write_gguf(
    file: Path, tokenizer: Path, *, kinds: list[GGMLQuantizationType], with_divisors: bool = False
) -> dict[str, NDArray[np.float32]]:
    """Write a Llama whose matrices take these quantisations in turn; returns what they stand for.

    Args:
        file: to write.
        tokenizer: directory with a byte-level BPE.
        kinds: of the matrices, repeated.
        with_divisors: with Llama 3's tensor of rotary divisors.
    """
    rng = np.random.default_rng(0)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    special = {one["content"] for one in content["added_tokens"] if one["special"]}
    writer = GGUFWriter(file, "llama")
    writer.add_name("Tiny 4B")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(FFN_WIDTH)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_HEADS)
    writer.add_rope_dimension_count(WIDTH // NUM_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template((tokenizer / "chat_template.jinja").read_text())
    expected: dict[str, NDArray[np.float32]] = {}
    order = iter(kinds * (NUM_LAYERS * len(_MATRICES)))

    def add(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
        raw = random_tensor(rng, shape, kind)
        expected[name] = dequantize(raw, kind).reshape(shape)
        writer.add_tensor(name, raw, raw_dtype=kind)

    add("token_embd.weight", (len(vocabulary), WIDTH), kinds[0])
    for layer in range(NUM_LAYERS):
        for name, shape in _MATRICES.items():
            add(f"blk.{layer}.{name}.weight", shape, next(order))
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", (WIDTH,), GGMLQuantizationType.F32)
    add("output_norm.weight", (WIDTH,), GGMLQuantizationType.F32)
    if with_divisors:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def random_tensor(
    rng: np.random.Generator, shape: tuple[int, ...], kind: GGMLQuantizationType
) -> Array:
    """Numbers, or random blocks of a quantisation; those that stand for large numbers are drawn again."""
    if kind == GGMLQuantizationType.F32:
        return rng.normal(1.0, 0.02, shape).astype(np.float32)
    if kind == GGMLQuantizationType.F16:
        return rng.normal(0.0, 0.05, shape).astype(np.float16)
    block_size, num_bytes = GGML_QUANT_SIZES[kind]
    num_blocks = int(np.prod(shape)) // block_size
    blocks = rng.integers(0, 256, (num_blocks, num_bytes), dtype=np.uint8)
    while True:
        with np.errstate(all="ignore"):
            values = np.abs(dequantize(blocks, kind).reshape(num_blocks, -1)).max(axis=1)
        wrong = ~(values < 4.0)
        if not wrong.any():
            return blocks.reshape(*shape[:-1], -1)
        blocks[wrong] = rng.integers(0, 256, (int(wrong.sum()), num_bytes), dtype=np.uint8)
