"""A backbone of transformers, packed for the C++ decoder: the fast runner on processors.

Decoders of the Llama and GPT-2 families. The numbers of a token do not depend on what is computed beside
it, on how its prompt was cut, on its slot or on the number of threads, bit for bit, and with fp32 and int8
weights nor on the processor; see decoder.cpp.
"""

import ctypes
import math
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import MachineError, ModelError
from full_stack_transformer.generation.runners.native.library import (
    DecoderShape,
    load_library,
    why_not,
)
from full_stack_transformer.generation.runners.torch import SlotWork
from full_stack_transformer.modelling.backbones import context_length

WeightsDtype = Literal["float32", "bfloat16", "int8"]

# Before anybody tells PyTorch to use fewer, as `open_runner` does.
_NUM_THREADS = torch.get_num_threads()
_WEIGHTS_TYPES: dict[WeightsDtype, int] = {"float32": 0, "bfloat16": 1, "int8": 2}
_ATTENTION_IN, _ATTENTION_OUT, _MLP_IN, _MLP_OUT = range(4)
_ATTENTION_NORM, _MLP_NORM = range(2)
_LAST = -1  # the layer that head and last norm are said to belong to
_LANES = 16


def why_not_native(backbone: Backbone) -> str | None:
    """Why this backbone cannot run here in the C++ decoder; none if it can."""
    config = backbone.config
    if next(backbone.parameters()).device.type != "cpu":
        return "the model is not on the processor"
    if config.model_type not in ("llama", "gpt2"):
        return f"it knows llama and gpt2, not {config.model_type}"
    problem = _why_not_llama(config) if config.model_type == "llama" else _why_not_gpt2(config)
    sizes = (config.hidden_size, _head_size(config), _intermediate_size(config))
    if problem is None and any(size % _LANES for size in sizes):
        problem = f"its sizes {sizes} are no multiples of {_LANES}"
    return problem or why_not()


def _why_not_llama(config: PretrainedConfig) -> str | None:
    if config.hidden_act != "silu":
        return f"it knows SwiGLU, not {config.hidden_act}"
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        return "its rotary positions depend on the length"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "its rotary positions turn a part of each head"
    return None


def _why_not_gpt2(config: PretrainedConfig) -> str | None:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        return f"it knows gelu_new, not {config.activation_function}"
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return "its attention is scaled in an unusual way"
    return None


