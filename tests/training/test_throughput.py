"""The peak is measured quickly and changes nothing; FLOPs are those that torch counts."""

import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from full_stack_transformer.machine import measure_bandwidth, measure_matmul_peak
from full_stack_transformer.modelling.acceleration import flops_per_token
from full_stack_transformer.modelling.backbones import new_backbone


@pytest.mark.parametrize("name", ["tiny", "gpt2", "untied"])
def test_flops_per_token_are_those_of_all_matrix_products(name: str, tmp_path: Path) -> None:
    configs = {
        "tiny": "tiny",
        "gpt2": '{"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4}',
        "untied": '{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "head_dim": 16, '
        '"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}',
    }
    path = tmp_path / "config.json"
    path.write_text(configs[name])
    backbone = new_backbone(
        name if name == "tiny" else str(path),
        vocab_size=301,
        max_length=64,
        special_token_ids={"begin": 0, "end": 1, "pad": 2},
    )
    backbone.set_attn_implementation("eager")  # the products of sdpa are counted as half of them
    input_ids = torch.randint(0, 301, (2, 48))
    with FlopCounterMode(display=False) as counter:
        backbone(input_ids=input_ids, use_cache=False).logits.sum().backward()
    found = flops_per_token(backbone, 48) * input_ids.numel()
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_the_peak_is_measured_quickly_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    started = time.process_time()
    peak = measure_matmul_peak(torch.device("cpu"), torch.float32)
    assert time.process_time() - started < 2
    assert 1e9 < peak < 1e15
    assert torch.equal(torch.get_rng_state(), state)


def test_a_copy_tells_the_bandwidth() -> None:
    assert 1e8 < measure_bandwidth(torch.device("cpu")) < 1e14
