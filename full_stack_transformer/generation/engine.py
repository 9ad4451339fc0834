"""Continuous batching on token ids: add a request, step, cancel.

Requests join and leave between steps. Each has a slot of the cache; a step reads one bounded chunk of a
new prompt and then makes one token for every request whose prompt has been read, so that a long prompt
never stalls the others for long. Knows nothing of text, of HTTP and of threads: one thread owns it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import RequestError
from full_stack_transformer.generation.sampling import SamplingParameters, draw, final_scores
from full_stack_transformer.generation.slot_cache import SlotCache
from full_stack_transformer.modelling.backbones import context_length

# Tokens of a prompt that are read between two decoding steps.
_PREFILL_CHUNK_TOKENS = 256

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class TokenRequest:
    """What to generate."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParameters
    seed: int
    stop_ids: frozenset[int] = frozenset()
    """A token of these ends the request and is not part of the result."""
    forbids: Callable[[Sequence[int]], bool] | None = None
    """Called with the new tokens so far and a candidate at their end; true takes the candidate back."""


@dataclass(frozen=True)
class TokenEvent:
    """What a step did for one request: a new token, the end, or both."""

    request_id: int
    token_id: int | None
    finish_reason: FinishReason | None


@dataclass
class _Running:
    request: TokenRequest
    slot: int
    generator: torch.Generator
    num_read: int = 0
    new_ids: list[int] = field(default_factory=list)

    @property
    def is_reading(self) -> bool:
        return self.num_read < len(self.request.prompt_ids)


class Engine:
    """Generates for up to `num_slots` requests at once.

    Args:
        backbone: any causal language model of transformers, in evaluation mode.
        num_slots: requests under way at once; the caller queues the rest.
    """

    def __init__(self, backbone: Backbone, *, num_slots: int) -> None:
        config = backbone.config
        self.max_length = context_length(config)
        self.num_slots = num_slots
        self._backbone = backbone
        self._device = next(backbone.parameters()).device
        self._cache = SlotCache(config.num_hidden_layers, num_slots, self.max_length)
        self._free_slots = list(range(num_slots))
        self._running: dict[int, _Running] = {}
        self._next_id = 0

    @property
    def num_free_slots(self) -> int:
        """Requests that can be added now."""
        return len(self._free_slots)

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return len(self._running)

    def check(self, request: TokenRequest) -> None:
        """Refuse what can never be generated.

        Raises:
            RequestError: prompt and new tokens do not fit into the context, or an id is none of the model's.
        """
        num_prompt, num_new = len(request.prompt_ids), request.max_new_tokens
        if num_prompt == 0:
            raise RequestError("the prompt has no tokens; expected one at least")
        if num_prompt + num_new > self.max_length:
            raise RequestError(
                f"the model's context is {self.max_length} tokens, but the prompt has {num_prompt} and "
                f"{num_new} new ones were asked for; shorten the prompt or ask for fewer"
            )
        vocab_size = self._backbone.get_input_embeddings().num_embeddings
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab_size:
            raise RequestError(f"token ids must lie between 0 and {vocab_size - 1}")

    def add(self, request: TokenRequest) -> int:
        """Start a request in a free slot and return its id.

        Raises:
            RequestError: as `check`.
        """
        self.check(request)
        assert self._free_slots, "the caller must look at num_free_slots"
        request_id = self._next_id
        self._next_id += 1
        self._running[request_id] = _Running(
            request=request,
            slot=self._free_slots.pop(),
            generator=torch.Generator().manual_seed(request.seed),
        )
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request and free its slot; an unknown id is one that ended already."""
        running = self._running.pop(request_id, None)
        if running is not None:
            self._free_slots.append(running.slot)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Read one chunk of a prompt, if there is one to read, and make one token for each other request."""
        events: list[TokenEvent] = []
        reading = next((key for key, one in self._running.items() if one.is_reading), None)
        decoding = [key for key, one in self._running.items() if not one.is_reading]
        if reading is not None:
            logits = self._read_chunk(self._running[reading])
            if not self._running[reading].is_reading:
                events += self._choose([reading], logits)
        if decoding:
            events += self._choose(decoding, self._decode([self._running[key] for key in decoding]))
        return events

    def _read_chunk(self, running: _Running) -> Tensor:
        """Logits (1, vocabulary) after the chunk of the prompt that comes next."""
        start = running.num_read
        chunk = running.request.prompt_ids[start : start + _PREFILL_CHUNK_TOKENS]
        running.num_read += len(chunk)
        positions = torch.arange(start, running.num_read)[None, :]
        return self._forward(torch.tensor([chunk]), torch.tensor([running.slot]), positions)

    def _decode(self, batch: Sequence[_Running]) -> Tensor:
        """Logits (requests, vocabulary) after the newest token of each request."""
        last_ids = torch.tensor([[one.new_ids[-1]] for one in batch])
        positions = torch.tensor(
            [[len(one.request.prompt_ids) + len(one.new_ids) - 1] for one in batch]
        )
        return self._forward(last_ids, torch.tensor([one.slot for one in batch]), positions)

    def _forward(self, input_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        positions = positions.to(self._device)
        mask = self._cache.select(slots.to(self._device), positions)
        output = self._backbone(
            input_ids=input_ids.to(self._device),
            position_ids=positions,
            attention_mask=mask.to(self._backbone.dtype),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _choose(self, request_ids: Sequence[int], logits: Tensor) -> list[TokenEvent]:
        """Draw a token for each request and say which requests ended by it."""
        batch = [self._running[key] for key in request_ids]
        # NaN spreads to the largest score; -inf alone is a token out of the question.
        is_broken = ~torch.isfinite(logits.amax(dim=-1))
        sampling = [one.request.sampling for one in batch]
        seen = [
            torch.tensor([*one.request.prompt_ids, *one.new_ids], device=logits.device)
            for one in batch
        ]
        scores = final_scores(logits.nan_to_num(), sampling, seen)
        drawn = draw(scores, sampling, [one.generator for one in batch])
        events = []
        for row, (key, one) in enumerate(zip(request_ids, batch, strict=True)):
            if bool(is_broken[row]):
                self.cancel(key)
                events.append(TokenEvent(key, None, "error"))
                continue
            token_id = _allowed_token(int(drawn[row]), scores[row], one)
            events.append(self._accept(key, one, token_id))
        return events

    def _accept(self, key: int, running: _Running, token_id: int | None) -> TokenEvent:
        if token_id is None or token_id in running.request.stop_ids:
            self.cancel(key)
            return TokenEvent(key, None, "stop")
        running.new_ids.append(token_id)
        if len(running.new_ids) < running.request.max_new_tokens:
            return TokenEvent(key, token_id, None)
        self.cancel(key)
        return TokenEvent(key, token_id, "length")


def _allowed_token(token_id: int, scores: Tensor, running: _Running) -> int | None:
    """`token_id`, or another draw while the request forbids it; none when nothing is left."""
    forbids = running.request.forbids
    if forbids is None:
        return token_id
    scores = scores.clone()
    while forbids([*running.new_ids, token_id]):
        scores[token_id] = -torch.inf
        if not bool((scores > -torch.inf).any()):
            return None
        token_id = int(draw(scores[None], [running.request.sampling], [running.generator]))
    return token_id
