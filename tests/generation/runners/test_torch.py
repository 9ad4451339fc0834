"""Any architecture of transformers is computed right through the cache of slots, or refused."""

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import ModelError
from full_stack_transformer.generation.open_engine import open_runner
from full_stack_transformer.generation.runners.torch import SlotWork, TorchRunner

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


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_pieces_in_slots_give_what_the_whole_gives(model_type: str) -> None:
    """Also beyond the window of layers that look only at the last tokens."""
    backbone = _backbone(model_type, {**SIZES, **ARCHITECTURES[model_type]})
    runner = open_runner(backbone, num_slots=3, weights_dtype="float32", max_length=64)
    assert isinstance(runner, TorchRunner)
    ids = torch.randint(3, 120, (30,)).tolist()
    with torch.inference_mode():
        expected = backbone(torch.tensor([ids]), use_cache=False).logits[0]
    found = [
        runner.run([SlotWork(1, 0, ids[:17], 17)]),
        runner.run([SlotWork(1, 17, ids[17:28], 11), SlotWork(0, 0, [5])])[:11],
        runner.run([SlotWork(0, 1, [6]), SlotWork(1, 28, [ids[28]])])[1:],
    ]
    runner.copy_slot(1, 2, 29)
    found.append(runner.run([SlotWork(2, 29, [ids[29]])]))
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=1e-3)


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
        open_runner(backbone, num_slots=1, weights_dtype="float32", max_length=32)
    assert model_type in str(raised.value)
    assert reason in str(raised.value)
