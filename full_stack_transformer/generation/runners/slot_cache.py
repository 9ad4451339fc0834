"""Keys and values of the requests under way, one slot each, allocated once.

Plugs into any transformers model through its cache interface: before a forward pass the engine says which
slots the rows of the batch belong to and which positions they write.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotCache(Cache):
    """Keys and values (slots, heads, max_length, head size) of every layer."""

    def __init__(self, num_layers: int, num_slots: int, max_length: int) -> None:
        self.num_slots = num_slots
        self.max_length = max_length
        self.slots = torch.zeros(0, dtype=torch.long)
        self.positions = torch.zeros(0, 0, dtype=torch.long)
        self.length = 0
        super().__init__(layers=[_SlotLayer(self) for _ in range(num_layers)])

    def select(self, slots: Tensor, positions: Tensor) -> int:
        """Say what the next forward pass computes; returns the number of keys that it will see.

        Args:
            slots: (rows,) the slot of each row.
            positions: (rows, queries) the position of each new token in its slot.
        """
        self.slots, self.positions = slots, positions
        self.length = int(positions.max()) + 1
        return self.length

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Let slot `target` hold the first tokens of `source`."""
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
        cache = self._cache
        shape = (cache.num_slots, key_states.shape[1], cache.max_length)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (rows, heads, queries, size); return all up to the longest row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, positions, length = self._cache.slots, self._cache.positions, self._cache.length
        # Indices around a slice put the indexed dimensions first: (rows, queries, heads, size).
        self.keys[slots[:, None], :, positions] = key_states.transpose(1, 2)
        self.values[slots[:, None], :, positions] = value_states.transpose(1, 2)
        if len(slots) == 1:
            slot = int(slots)
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
