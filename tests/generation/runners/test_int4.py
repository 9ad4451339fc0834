"""Weights of 4 bits: what the C++ decoder makes of them is what NumPy computes from the integers."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.generation.runners.native import library
from full_stack_transformer.generation.runners.native.decoder import NativeRunner
from full_stack_transformer.generation.runners.torch import SequenceWork
from full_stack_transformer.machine import instruction_sets
from full_stack_transformer.quantization.codes import nearest
from tests.generation.small_models import varied_backbone

Array = np.ndarray[Any, np.dtype[np.float32]]
HIDDEN, INNER, HEADS, VOCABULARY = 96, 160, 3, 77


pytestmark = pytest.mark.usefixtures("decoder")


def _backbone() -> Backbone:
    return varied_backbone(
        transformers.LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=1,
            vocab_size=VOCABULARY,
            num_attention_heads=HEADS,
            max_position_embeddings=32,
        )
    )


def _rounded(inputs: Array) -> tuple[np.ndarray[Any, np.dtype[np.int64]], Array]:
    """Inputs (…, inputs) as int8, and their scales."""
    scales = np.abs(inputs).max(-1, keepdims=True) / np.float32(127)
    return np.rint(inputs * (1 / scales)).astype(np.int64), scales


def _int4(inputs: Array, weights: torch.Tensor) -> Array:
    """A linear layer: sums of integers within a group, then the scales."""
    made = nearest(weights, "int4")
    assert made.group_scales is not None and made.zeros is not None
    pairs = made.codes.numpy().astype(np.int64)
    codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(len(pairs), -1, 32)
    groups, scales = _rounded(inputs.reshape(len(inputs), -1, 32))
    sums = np.einsum("tgk,ngk->tng", groups, 16 * codes)
    sums -= made.zeros.numpy().astype(np.int64) * groups.sum(-1)[:, None]
    sums *= made.group_scales.numpy().astype(np.int64)
    total = (sums * scales[:, None, :, 0].astype(np.float64)).sum(-1) / 16
    result: Array = (total * made.scales.numpy().astype(np.float64)).astype(np.float32)
    return result


def _normalized(values: Array, norm: Any) -> Array:
    mean = (values.astype(np.float64) ** 2).mean(-1, keepdims=True) + norm.variance_epsilon
    result: Array = (values / np.sqrt(mean) * norm.weight.detach().numpy()).astype(np.float32)
    return result


def _states(backbone: Any, ids: list[int]) -> Array:
    """Hidden states of texts of one token each, which attend to themselves alone."""
    layer, model = backbone.model.layers[0], backbone.model
    hidden: Array = model.embed_tokens.weight[ids].bfloat16().float().detach().numpy()
    attention, mlp = layer.self_attn, layer.mlp
    values = _int4(_normalized(hidden, layer.input_layernorm), attention.v_proj.weight)
    values = torch.from_numpy(values).bfloat16().float().numpy()
    hidden = hidden + _int4(values, attention.o_proj.weight)
    read = _normalized(hidden, layer.post_attention_layernorm)
    gate, up = _int4(read, mlp.gate_proj.weight), _int4(read, mlp.up_proj.weight)
    hidden = hidden + _int4((gate / (1 + np.exp(-gate)) * up), mlp.down_proj.weight)
    return _normalized(hidden, model.norm)


@pytest.mark.parametrize("isa", [isa for isa in instruction_sets() if isa in library.targets()])
def test_states_are_what_numpy_computes_from_the_integers(isa: str) -> None:
    backbone = _backbone()
    runner = NativeRunner(
        backbone, num_blocks=33, block_size=16, weights_dtype="int4", kv_dtype="bfloat16", isa=isa
    )
    for num_tokens in (1, 2, 5, 33):
        ids = [(7 * number) % 70 + 3 for number in range(num_tokens)]
        found = runner.hidden_states(
            [SequenceWork([number], 0, [one], 0) for number, one in enumerate(ids)]
        )
        expected = _states(backbone, ids)
        distances = np.abs(found.numpy() - expected).max(-1) / np.abs(expected).max(-1)
        # An input between two integers, or a value between two of bf16, may be rounded to the other one.
        assert np.median(distances) < 1e-5
        assert distances.max() < 0.02
