"""The models of the benchmark of generation, and what its peers read in place of them.

python tests/benchmarks/generation_files.py '{"kind": "model", "out": "/tmp/gpt2", "shape": "gpt2"}'

    config, random values ──> a directory of transformers ──> CTranslate2, OpenVINO's IR, GGUF

`tests/benchmarks/generation.py` starts this with the interpreter that has the peer, once per file: a
file that is there is kept. SmolLM2-135M-Instruct is a real model. The random values of the others are
small, as those of a model that begins to learn are; none is zero or one, so that a weight that a
conversion forgets shows in the tokens. Knows nothing of clocks.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_STANDARD_DEVIATION = 0.02
_SEED = 0
_CONTEXT_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to write."""

    kind: str
    out: str
    shape: str = ""
    """Of a model: gpt2, llama or smollm2."""
    model: str = ""
    """Directory of the model that is converted."""
    weights: str = "float32"


# No token of a vocabulary is special: nothing may end a request before its last token.
_NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def write_model(job: Job) -> None:
    """A model of transformers."""
    if job.shape == "smollm2":
        backbone = _load(str(importlib.import_module("tests.real_models").smollm2()))
        backbone.config.update(_NO_TOKENS)
        backbone.generation_config.update(**_NO_TOKENS)
    else:
        backbone = _make_model(job)
    backbone.save_pretrained(job.out)


def _make_model(job: Job) -> Any:
    """One with random values."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    if job.shape == "gpt2":
        config = transformers.GPT2Config(n_positions=_CONTEXT_TOKENS, **_NO_TOKENS)
    else:
        config = transformers.LlamaConfig(
            vocab_size=32_000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=_CONTEXT_TOKENS,
            tie_word_embeddings=True,
            **_NO_TOKENS,
        )
    backbone = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.normal_(0, _STANDARD_DEVIATION, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter += 1  # of a norm
    return backbone


def write_ctranslate2(job: Job) -> None:
    """CTranslate2's model; int8 has a scale for each output, and quantizes inputs as it goes."""
    converters = importlib.import_module("ctranslate2.converters.transformers")
    backbone = _load(job.model)
    is_gpt2 = backbone.config.model_type == "gpt2"
    loader = (converters.GPT2Loader if is_gpt2 else converters.LlamaLoader)()
    vocab_size, config = backbone.config.vocab_size, backbone.config
    spec = loader.get_model_spec(backbone)
    spec.register_vocabulary([str(token_id) for token_id in range(vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = config.layer_norm_epsilon if is_gpt2 else config.rms_norm_eps
    spec.validate()
    spec.optimize(quantization=None if job.weights == "float32" else job.weights)
    spec.save(job.out)


def write_gguf(job: Job) -> None:
    """llama.cpp's model: matrices in fp32, in bf16, or in blocks of 32 that share an fp16 scale."""
    gguf = importlib.import_module("gguf")
    backbone = _load(job.model)
    config = backbone.config
    is_gpt2 = config.model_type == "gpt2"
    types = gguf.GGMLQuantizationType
    quantization = {
        "float32": types.F32,
        "bfloat16": types.BF16,
        "int8": types.Q8_0,
        "int4": types.Q4_0,
    }[job.weights]
    writer = gguf.GGUFWriter(str(Path(job.out, "model.gguf")), config.model_type)
    writer.add_context_length(_CONTEXT_TOKENS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if is_gpt2:
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        tensors = _gpt2_tensors(backbone)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        tensors = _llama_tensors(backbone)
    for name, tensor in tensors.items():
        # Positions are added, never multiplied.
        is_matrix = tensor.ndim == 2 and name != "position_embd.weight"
        dtype = quantization if is_matrix else types.F32
        data = tensor if dtype == types.F32 else gguf.quants.quantize(tensor, dtype)
        writer.add_tensor(name, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gpt2_tensors(backbone: Any) -> dict[str, Any]:
    """llama.cpp's names, and matrices (outputs, inputs)."""
    model = backbone.transformer
    tensors = {
        "token_embd.weight": model.wte.weight,
        "position_embd.weight": model.wpe.weight,
        "output_norm.weight": model.ln_f.weight,
        "output_norm.bias": model.ln_f.bias,
    }
    for number, layer in enumerate(model.h):
        parts = {
            "attn_norm": layer.ln_1,
            "attn_qkv": layer.attn.c_attn,
            "attn_output": layer.attn.c_proj,
            "ffn_norm": layer.ln_2,
            "ffn_up": layer.mlp.c_fc,
            "ffn_down": layer.mlp.c_proj,
        }
        for name, module in parts.items():
            tensors[f"blk.{number}.{name}.weight"] = module.weight.T
            tensors[f"blk.{number}.{name}.bias"] = module.bias
    return _arrays(tensors)


def _llama_tensors(backbone: Any) -> dict[str, Any]:
    """llama.cpp's names; it rotates neighbours where transformers rotates halves of a head."""
    model, config = backbone.model, backbone.config
    tensors = {
        "token_embd.weight": model.embed_tokens.weight,
        "output_norm.weight": model.norm.weight,
    }
    for number, layer in enumerate(model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts = {
            "attn_norm": layer.input_layernorm.weight,
            "attn_q": _with_neighbours(attention.q_proj.weight, config.num_attention_heads),
            "attn_k": _with_neighbours(attention.k_proj.weight, config.num_key_value_heads),
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
        }
        tensors |= {f"blk.{number}.{name}.weight": weight for name, weight in parts.items()}
    return _arrays(tensors)


def _with_neighbours(weight: Any, num_heads: int) -> Any:
    num_outputs, num_inputs = weight.shape
    halves = weight.view(num_heads, 2, num_outputs // num_heads // 2, num_inputs)
    return halves.transpose(1, 2).reshape(num_outputs, num_inputs)


def _arrays(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        name: np.ascontiguousarray(tensor.detach().float().numpy())
        for name, tensor in tensors.items()
    }


def _load(model: str) -> Any:
    return importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(model)


def _write_openvino(job: Job) -> None:
    importlib.import_module("tests.benchmarks.generation_openvino").write(
        _load(job.model), Path(job.out), weights=job.weights
    )


KINDS: dict[str, Callable[[Job], None]] = {
    "model": write_model,
    "ctranslate2": write_ctranslate2,
    "openvino": _write_openvino,
    "llama.cpp": write_gguf,
}


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    out = Path(job.out)
    if out.is_dir():
        return
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    KINDS[job.kind](Job(**{**vars(job), "out": str(partial)}))
    partial.rename(out)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
