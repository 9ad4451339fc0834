"""What computes logits for the engine: any backbone of transformers through PyTorch, with a cache of slots.

A runner knows tokens, slots and positions, and nothing of requests. `native/` holds another one.

    SlotWork --TorchRunner--> ids, positions, AttentionMasks, SlotCache --backbone--> logits

In shapes: Q queries, K keys of a slot. The index of a key in its slot is its position in the text.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone
from transformers.cache_utils import Cache, CacheLayerMixin

from full_stack_transformer.errors import ModelError
from full_stack_transformer.modelling.backbones import context_length

# Tokens of a slot that are allocated at least.
_MIN_SLOT_TOKENS = 256
_OWN_PAGES = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


@dataclass(frozen=True)
class SequenceWork:
    """Tokens to read after those of a sequence that its blocks hold."""

    block_ids: Sequence[int]
    """The blocks of the sequence in order: position p lies in block p // block_size, at p % block_size."""
    start: int
    """Position of the first token; what the blocks hold before it is read and never written, what they hold
    from there on is written over."""
    token_ids: Sequence[int]
    num_logits: int = 1
    """Number of last tokens whose logits are wanted."""


SlotWork: Any = SequenceWork  # until the engine goes over


class Runner(Protocol):
    """Computes logits; one thread at a time.

    Logits of a token follow from it and those before it in its sequence, whatever else is computed. Several
    sequences may share blocks that none of them writes.
    """

    num_blocks: int
    """Blocks of keys and values, which take memory when they are first written."""
    block_size: int
    """Tokens of a block."""
    max_length: int
    """Positions of a sequence."""
    vocab_size: int
    name: str
    """What computes, for people."""

    def run(self, work: Sequence[SequenceWork]) -> Tensor:
        """Logits (sum of num_logits, vocabulary) in the order of the work."""
        ...

    def hidden_states(self, work: Sequence[SequenceWork]) -> Tensor:
        """What the last norm gives (sum of tokens, hidden) for each token, in the order of the work."""
        ...


class TorchRunner:
    """Any causal language model of transformers whose layers keep keys and values, on any device.

    The same work gives the same bits, but other work in the same step, or a prompt cut into other chunks,
    may change the last ones: the order in which a matrix product adds up depends on its shape. Then a token
    changes if two scores, or a random number and a border between two tokens, are that close: about one in
    a million in fp32.

    Args:
        backbone: in evaluation mode.
        num_slots: sequences held at once.
        max_length: tokens of each; none for the model's context.
    """

    def __init__(
        self, backbone: Backbone, *, num_slots: int, max_length: int | None = None
    ) -> None:
        self.num_slots = num_slots
        self.max_length = max_length or context_length(backbone.config)
        self.vocab_size = backbone.get_input_embeddings().num_embeddings
        self._backbone = backbone
        self._device = next(backbone.parameters()).device
        self.name = f"PyTorch, {str(backbone.dtype).removeprefix('torch.')} on {self._device}"
        self._masks = AttentionMasks(backbone.config, backbone.dtype)
        self._cache = SlotCache(backbone.config.num_hidden_layers, num_slots, self.max_length)

    @torch.inference_mode()
    def run(self, work: Sequence[SlotWork]) -> Tensor:
        """Logits (sum of num_logits, vocabulary), in the order of the work."""
        logits: dict[int, Tensor] = {}
        single = [number for number, one in enumerate(work) if len(one.token_ids) == 1]
        if single:
            found = self._forward([work[number] for number in single])
            logits |= {number: found[row] for row, number in enumerate(single)}
        for number, one in enumerate(work):
            if len(one.token_ids) > 1:
                logits[number] = self._forward([one])[0]
        wanted = [
            logits[number][-one.num_logits :] for number, one in enumerate(work) if one.num_logits
        ]
        return torch.cat(wanted) if wanted else torch.zeros(0, self.vocab_size)

    @torch.inference_mode()
    def hidden_states(self, work: Sequence[SlotWork]) -> Tensor:
        """What the last norm gives (sum of tokens, hidden) for each token, in the order of the work."""
        decoder = self._backbone.base_model
        states = [
            decoder(**self._inputs([one]), use_cache=True).last_hidden_state[0] for one in work
        ]
        return torch.cat(states).float()

    @torch.inference_mode()
    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Let `target` hold the first tokens of `source`."""
        self._cache.copy(source, target, num_tokens)

    def _forward(self, work: Sequence[SlotWork]) -> Tensor:
        """Logits (items, wanted, vocabulary) of items of equal length."""
        num_wanted = max(1, max(one.num_logits for one in work))
        output = self._backbone(**self._inputs(work), use_cache=True, logits_to_keep=num_wanted)
        logits: Tensor = output.logits
        return logits

    def _inputs(self, work: Sequence[SlotWork]) -> dict[str, Any]:
        """What a forward pass takes for items of equal length; the cache is told of it."""
        num_tokens = len(work[0].token_ids)
        starts = torch.tensor([[one.start] for one in work])
        positions = (starts + torch.arange(num_tokens)).to(self._device)
        # Lists: what is asked of a device waits for it.
        ends = [one.start + num_tokens for one in work]
        num_keys = self._cache.select([one.slot for one in work], positions, ends)
        return {
            "input_ids": torch.tensor([list(one.token_ids) for one in work], device=self._device),
            "position_ids": positions,
            "attention_mask": self._masks.make(positions, num_keys),
            "past_key_values": self._cache,
        }


class AttentionMasks:
    """Builds the masks of a model: which keys each query sees, for each kind of attention layer.

    Args:
        config: of the model.
        dtype: in which it computes.

    Raises:
        ModelError: the model has layers that are none of the known kinds.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._window: int | None = getattr(config, "sliding_window", None)
        self._chunk: int | None = getattr(config, "attention_chunk_size", None)
        named = getattr(config, "layer_types", None)
        alone = _SLIDING if self._window else _FULL
        self._kinds = sorted(set(named)) if named else [alone]
        # Models whose layers differ take a mask for each kind, by its name.
        self._is_single = not named or self._kinds == [_FULL]
        unknown = [kind for kind in self._kinds if kind not in (_FULL, _SLIDING, _CHUNKED)]
        if unknown:
            raise ModelError(
                f"{config.model_type} has layers of {unknown[0]}, which keep something else than keys and "
                "values; such a model cannot be generated with here"
            )

    def make(self, positions: Tensor, num_keys: int) -> Tensor | dict[str, Tensor]:
        """Masks (rows, 1, Q, K): 0 where a query may look, -inf elsewhere.

        Args:
            positions: (rows, Q) of the queries.
            num_keys: K.
        """
        masks = {kind: self._mask(kind, positions, num_keys) for kind in self._kinds}
        return masks[self._kinds[0]] if self._is_single else masks

    def _mask(self, kind: str, positions: Tensor, num_keys: int) -> Tensor:
        keys = torch.arange(num_keys, device=positions.device)[None, None, None, :]
        queries = positions[:, None, :, None]
        allowed = keys <= queries
        if kind == _SLIDING and self._window:
            allowed &= keys > queries - self._window
        elif kind == _CHUNKED and self._chunk:
            allowed &= keys // self._chunk == queries // self._chunk
        mask = torch.zeros(allowed.shape, device=positions.device, dtype=self._dtype)
        return mask.masked_fill(~allowed, -torch.inf)


