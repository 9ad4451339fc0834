"""What runs on a GPU, on a device that is only pretended: nothing is forgotten on the processor."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.runners.torch import TorchRunner
from full_stack_transformer.generation.token_requests import TokenEvent, TokenRequest
from tests.another_device import DEVICE, another_device
from tests.generation.small_models import SHAPES, hidden_states, small_backbone

_PROMPT = tuple(range(3, 25))


def _requests() -> list[TokenRequest]:
    """Of each way to choose a token, and of what is told of them."""
    greedy = SamplingParameters(max_new_tokens=8, temperature=0)
    free = SamplingParameters(max_new_tokens=8, seed=1)
    cut = SamplingParameters(max_new_tokens=8, top_k=5, top_p=0.9, seed=2)
    typical = SamplingParameters(max_new_tokens=8, typical_p=0.9, min_p=0.01, seed=3)
    changed = SamplingParameters(
        max_new_tokens=8,
        repetition_penalty=1.3,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias={3: 1.0, 5: -2.0},
        min_new_tokens=4,
        seed=4,
    )
    return [
        TokenRequest(_PROMPT, greedy),
        TokenRequest(_PROMPT, free, num_log_probabilities=2),
        TokenRequest(_PROMPT, cut, num_log_probabilities=0, forbids=lambda ids: ids[-1] % 2 == 0),
        TokenRequest(_PROMPT, typical, num_prompt_log_probabilities=1),
        TokenRequest(_PROMPT, changed, stop_ids=frozenset({1})),
    ]


def _answers(
    backbone: Backbone, requests: Sequence[TokenRequest]
) -> tuple[dict[int, list[TokenEvent]], list[Tensor]]:
    """What an engine of three slots makes of the requests, and hidden states of two sequences."""
    engine = Engine(TorchRunner(backbone, num_blocks=9), num_slots=3)
    waiting, events = list(requests), dict[int, list[TokenEvent]]()
    while waiting or engine.num_running:
        while waiting and engine.num_free_slots:
            events[engine.add(waiting.pop(0))] = []
        for event in engine.step():
            assert event.problem is None, event.problem
            events[event.request_id].append(event)
    return events, hidden_states(engine, [[4, 5, 6], [7] * 20])


@pytest.mark.parametrize("shape", SHAPES)
def test_another_device_gives_the_same_tokens(shape: str) -> None:
    backbone = small_backbone(shape)
    events, states = _answers(backbone, _requests())
    with another_device():
        moved = copy.deepcopy(backbone).to(DEVICE)
        found, found_states = _answers(moved, _requests())
        assert found == events
        for here, there in zip(states, found_states, strict=True):
            assert there.device == DEVICE
            assert torch.equal(here, there.cpu())


def test_a_token_waits_for_the_device_a_few_times_whatever_the_layers() -> None:
    with another_device() as device:
        backbone = copy.deepcopy(small_backbone("llama")).to(DEVICE)
        engine = Engine(TorchRunner(backbone, num_blocks=9), num_slots=2, guesses=False)
        for _ in range(2):
            engine.add(TokenRequest(_PROMPT, SamplingParameters(max_new_tokens=20, temperature=0)))
        while len(engine.step()) < 2:
            pass
        before = device.num_readings
        for _ in range(5):
            assert len(engine.step()) == 2
        assert device.num_readings - before <= 5 * 4
