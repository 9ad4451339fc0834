"""The model of the service's benchmark: a directory of transformers, and the same weights as GGUF.

    python tests/benchmarks/service_files.py gguf DIRECTORY

writes DIRECTORY/model.gguf with the interpreter that has `gguf`. Unlike the files of the benchmark of
generation this one carries its vocabulary: a server takes texts.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

_STANDARD_DEVIATION = 0.02
_VOCAB_SIZE, _CONTEXT_TOKENS = 8192, 512


def write_model(directory: Path, texts: list[str], preset: str) -> None:
    """A model directory with random weights and a byte-level BPE of these texts."""
    import torch

    from full_stack_transformer.modelling.backbones import new_backbone
    from full_stack_transformer.modelling.model_directory import save_model_directory
    from full_stack_transformer.tokenization.document_tokenizer import TrainedTokenizer

    tokenizer = TrainedTokenizer.train(texts, vocab_size=_VOCAB_SIZE)
    tokenizer.save(directory / "tokenizer", model_max_length=_CONTEXT_TOKENS)
    backbone = new_backbone(
        preset,
        vocab_size=tokenizer.vocab_size,
        max_length=_CONTEXT_TOKENS,
        special_token_ids={
            "begin": tokenizer.begin_id,
            "end": tokenizer.end_id,
            "pad": tokenizer.pad_id,
        },
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.normal_(0, _STANDARD_DEVIATION, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter += 1  # of a norm
        # The output is tied to it: no token that would end a text may ever be the likeliest.
        backbone.get_input_embeddings().weight[list({tokenizer.end_id, tokenizer.pad_id})] = 0
    save_model_directory(
        directory / "model",
        backbone,
        tokenizer_directory=directory / "tokenizer",
        description={"step": 0},
    )


def write_gguf(directory: Path) -> None:
    """model/ as model.gguf: matrices in bf16, as our decoder has them."""
    gguf = importlib.import_module("gguf")
    torch_file = importlib.import_module("safetensors.torch").load_file(
        directory / "model" / "model.safetensors"
    )
    config = json.loads((directory / "model" / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(directory / "model.gguf"), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    _add_vocabulary(gguf, writer, directory / "model", config)
    types = gguf.GGMLQuantizationType
    for name, tensor in _tensors(torch_file, config).items():
        dtype = types.BF16 if tensor.ndim == 2 else types.F32
        data = tensor if dtype == types.F32 else gguf.quants.quantize(tensor, dtype)
        writer.add_tensor(name, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(gguf: Any, writer: Any, model: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    names = {token_id: name for name, token_id in tokenizer["model"]["vocab"].items()}
    special = {one["id"]: one["content"] for one in tokenizer["added_tokens"]}
    names |= special
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names[token_id] for token_id in ids])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if one in special else kinds.NORMAL for one in ids])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(True)


def _tensors(weights: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's names; it rotates neighbours where transformers rotates halves of a head."""
    heads = config["num_attention_heads"]
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for number in range(config["num_hidden_layers"]):
        for ours, theirs in parts.items():
            weight = weights[f"model.layers.{number}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                outputs, inputs = weight.shape
                halves = weight.view(heads, 2, outputs // heads // 2, inputs)
                weight = halves.transpose(1, 2).reshape(outputs, inputs)
            tensors[f"blk.{number}.{ours}.weight"] = weight
    return {name: np.ascontiguousarray(one.float().numpy()) for name, one in tensors.items()}


if __name__ == "__main__":
    write_gguf(Path(sys.argv[2]))
