"""Small backbones with random weights, every runner for them, and how tests drive an engine."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.runners.native.decoder import (
    KvDtype,
    NativeRunner,
    why_not_native,
)
from full_stack_transformer.generation.runners.torch import Runner, SequenceWork, TorchRunner
from full_stack_transformer.generation.token_requests import TokenEvent, TokenRequest
from full_stack_transformer.modelling.adapter_weights import AdapterWeights
from full_stack_transformer.modelling.backbones import new_backbone

VOCABULARY, CONTEXT = 300, 128
GREEDY = SamplingParameters(temperature=0)
SAMPLED = SamplingParameters(temperature=0.9, top_p=0.9, repetition_penalty=1.1)
SHAPES = ("llama", "gpt2")
RUNNERS = ("torch", "float32", "bfloat16", "int8")


@cache
def small_backbone(shape: str) -> Backbone:
    """Two layers, width 64, in evaluation mode; never changed by a test."""
    torch.manual_seed(1)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if shape == "llama":
        backbone = new_backbone(
            "tiny",
            vocab_size=VOCABULARY,
            max_length=CONTEXT,
            special_token_ids={"begin": 0, "end": 1, "pad": 2},
        )
    elif shape == "gpt2":
        config = transformers.GPT2Config(
            **ids, vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2
        )
        backbone = transformers.GPT2LMHeadModel(config)
    else:
        assert shape == "cohere"  # which the C++ decoder does not know
        config = transformers.CohereConfig(
            **ids,
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            logit_scale=1.0,
        )
        backbone = transformers.CohereForCausalLM(config)
    # Fresh weights predict all tokens about alike, or the last one again.
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return backbone.eval()


def varied_backbone(config: transformers.PretrainedConfig) -> Backbone:
    """A model whose weights, biases and norms all matter for the result."""
    config.bos_token_id, config.eos_token_id = 0, 1
    torch.manual_seed(2)
    backbone = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
            elif "bias" in name:
                parameter.normal_(std=0.3)
            else:
                parameter.uniform_(0.5, 1.5)
    return backbone


def make_runner(
    kind: str,
    shape: str = "llama",
    *,
    num_blocks: int = 40,
    block_size: int = 16,
    kv_dtype: KvDtype | None = None,
) -> Runner:
    """A runner of this kind; skips the test where the machine cannot have it."""
    backbone = small_backbone(shape)
    if kind == "torch":
        return TorchRunner(backbone, num_blocks=num_blocks, block_size=block_size)
    problem = why_not_native(backbone)
    if problem is not None:
        pytest.skip(f"no C++ decoder here: {problem}")
    return NativeRunner(
        backbone,
        num_blocks=num_blocks,
        block_size=block_size,
        weights_dtype=kind,  # type: ignore[arg-type]
        kv_dtype=kv_dtype or ("float32" if kind == "float32" else "bfloat16"),
    )


class WithoutAdapters:
    """A part of a runner."""

    def add_adapter(self, number: int, adapter: AdapterWeights) -> None:
        """Nobody asks."""
        raise NotImplementedError

    def remove_adapter(self, number: int) -> None:
        """Nobody asks."""
        raise NotImplementedError


class RememberingRunner:
    """Its next token is a function of all tokens before it, which it remembers in its blocks.

    Whatever an engine mixes up, forgets or takes from another request changes what comes out.
    """

    name = "remembering"
    vocab_size = 40
    max_length = 64

    def __init__(self, num_blocks: int = 16, block_size: int = 16) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_read_tokens = 0
        self.adapters = {0}
        self.tokens: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]

    def run(self, work: Sequence[SequenceWork]) -> Tensor:
        """Scores that follow from the tokens."""
        writable = [
            block for one in work for block in one.block_ids[one.start // self.block_size :]
        ]
        assert len(set(writable)) == len(writable), "two sequences may write one block"
        rows = []
        for one in work:
            assert one.adapter in self.adapters
            self._write(one)
            known = [token for block in one.block_ids for token in self.tokens[block]]
            end = one.start + len(one.token_ids)
            assert None not in known[:end], "tokens before those of the work are missing"
            self.num_read_tokens += len(one.token_ids)
            for length in range(end - one.num_logits + 1, end + 1):
                rows.append(self._scores([token for token in known[:length] if token is not None]))
        return torch.stack(rows) if rows else torch.zeros(0, self.vocab_size)

    def _write(self, one: SequenceWork) -> None:
        for position, token in enumerate(one.token_ids, one.start):
            block = one.block_ids[position // self.block_size]
            # What was read with another adapter is something else.
            self.tokens[block][position % self.block_size] = token + 1000 * one.adapter

    def hidden_states(self, work: Sequence[SequenceWork]) -> Tensor:
        """Each token and its position."""
        self.run([replace(one, num_logits=0) for one in work])
        return torch.tensor(
            [pair for one in work for pair in enumerate(one.token_ids, one.start)],
            dtype=torch.float32,
        )

    def add_adapter(self, number: int, adapter: AdapterWeights) -> None:
        """Any adapter changes all scores."""
        self.adapters.add(number)

    def remove_adapter(self, number: int) -> None:
        """Refuse work that names it."""
        self.adapters.remove(number)

    def _scores(self, token_ids: Sequence[int]) -> Tensor:
        # Tokens come back after a while, so that guesses from the text are right now and then.
        numbers = random.Random(
            hash(tuple(token_ids[-3:])) if len(token_ids) % 7 else str(token_ids)
        )
        return torch.tensor([numbers.gauss(0, 3) for _ in range(self.vocab_size)])


def token_request(
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingParameters,
    seed: int,
    *,
    min_new_tokens: int = 0,
    **others: Any,
) -> TokenRequest:
    """A request with this length and seed."""
    sampling = replace(
        sampling, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, seed=seed
    )
    return TokenRequest(prompt_ids, sampling, **others)


def run_requests(engine: Engine, requests: Sequence[TokenRequest]) -> list[list[int]]:
    """Tokens of all requests, added as slots become free."""
    return [tokens_of(events) for events in run_events(engine, requests)]


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    """The new tokens."""
    return [event.token_id for event in events if event.token_id is not None]


def run_events(engine: Engine, requests: Sequence[TokenRequest]) -> list[list[TokenEvent]]:
    """Events of all requests, added as slots become free."""
    waiting = list(enumerate(requests))
    numbers: dict[int, int] = {}
    results: list[list[TokenEvent]] = [[] for _ in requests]
    while waiting or engine.num_running:
        while waiting and engine.num_free_slots:
            number, request = waiting.pop(0)
            numbers[engine.add(request)] = number
        for event in engine.step():
            results[numbers[event.request_id]].append(event)
    assert engine.num_free_slots == engine.num_slots
    assert engine.block_use.num_used == 0
    return results


def hidden_states(engine: Engine, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """What the model makes of each token of some sequences."""
    requests = [TokenRequest.for_hidden_states(sequence) for sequence in sequences]
    states = [events[-1].hidden_states for events in run_events(engine, requests)]
    return [one for one in states if one is not None]


def random_prompts(
    count: int, *, vocab_size: int = VOCABULARY, max_tokens: int = 60
) -> list[list[int]]:
    """Prompts of 1 to `max_tokens` tokens."""
    numbers = random.Random(3)
    return [
        [numbers.randrange(3, vocab_size) for _ in range(numbers.randint(1, max_tokens))]
        for _ in range(count)
    ]