class SlotCache(Cache):
    """Keys and values of the requests under way (slots, heads, length, head size), for the longest so far.

    Fits any transformers model through its cache interface: before a forward pass the runner says which
    slots the rows of the batch belong to and which positions they write.
    """

    def __init__(self, num_layers: int, num_slots: int, max_length: int) -> None:
        self.num_slots = num_slots
        self.max_length = max_length
        self.slots = torch.zeros(0, dtype=torch.long)
        self.only_slot: int | None = None
        """Where there is one row."""
        self.positions = torch.zeros(0, 0, dtype=torch.long)
        self.length = 0
        self.held = [0] * num_slots
        """Tokens that each slot may hold."""
        super().__init__(layers=[_SlotLayer(self) for _ in range(num_layers)])

    def select(self, slots: Sequence[int], positions: Tensor, ends: Sequence[int]) -> int:
        """Say what the next forward pass computes; returns the number of keys that it will see.

        Args:
            slots: the slot of each row.
            positions: (rows, queries) the position of each new token in its slot.
            ends: after the last position of each row.
        """
        self.slots = torch.tensor(slots, device=positions.device)
        self.only_slot = slots[0] if len(slots) == 1 else None
        self.positions = positions
        self.length = max(ends)
        for slot, end in zip(slots, ends, strict=True):
            self.held[slot] = end
        return self.length

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Let slot `target` hold the first tokens of `source`."""
        self.held[target] = num_tokens
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                stored[target, :, :num_tokens] = stored[source, :, :num_tokens]


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, now that heads, size and type are known."""
        self.keys, self.values = self._empty(key_states, 0), self._empty(value_states, 0)
        self.is_initialized = True

    def _empty(self, states: Tensor, length: int) -> Tensor:
        """Zeros (slots, heads, length, size) like the states (rows, heads, queries, size)."""
        shape = (self._cache.num_slots, states.shape[1], length, states.shape[-1])
        if states.device.type != "cpu" or not length:
            return states.new_zeros(shape)
        # Pages of the system take memory when they are first written, so a slot takes what it holds.
        pages = mmap.mmap(-1, math.prod(shape) * states.element_size(), flags=_OWN_PAGES)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(pages, dtype=states.dtype).view(shape)

    def _make_room(self, length: int) -> None:
        """Let the slots be long enough, and twice as long as before."""
        before = self.keys.shape[2]
        if length <= before:
            return
        after = min(self._cache.max_length, max(length, 2 * before, _MIN_SLOT_TOKENS))
        # Both or none: where memory ends between the two, they still fit each other.
        keys, values = self._empty(self.keys, after), self._empty(self.values, after)
        for old, new in ((self.keys, keys), (self.values, values)):
            for slot, num_held in enumerate(self._cache.held):
                if kept := min(num_held, before):
                    new[slot, :, :kept] = old[slot, :, :kept]
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (rows, heads, queries, size); return all up to the longest row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, positions, length = self._cache.slots, self._cache.positions, self._cache.length
        self._make_room(length)
        # Indices around a slice put the indexed dimensions first: (rows, queries, heads, size).
        self.keys[slots[:, None], :, positions] = key_states.transpose(1, 2)
        self.values[slots[:, None], :, positions] = value_states.transpose(1, 2)
        if (slot := self._cache.only_slot) is not None:
            return self.keys[slot : slot + 1, :, :length], self.values[slot : slot + 1, :, :length]
        return self.keys[slots, :, :length], self.values[slots, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the mask covers, and the first of them."""
        return self._cache.length, 0

    def get_seq_length(self) -> int:
        """Tokens stored; positions are always given, so nothing may depend on it."""
        return 0

    def get_max_length(self) -> int:
        """Tokens that fit into a slot."""
        return self._cache.max_length