class NativeRunner:
    """Computes logits in C++.

    Args:
        backbone: in evaluation mode; its weights are copied and packed.
        num_slots: sequences held at once.
        weights_dtype: int8 has one scale for each output of a linear layer and for each token's inputs.
        max_length: tokens of each sequence; none for the model's context.
        num_threads: none for as many as PyTorch uses.
        isa: instruction set, of `machine.INSTRUCTION_SETS`; none for the best of this machine.

    Raises:
        ModelError: the decoder does not fit the backbone, or the weights are no numbers.
        MachineError: it cannot be compiled here, or memory is short.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_slots: int,
        weights_dtype: WeightsDtype,
        max_length: int | None = None,
        num_threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        problem = why_not_native(backbone)
        if problem is not None:
            raise ModelError(f"the C++ decoder cannot run this model here: {problem}")
        if not all(bool(torch.isfinite(weights).all()) for weights in backbone.parameters()):
            raise ModelError("the model has weights that are NaN or infinite; it is broken")
        config = backbone.config
        self.num_slots = num_slots
        self.max_length = max_length or context_length(config)
        self.vocab_size = backbone.get_input_embeddings().num_embeddings
        self._hidden_size: int = config.hidden_size
        # OMP_NUM_THREADS, the cores this process may use, or what torch.set_num_threads said.
        self.num_threads = num_threads or _NUM_THREADS
        self._library = load_library(isa)
        self.isa = self._library.isa
        self.name = f"C++ ({self.isa}), {weights_dtype} weights, {self.num_threads} threads"
        shape = _shape(config, self, _WEIGHTS_TYPES[weights_dtype])
        self._decoder = self._library.decoder_new(ctypes.byref(shape))
        if not self._decoder:
            raise MachineError(
                f"memory is short for {num_slots} texts of {self.max_length:,} tokens at once; allow "
                "fewer or shorter ones"
            )
        with torch.no_grad():
            if config.model_type == "gpt2":
                self._pack_gpt2(backbone)
            else:
                self._pack_llama(backbone)

    def run(self, work: Sequence[SlotWork]) -> Tensor:
        """Logits (sum of num_logits, vocabulary), in the order of the work."""
        ends = np.cumsum([len(one.token_ids) for one in work])
        rows = np.concatenate(
            [
                np.arange(end - one.num_logits, end, dtype=np.int32)
                for one, end in zip(work, ends.tolist(), strict=True)
            ]
        )
        logits = torch.empty(len(rows), self.vocab_size)
        self._forward(work, rows, logits)
        return logits

    def hidden_states(self, work: Sequence[SlotWork]) -> Tensor:
        """What the last norm gives (sum of tokens, hidden) for each token, in the order of the work."""
        no_rows = np.zeros(0, np.int32)
        num_tokens = self._forward(work, no_rows, torch.empty(0, self.vocab_size))
        states = torch.empty(num_tokens, self._hidden_size)
        self._library.decoder_hidden_states(self._decoder, _values(states))
        return states

    def _forward(
        self, work: Sequence[SlotWork], rows: np.ndarray[Any, np.dtype[np.int32]], logits: Tensor
    ) -> int:
        """Read the work and write the logits of some rows of it; returns its number of tokens."""
        lengths = [len(one.token_ids) for one in work]
        ids = np.fromiter((token for one in work for token in one.token_ids), np.int32)
        slots = np.repeat(np.array([one.slot for one in work], np.int32), lengths)
        positions = np.concatenate(
            [
                np.arange(one.start, one.start + length, dtype=np.int32)
                for one, length in zip(work, lengths, strict=True)
            ]
        )
        self._library.decoder_forward(
            *(self._decoder, len(ids), _ids(ids), _ids(slots), _ids(positions)),
            *(len(rows), _ids(rows), _values(logits)),
        )
        return len(ids)

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Let `target` hold the first tokens of `source`."""
        self._library.decoder_copy_slot(self._decoder, source, target, num_tokens)

    def __del__(self) -> None:
        if getattr(self, "_decoder", None):
            self._library.decoder_delete(self._decoder)
            self._decoder = None

    def _pack_llama(self, backbone: Any) -> None:
        model = backbone.model
        self._set_embeddings(model.embed_tokens.weight, None)
        frequencies = _rotary_frequencies(model.rotary_emb, backbone.config)
        scaling = float(model.rotary_emb.attention_scaling)
        self._library.decoder_set_rotary(self._decoder, _values(frequencies), scaling)
        for number, layer in enumerate(model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            self._set_linear(
                number, _ATTENTION_IN, attention.q_proj, attention.k_proj, attention.v_proj
            )
            self._set_linear(number, _ATTENTION_OUT, attention.o_proj)
            self._set_linear(number, _MLP_IN, mlp.gate_proj, mlp.up_proj)
            self._set_linear(number, _MLP_OUT, mlp.down_proj)
            self._set_norm(number, _ATTENTION_NORM, layer.input_layernorm)
            self._set_norm(number, _MLP_NORM, layer.post_attention_layernorm)
        self._set_norm(_LAST, 0, model.norm)
        self._set_linear(_LAST, 0, backbone.lm_head)

    def _pack_gpt2(self, backbone: Any) -> None:
        model = backbone.transformer
        self._set_embeddings(model.wte.weight, model.wpe.weight[: self.max_length])
        for number, layer in enumerate(model.h):
            self._set_linear(number, _ATTENTION_IN, layer.attn.c_attn)
            self._set_linear(number, _ATTENTION_OUT, layer.attn.c_proj)
            self._set_linear(number, _MLP_IN, layer.mlp.c_fc)
            self._set_linear(number, _MLP_OUT, layer.mlp.c_proj)
            self._set_norm(number, _ATTENTION_NORM, layer.ln_1)
            self._set_norm(number, _MLP_NORM, layer.ln_2)
        self._set_norm(_LAST, 0, model.ln_f)
        self._set_linear(_LAST, 0, backbone.lm_head)

    def _set_linear(self, layer: int, name: int, *parts: nn.Module) -> None:
        weights = torch.cat([_weights(part) for part in parts])
        biases = [part.bias for part in parts if isinstance(part.bias, Tensor)]
        bias = torch.cat(biases).float().contiguous() if biases else None
        self._library.decoder_set_linear(
            self._decoder, layer, name, _values(weights), _values(bias), *weights.shape
        )

    def _set_norm(self, layer: int, name: int, norm: Any) -> None:
        weight = norm.weight.float().contiguous()
        bias = getattr(norm, "bias", None)
        bias = bias.float().contiguous() if bias is not None else None
        self._library.decoder_set_norm(self._decoder, layer, name, _values(weight), _values(bias))

    def _set_embeddings(self, tokens: Tensor, positions: Tensor | None) -> None:
        tokens = tokens.float().contiguous()
        positions = positions.float().contiguous() if positions is not None else None
        self._library.decoder_set_embeddings(self._decoder, _values(tokens), _values(positions))


def _weights(linear: nn.Module) -> Tensor:
    """Weights (outputs, inputs) in fp32; GPT-2's Conv1D has them the other way round."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return (weight if isinstance(linear, nn.Linear) else weight.T).float().contiguous()


def _rotary_frequencies(rotary: Any, config: PretrainedConfig) -> Tensor:
    """Radians per position (head size / 2) as transformers computes them, but the same bits everywhere.

    PyTorch's powers in fp32 depend on the processor. Computed again in fp64 for the usual kinds: Su et al.
    2021 (RoFormer), stretched, and as Llama 3 stretches its slow ones.
    """
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        theirs: Tensor = rotary.inv_freq.float().contiguous()
        return theirs
    half = len(rotary.inv_freq)
    frequencies = [rope["rope_theta"] ** -(number / half) for number in range(half)]
    if kind == "linear":
        frequencies = [one / rope["factor"] for one in frequencies]
    elif kind == "llama3":
        frequencies = [_stretched_as_llama_3(one, rope) for one in frequencies]
    return torch.tensor(frequencies, dtype=torch.float64).float()


def _stretched_as_llama_3(frequency: float, rope: dict[str, float]) -> float:
    """Unchanged if fast, divided if slow, in between interpolated."""
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
    return (1 - smooth) * frequency / rope["factor"] + smooth * frequency


def _shape(config: PretrainedConfig, runner: NativeRunner, weights_type: int) -> DecoderShape:
    is_llama = config.model_type == "llama"
    head_size = _head_size(config)
    return DecoderShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads if is_llama else config.num_attention_heads,
        head_size=head_size,
        intermediate_size=_intermediate_size(config),
        vocab_size=runner.vocab_size,
        max_length=runner.max_length,
        num_slots=runner.num_slots,
        weights_type=weights_type,
        num_threads=runner.num_threads,
        is_gated=is_llama,
        centers_in_norm=not is_llama,
        has_rotary=is_llama,
        norm_epsilon=config.rms_norm_eps if is_llama else config.layer_norm_epsilon,
        attention_scale=head_size**-0.5,
    )


def _head_size(config: PretrainedConfig) -> int:
    size: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return size


def _intermediate_size(config: PretrainedConfig) -> int:
    if config.model_type == "gpt2":
        return int(config.n_inner or 4 * config.hidden_size)
    return int(config.intermediate_size)


def _values(tensor: Tensor | None) -> Any:
    """A pointer to fp32 numbers, which the caller keeps alive during the call."""
    if tensor is None:
        return None
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    return ctypes.cast(tensor.data_ptr(), POINTER(c_float))


def _ids(array: np.ndarray[Any, np.dtype[np.int32]]) -> Any:
    return array.ctypes.data_as(POINTER(c_int32))
