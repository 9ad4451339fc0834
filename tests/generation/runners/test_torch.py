"""Any architecture of transformers is computed right through the paged cache, or refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import MachineError, ModelError
from full_stack_transformer.generation.open_engine import default_kv_dtype, open_runner
from full_stack_transformer.generation.runners.native.decoder import WeightsDtype
from full_stack_transformer.generation.runners.torch import (
    Runner,
    SequenceWork,
    TorchRunner,
)
from full_stack_transformer.modelling.backbones import convert

SIZES = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "head_dim": 16},
    "gpt_oss": {"sliding_window": 8, "head_dim": 16, "num_local_experts": 4},
    "llama4_text": {"attention_chunk_size": 8, "head_dim": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "falcon": {},
}


def _backbone(model_type: str, fields: dict[str, Any]) -> Backbone:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    backbone = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return backbone


def _open(
    backbone: Backbone, weights_dtype: WeightsDtype = "float32", max_length: int = 64
) -> Runner:
    return open_runner(
        backbone,
        num_blocks=4,
        weights_dtype=weights_dtype,
        kv_dtype=default_kv_dtype(weights_dtype),
        max_length=max_length,
    )


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_pieces_in_blocks_give_what_the_whole_gives(model_type: str) -> None:
    """Also beyond the window of layers that look only at the last tokens."""
    backbone = _backbone(model_type, {**SIZES, **ARCHITECTURES[model_type]})
    runner = TorchRunner(backbone, num_blocks=30, block_size=4)
    ids = torch.randint(3, 120, (30,)).tolist()
    with torch.inference_mode():
        expected = backbone(torch.tensor([ids]), use_cache=False).logits[0]
    blocks = [9, 4, 29, 2, 7, 0, 12, 3]
    found = [
        runner.run([SequenceWork(blocks, 0, ids[:17], 17)]),
        runner.run([SequenceWork(blocks, 17, ids[17:28], 11), SequenceWork([1], 0, [5])])[:11],
        runner.run([SequenceWork([1], 1, [6]), SequenceWork(blocks, 28, [ids[28]])])[1:],
        # Another sequence goes on from the full blocks.
        runner.run([SequenceWork([*blocks[:7], 27], 28, ids[28:30])]),
    ]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=1e-3)


def test_what_a_block_held_before_harms_nobody() -> None:
    """NaN of a broken text would pass through the mask."""
    backbone = _backbone("qwen2", SIZES)
    expected = TorchRunner(backbone, num_blocks=1).run([SequenceWork([0], 0, [5])])
    runner = TorchRunner(backbone, num_blocks=8, block_size=4)
    runner.run([SequenceWork(range(8), 0, list(range(3, 33)))])
    with torch.inference_mode():
        for layer in runner._cache.layers:
            assert layer.keys is not None and layer.values is not None
            layer.keys[7] = layer.values[7] = math.nan
    longer = SequenceWork(range(7), 20, [7])
    found = runner.run([SequenceWork([7], 0, [5]), longer])
    torch.testing.assert_close(found[:1], expected)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("mamba", {"vocab_size": 120, "hidden_size": 64, "state_size": 8}, "linear_attention"),
        ("bloom", {"vocab_size": 120, "hidden_size": 64, "n_head": 4}, "ValueError"),
        ("rwkv", {"vocab_size": 120, "hidden_size": 64, "context_length": 64}, "% off"),
    ],
    ids=["mamba", "bloom", "rwkv"],
)
def test_a_model_that_keeps_something_else_is_refused(
    model_type: str, fields: dict[str, Any], reason: str
) -> None:
    backbone = _backbone(model_type, {**fields, "num_hidden_layers": 2})
    with pytest.raises(ModelError, match="cannot be generated with here") as raised:
        _open(backbone, max_length=32)
    assert model_type in str(raised.value)
    assert reason in str(raised.value)


MORE_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "gpt_neox": {},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "hy_v3": {"num_local_experts": 4, "num_experts": 4},
}


@pytest.mark.parametrize("model_type", ["qwen2", "gpt_oss", "llama4_text", *MORE_ARCHITECTURES])
def test_rounded_weights_are_those_that_transformers_opens(model_type: str, tmp_path: Path) -> None:
    """Rotary frequencies, and whatever else it keeps in fp32, stay so."""
    fields = {
        **SIZES,
        **ARCHITECTURES.get(model_type, {}),
        **MORE_ARCHITECTURES.get(model_type, {}),
    }
    backbone = _backbone(model_type, fields)
    backbone.save_pretrained(tmp_path)
    theirs = type(backbone).from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = dict(named_tensors(convert(backbone, torch.bfloat16)))
    for name, tensor in named_tensors(theirs):
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def named_tensors(backbone: Backbone) -> list[tuple[str, torch.Tensor]]:
    return [*backbone.named_parameters(), *backbone.named_buffers()]


def test_blocks_take_memory_as_they_are_written_and_keep_what_they_hold() -> None:
    backbone = _backbone("qwen2", {**SIZES, "max_position_embeddings": 2048})
    runner = TorchRunner(backbone, num_blocks=70)
    ids = torch.randint(3, 120, (1500,)).tolist()
    with torch.inference_mode():
        expected = backbone(torch.tensor([ids]), use_cache=False).logits[0]
    sizes = []
    for start, end in [(0, 40), (40, 250), (250, 300), (300, 1400), (1400, 1500)]:
        work = [
            SequenceWork(range(1, 1 + -(-end // 32)), start, ids[start:end], end - start),
            SequenceWork([0], 0, ids[:20], 20),
        ]
        found = runner.run(work)
        assert torch.allclose(found[: end - start], expected[start:end], atol=1e-3)
        sizes.append(len(runner._cache.layers[0].keys))
    assert sizes == [3, 9, 18, 45, 70]
    # Another sequence goes on from the first 31 blocks.
    work = [SequenceWork([*range(1, 32), 60], 992, ids[992:1001]), SequenceWork([0], 20, [ids[20]])]
    assert torch.allclose(runner.run(work), expected[[1000, 20]], atol=1e-3)


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_control_tokens_that_were_never_trained_do_not_make_a_model_suspicious(
    weights_dtype: WeightsDtype,
) -> None:
    """SmolLM2's differ by 25 % in bfloat16, read in pieces or at once."""
    backbone = _backbone("cohere", SIZES)
    with torch.no_grad():
        backbone.get_input_embeddings().weight[:17] *= 1e4
        for layer in backbone.model.layers:
            layer.mlp.down_proj.weight *= 100
    assert _open(backbone, weights_dtype, max_length=32)


def test_a_lack_of_memory_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = _backbone("cohere", SIZES)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(type(backbone), "forward", fail)
    with pytest.raises(MachineError, match="memory is short"):
        _open(backbone, max_length=32)
