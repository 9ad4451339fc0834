"""What computes logits for the engine: any backbone of transformers through PyTorch, with paged memory.

A runner knows tokens, blocks and positions, and nothing of requests. `native/` holds another one.

    SequenceWork --TorchRunner--> ids, positions, AttentionMasks, PagedCache --backbone--> logits

In shapes: Q queries, K keys of a sequence. The index of a key is its position in the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone
from transformers.cache_utils import Cache, CacheLayerMixin

from full_stack_transformer.errors import ModelError
from full_stack_transformer.generation.runners.torch_adapters import TorchAdapters
from full_stack_transformer.modelling.adapter_weights import AdapterWeights
from full_stack_transformer.modelling.backbones import context_length

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
    adapter: int = 0
    """Which adapter's numbers are added; 0 for none."""


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

    def add_adapter(self, number: int, adapter: AdapterWeights) -> None:
        """Let work name an adapter by this number, which is above 0.

        Raises:
            ModelError: it does not fit.
            MachineError: memory is short.
        """
        ...

    def remove_adapter(self, number: int) -> None:
        """Give back the memory of an adapter that no work names any more."""
        ...


class TorchRunner:
    """Any causal language model of transformers whose layers keep keys and values, on any device.

    The same work gives the same bits, but other work in the same step, or a prompt cut into other chunks,
    may change the last ones: the order in which a matrix product adds up depends on its shape. Then a token
    changes if two scores, or a random number and a border between two tokens, are that close: about one in
    a million in fp32.

    Args:
        backbone: in evaluation mode.
        num_blocks: of keys and values, of all sequences together.
        block_size: tokens of a block.
        max_length: tokens of a sequence; none for the model's context.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_blocks: int,
        block_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_length = max_length or context_length(backbone.config)
        self.vocab_size = backbone.get_input_embeddings().num_embeddings
        self._backbone = backbone
        self._device = next(backbone.parameters()).device
        self.name = f"PyTorch, {str(backbone.dtype).removeprefix('torch.')} on {self._device}"
        self._masks = AttentionMasks(backbone.config, backbone.dtype)
        self._cache = PagedCache(backbone.config.num_hidden_layers, num_blocks, block_size)
        self._adapters = TorchAdapters(backbone)

    def add_adapter(self, number: int, adapter: AdapterWeights) -> None:
        """Let work name an adapter by this number."""
        self._adapters.add(number, adapter)

    def remove_adapter(self, number: int) -> None:
        """Give back the memory of an adapter."""
        self._adapters.remove(number)

    @torch.inference_mode()
    def run(self, work: Sequence[SequenceWork]) -> Tensor:
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
    def hidden_states(self, work: Sequence[SequenceWork]) -> Tensor:
        """What the last norm gives (sum of tokens, hidden) for each token, in the order of the work."""
        decoder, states = self._backbone.base_model, []
        for one in work:
            with self._adapters.applied([one.adapter]):
                output = decoder(**self._inputs([one]), use_cache=True)
            states.append(output.last_hidden_state[0])
        return torch.cat(states).float()

    def _forward(self, work: Sequence[SequenceWork]) -> Tensor:
        """Logits (items, wanted, vocabulary) of items of equal length."""
        num_wanted = max(1, max(one.num_logits for one in work))
        with self._adapters.applied([one.adapter for one in work]):
            output = self._backbone(**self._inputs(work), use_cache=True, logits_to_keep=num_wanted)
        logits: Tensor = output.logits
        return logits

    def _inputs(self, work: Sequence[SequenceWork]) -> dict[str, Any]:
        """What a forward pass takes for items of equal length; the cache is told of it."""
        num_tokens = len(work[0].token_ids)
        starts = torch.tensor([[one.start] for one in work])
        positions = (starts + torch.arange(num_tokens)).to(self._device)
        num_keys = self._cache.select(work, positions)
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


class PagedCache(Cache):
    """Keys and values of all sequences, in blocks that take memory when the first one so far is written.

    Fits any transformers model through its cache interface: before a forward pass the runner says which
    blocks the rows of the batch have and which positions they write.
    """

    def __init__(self, num_layers: int, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_written = 0
        """Blocks up to the last one that is written."""
        self.places = torch.zeros(0, 0, dtype=torch.long)
        """(rows, keys) where the keys of each row lie, in the order of their positions."""
        self.targets = torch.zeros(0, 0, dtype=torch.long)
        """(rows, queries) where the new keys go."""
        self.fresh = torch.zeros(0, dtype=torch.long)
        """Blocks whose first token is written now."""
        super().__init__(layers=[_PagedLayer(self) for _ in range(num_layers)])

    def select(self, work: Sequence[SequenceWork], positions: Tensor) -> int:
        """Say what the next forward pass computes; returns the number of keys that it will see.

        Args:
            work: one item a row.
            positions: (rows, queries) the position of each new token in its sequence.
        """
        # Lists: what is asked of a device waits for it.
        ends = [one.start + len(one.token_ids) for one in work]
        num_keys, size = max(ends), self.block_size
        num_columns = -(-num_keys // size)
        # Beyond the end of a row the mask hides what is there; its own block holds numbers at least.
        table = [
            [*one.block_ids[:num_columns], *[one.block_ids[0]] * (num_columns - len(one.block_ids))]
            for one in work
        ]
        fresh = [
            block
            for one, end in zip(work, ends, strict=True)
            for block in one.block_ids[-(-one.start // size) : -(-end // size)]
        ]
        self.num_written = max(self.num_written, *(1 + max(row) for row in table))
        device = positions.device
        blocks = torch.tensor(table, device=device)
        self.fresh = torch.tensor(fresh, dtype=torch.long, device=device)
        places = blocks[:, :, None] * size + torch.arange(size, device=device)
        self.places = places.flatten(1)[:, :num_keys]
        self.targets = self.places.gather(1, positions)
        return num_keys


class _PagedLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: PagedCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, now that heads, size and type are known."""
        self.keys, self.values = self._empty(key_states, 0), self._empty(value_states, 0)
        self.is_initialized = True

    def _empty(self, states: Tensor, num_blocks: int) -> Tensor:
        """Zeros (blocks, block size, heads, size) like the states (rows, heads, queries, size)."""
        shape = (num_blocks, self._cache.block_size, states.shape[1], states.shape[-1])
        return states.new_zeros(shape)

    def _make_room(self, num_blocks: int, like: Sequence[Tensor]) -> None:
        """Let there be so many blocks at least, and twice as many as before."""
        before = len(self.keys)
        if num_blocks <= before:
            return
        after = min(self._cache.num_blocks, max(num_blocks, 2 * before))
        # Both or none: where memory ends between the two, they still fit each other.
        keys, values = (self._empty(states, after) for states in like)
        keys[:before], values[:before] = self.keys, self.values
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (rows, heads, queries, size); return all up to the longest row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        self._make_room(cache.num_written, (key_states, value_states))
        return (
            _write_and_read(self.keys, key_states, cache),
            _write_and_read(self.values, value_states, cache),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the mask covers, and the first of them."""
        return self._cache.places.shape[1], 0

    def get_seq_length(self) -> int:
        """Tokens stored; positions are always given, so nothing may depend on it."""
        return 0

    def get_max_length(self) -> int:
        """Tokens that fit into all blocks."""
        return self._cache.num_blocks * self._cache.block_size


def _write_and_read(stored: Tensor, states: Tensor, cache: PagedCache) -> Tensor:
    """Put states (rows, heads, queries, size) into blocks; what these hold (rows, heads, keys, size)."""
    # NaN that another sequence left would pass through the mask.
    stored[cache.fresh] = 0
    tokens = stored.flatten(0, 1)
    tokens[cache.targets] = states.transpose(1, 2)
    return tokens[cache.places].transpose(1, 2)
