"""A backbone of transformers, packed for the C++ decoder: the fast runner on processors.

Which models: families.py and shape.py. The numbers of a token do not depend on what is computed beside
it, on how its prompt was cut, on its blocks or on the number of threads, bit for bit, and with fp32, int8
and int4 weights nor on the processor; see decoder.cpp.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_uint8
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import MachineError, ModelError
from full_stack_transformer.generation.runners.native.families import NORMS
from full_stack_transformer.generation.runners.native.library import (
    DecoderShape,
    load_library,
    why_not,
)
from full_stack_transformer.generation.runners.native.low_rank import (
    Joined,
    Place,
    joined,
    num_numbers,
    places_of,
)
from full_stack_transformer.generation.runners.native.parts import Linear, Norm, Parts, parts_of
from full_stack_transformer.generation.runners.native.shape import shape_of, why_not_family
from full_stack_transformer.generation.runners.torch import SequenceWork
from full_stack_transformer.machine import check_free_memory, memory_for
from full_stack_transformer.modelling.adapter_weights import AdapterWeights
from full_stack_transformer.modelling.backbones import context_length
from full_stack_transformer.quantization.codes import Codes, CodesDtype

WeightsDtype = Literal["float32", "bfloat16", "int8", "int4"]
KvDtype = Literal["float32", "bfloat16", "int8"]
_Ids = np.ndarray[Any, np.dtype[np.int32]]

# Before anybody tells PyTorch to use fewer, as `open_runner` does.
_NUM_THREADS = torch.get_num_threads()
_TYPES: dict[WeightsDtype | KvDtype, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 2}
# Of an adapter's numbers, with a scale for each rank. Each step reads them all, so they are as short as the
# weights allow: see docs/benchmarks.md.
_ADAPTER_BITS: dict[WeightsDtype, int] = {"float32": 16, "bfloat16": 8, "int8": 8, "int4": 8}
_BLOCK_SIZES = (16, 32, 64)
_ATTENTION_IN, _ATTENTION_OUT, _MLP_IN, _MLP_OUT = range(4)
_LAST = -1  # the layer that head and last norm are said to belong to


def why_not_native(backbone: Backbone) -> str | None:
    """Why this backbone cannot run here in the C++ decoder; none if it can."""
    if next(backbone.parameters()).device.type != "cpu":
        return "the model is not on the processor"
    return why_not_family(backbone) or why_not()


class NativeRunner:
    """Computes logits in C++.

    Args:
        backbone: in evaluation mode; its weights are copied and packed.
        num_blocks: of keys and values, which take memory when they are first written.
        block_size: tokens of a block: 16, 32 or 64.
        weights_dtype: int8 has one scale for each output of a linear layer and for each token's inputs, both
            rotated. int4 has one for each 32 inputs of an output, too; the head, and what has no multiple of
            32 inputs, stays int8.
        kv_dtype: of keys and values; int8 has one scale for each token and head.
        max_length: positions of a sequence; none for the model's context.
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
        num_blocks: int,
        block_size: int = 32,
        weights_dtype: WeightsDtype,
        kv_dtype: KvDtype,
        max_length: int | None = None,
        num_threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        problem = why_not_native(backbone)
        if problem is not None:
            raise ModelError(f"the C++ decoder cannot run this model here: {problem}")
        if not all(bool(torch.isfinite(weights).all()) for weights in backbone.parameters()):
            raise ModelError("the model has weights that are NaN or infinite; it is broken")
        assert block_size in _BLOCK_SIZES and num_blocks > 0
        config = backbone.config
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_length = max_length or context_length(config)
        self.vocab_size = backbone.get_input_embeddings().num_embeddings
        self._hidden_size: int = config.hidden_size
        # OMP_NUM_THREADS, the cores this process may use, or what torch.set_num_threads said.
        self.num_threads = num_threads or _NUM_THREADS
        self._library = load_library(isa)
        self.isa = self._library.isa
        self.name = f"C++ ({self.isa}), {weights_dtype} weights, {self.num_threads} threads"
        self._adapter_bits = _ADAPTER_BITS[weights_dtype]
        self._adapters: set[int] = set()
        shape = DecoderShape(
            **shape_of(backbone),
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            num_blocks=num_blocks,
            block_size=block_size,
            weights_type=_TYPES[weights_dtype],
            kv_type=_TYPES[kv_dtype],
            num_threads=self.num_threads,
            adapter_bits=self._adapter_bits,
        )
        self._decoder = self._library.decoder_new(ctypes.byref(shape))
        if not self._decoder:
            raise MachineError(
                f"memory is short for the keys and values of {num_blocks * block_size:,} tokens; allow fewer "
                "or shorter texts at once"
            )
        self._is_int4 = weights_dtype == "int4"
        self._has_codes = weights_dtype in ("int8", "int4")
        with torch.no_grad():
            parts = parts_of(backbone)
            self._pack(parts)
            self._places = places_of(parts, backbone)

    def run(self, work: Sequence[SequenceWork]) -> Tensor:
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

    def hidden_states(self, work: Sequence[SequenceWork]) -> Tensor:
        """What the last norm gives (sum of tokens, hidden) for each token, in the order of the work."""
        no_rows = np.zeros(0, np.int32)
        num_tokens = self._forward(work, no_rows, torch.empty(0, self.vocab_size))
        states = torch.empty(num_tokens, self._hidden_size)
        _need_memory(self._library.decoder_hidden_states(self._decoder, _values(states)))
        return states

    def add_adapter(self, number: int, adapter: AdapterWeights) -> None:
        """Let work name an adapter by this number.

        Raises:
            ModelError: it changes layers that the decoder does not have.
            MachineError: memory is short.
        """
        num_bytes = self._adapter_bits // 8 * num_numbers(adapter, self._places)
        what = f"the adapter {adapter.directory}"
        check_free_memory(num_bytes, what, torch.device("cpu"))
        with memory_for(what):
            _need_memory(self._library.decoder_add_adapter(self._decoder, number, num_bytes))
            try:
                for place, one in joined(adapter, self._places):
                    self._set_low_rank(number, place, one)
            except BaseException:
                self.remove_adapter(number)
                raise
        self._adapters.add(number)

    def _set_low_rank(self, number: int, place: Place, one: Joined) -> None:
        _need_memory(
            self._library.decoder_set_low_rank(
                *(self._decoder, number, place.layer, place.name),
                *(_values(one.down), _values(one.up)),
                *(_ids(one.first_ranks.numpy()), _ids(one.ranks.numpy())),
                *(len(one.down), one.up.shape[1]),
            )
        )

    def remove_adapter(self, number: int) -> None:
        """Give back the memory of an adapter."""
        self._adapters.discard(number)
        self._library.decoder_remove_adapter(self._decoder, number)

    def _forward(self, work: Sequence[SequenceWork], rows: _Ids, logits: Tensor) -> int:
        """Read the work and write the logits of some rows of it; returns its number of tokens."""
        lengths = [len(one.token_ids) for one in work]
        ids = np.concatenate([np.asarray(one.token_ids, np.int32) for one in work])
        sequences = np.repeat(np.arange(len(work), dtype=np.int32), lengths)
        positions = np.concatenate(
            [
                np.arange(one.start, one.start + length, dtype=np.int32)
                for one, length in zip(work, lengths, strict=True)
            ]
        )
        tables = [self._table(one) for one in work]
        starts = np.cumsum([0, *map(len, tables)], dtype=np.int32)
        block_ids = np.concatenate(tables)
        # The decoder reads and writes wherever it is told to.
        assert ids.min(initial=0) >= 0 and ids.max(initial=0) < self.vocab_size
        assert block_ids.min(initial=0) >= 0 and block_ids.max(initial=0) < self.num_blocks
        numbers = [one.adapter for one in work]
        assert self._adapters.issuperset(set(numbers) - {0})
        adapters = np.repeat(np.asarray(numbers, np.int32), lengths) if any(numbers) else None
        _need_memory(
            self._library.decoder_forward(
                *(self._decoder, len(ids), _ids(ids), _ids(sequences), _ids(positions)),
                *(_ids(starts), _ids(block_ids), _ids(adapters)),
                *(len(rows), _ids(rows), _values(logits)),
            )
        )
        return len(ids)

    def _table(self, one: SequenceWork) -> _Ids:
        """The blocks up to the last token of the work."""
        end = one.start + len(one.token_ids)
        num_blocks = -(-end // self.block_size)
        assert one.start >= 0 and end <= self.max_length, f"{end} of {self.max_length} positions"
        assert 0 <= one.num_logits <= len(one.token_ids)
        assert num_blocks <= len(one.block_ids), f"{end} tokens in {len(one.block_ids)} blocks"
        return np.asarray(one.block_ids[:num_blocks], np.int32)

    def __del__(self) -> None:
        if getattr(self, "_decoder", None):
            self._library.decoder_delete(self._decoder)
            self._decoder = None

    def _pack(self, parts: Parts) -> None:
        positions = parts.position_embeddings
        self._set_embeddings(
            parts.token_embeddings, positions[: self.max_length] if positions is not None else None
        )
        for rotary in parts.rotaries:
            frequencies = rotary.frequencies
            self._library.decoder_add_rotary(
                self._decoder, _values(frequencies), len(frequencies), rotary.scaling
            )
        for number, layer in enumerate(parts.layers):
            self._library.decoder_set_layer(self._decoder, number, layer.window, layer.rotary)
            self._set_linear(number, _ATTENTION_IN, layer.attention_in)
            self._set_linear(number, _ATTENTION_OUT, layer.attention_out)
            self._set_linear(number, _MLP_IN, layer.mlp_in)
            self._set_linear(number, _MLP_OUT, layer.mlp_out)
            for name, norm in layer.norms.items():
                self._set_norm(number, NORMS.index(name), norm)
        self._set_norm(_LAST, 0, parts.last_norm)
        self._set_linear(_LAST, 0, parts.head)

    def _set_linear(self, layer: int, name: int, linear: Linear) -> None:
        bias = linear.bias()
        # The head stays int8: it is where rounding costs most.
        codes_dtype: CodesDtype = "int4" if self._is_int4 and layer != _LAST else "int8"
        if linear.has_codes or self._has_codes:
            self._set_codes(layer, name, linear.codes(codes_dtype), bias)
            return
        weights = linear.weights()
        _need_memory(
            self._library.decoder_set_linear(
                self._decoder, layer, name, _values(weights), _values(bias), *weights.shape
            )
        )

    def _set_codes(self, layer: int, name: int, codes: Codes, bias: Tensor | None) -> None:
        _need_memory(
            self._library.decoder_set_codes(
                *(self._decoder, layer, name),
                *map(_bytes, (codes.codes, codes.group_scales, codes.zeros)),
                *(_values(codes.scales), _values(bias), *codes.shape),
            )
        )

    def _set_norm(self, layer: int, name: int, norm: Norm) -> None:
        weight, bias = norm.weight(), norm.bias()
        self._library.decoder_set_norm(
            self._decoder, layer, name, _values(weight), _values(bias), len(weight)
        )

    def _set_embeddings(self, tokens: Tensor, positions: Tensor | None) -> None:
        tokens = tokens.float().contiguous()
        positions = positions.float().contiguous() if positions is not None else None
        _need_memory(
            self._library.decoder_set_embeddings(self._decoder, _values(tokens), _values(positions))
        )


def _need_memory(has_memory: bool) -> None:
    if not has_memory:
        raise MemoryError


def _values(tensor: Tensor | None) -> Any:
    """A pointer to fp32 numbers, which the caller keeps alive during the call."""
    if tensor is None:
        return None
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    return ctypes.cast(tensor.data_ptr(), POINTER(c_float))


def _bytes(tensor: Tensor | None) -> Any:
    """A pointer to bytes, which the caller keeps alive during the call."""
    if tensor is None:
        return None
    assert tensor.element_size() == 1 and tensor.is_contiguous()
    return ctypes.cast(tensor.data_ptr(), POINTER(c_uint8))


def _ids(array: _Ids | None) -> Any:
    return None if array is None else array.ctypes.data_as(POINTER(c_int32))
