"""What computes logits for the engine: any backbone of transformers through PyTorch, with a cache of slots.

A runner knows tokens, slots and positions, and nothing of requests. `native/` holds another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.generation.runners.attention_masks import AttentionMasks
from full_stack_transformer.generation.runners.slot_cache import SlotCache
from full_stack_transformer.modelling.backbones import context_length


@dataclass(frozen=True)
class SlotWork:
    """Tokens to read in one slot, behind those that it holds."""

    slot: int
    start: int
    """Position of the first of them; what the slot holds from there on is forgotten."""
    token_ids: Sequence[int]
    num_logits: int = 1
    """Logits are wanted after so many of the last tokens."""


class Runner(Protocol):
    """Computes logits; one thread at a time.

    Logits of a token follow from it and those before it in its slot, whatever else is computed.
    """

    num_slots: int
    max_length: int
    vocab_size: int
    name: str
    """What computes, for people."""

    def run(self, work: Sequence[SlotWork]) -> Tensor:
        """Logits (sum of num_logits, vocabulary) in the order of the work; one item a slot."""
        ...

    def hidden_states(self, work: Sequence[SlotWork]) -> Tensor:
        """What the last norm gives (sum of tokens, hidden) for each token, in the order of the work."""
        ...

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Let `target` hold the first tokens of `source`."""
        ...


class TorchRunner:
    """Any causal language model of transformers whose layers keep keys and values, on any device.

    The same work gives the same bits, but other work beside it or a prompt cut in another way may change the
    last ones: matrix products add up in an order that depends on the shape. Then a token changes where two
    scores, or a random number and a border between two tokens, are as near as that: about one in a million
    in fp32.

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
        slots = torch.tensor([one.slot for one in work], device=self._device)
        num_keys = self._cache.select(slots, positions)
        return {
            "input_ids": torch.tensor([list(one.token_ids) for one in work], device=self._device),
            "position_ids": positions,
            "attention_mask": self._masks.make(positions, num_keys),
            "past_key_values": self._cache,
        }
