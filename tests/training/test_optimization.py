"""The schedule and the decay groups are what they say."""

import copy
import math

import pytest
import torch

from full_stack_transformer.modelling.backbones import new_backbone
from full_stack_transformer.training.optimization import cosine_factor, make_optimizer


def _factor(step: int, progress: float, num_warmup_steps: int = 0, num_cycles: int = 1) -> float:
    return cosine_factor(
        step, progress, num_warmup_steps=num_warmup_steps, num_cycles=num_cycles, min_ratio=0.1
    )


def test_the_rate_rises_then_falls_to_the_floor() -> None:
    assert _factor(0, 0.0, num_warmup_steps=4) == pytest.approx(0.25)
    assert _factor(3, 0.0, num_warmup_steps=4) == pytest.approx(1.0)
    assert _factor(50, 0.5) == pytest.approx(0.55)
    assert _factor(100, 1.0) == pytest.approx(0.1)


def test_cycles_restart_at_the_top() -> None:
    rates = [_factor(step, step / 300, num_cycles=3) for step in range(300)]
    assert [step for step, rate in enumerate(rates) if rate == 1.0] == [0, 100, 200]
    for cycle in range(3):
        falling = rates[cycle * 100 : cycle * 100 + 100]
        assert falling == sorted(falling, reverse=True)
        assert falling[99] < 0.11


def test_only_matrices_decay() -> None:
    ids = {"begin": 0, "end": 1, "pad": 2}
    backbone = new_backbone("tiny", vocab_size=50, max_length=16, special_token_ids=ids)
    optimizer = make_optimizer(backbone, name="adamw", learning_rate=1e-3, weight_decay=0.1)
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    kept_names = {names[id(parameter)] for parameter in kept["params"]}
    assert "model.embed_tokens.weight" in kept_names
    assert all("norm" in name or "embed" in name for name in kept_names)
    total = len(decayed["params"]) + len(kept["params"])
    assert total == len(list(backbone.parameters()))


def test_a_step_follows_adamw() -> None:
    module = torch.nn.Linear(3, 3, bias=False)
    before = module.weight.detach().clone()
    optimizer = make_optimizer(module, name="adamw", learning_rate=0.1, weight_decay=0.5)
    module.weight.grad = torch.ones(3, 3)
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 1 / (math.sqrt(1) + 1e-8)
    torch.testing.assert_close(module.weight.detach(), expected)


def _small_module() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(7, 6), torch.nn.Linear(6, 4), torch.nn.LayerNorm(4)
    )


def _train(module: torch.nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    ids = torch.tensor([[1, 2, 3]])
    for _ in range(num_steps):
        optimizer.zero_grad()
        torch.autograd.backward(module(ids).square().sum())
        optimizer.step()


def test_muon_moves_matrices_and_adamw_the_rest() -> None:
    """As one optimizer they do what the two do side by side."""
    together, apart = _small_module(), _small_module()
    one = make_optimizer(together, name="muon", learning_rate=0.01, weight_decay=0.1)
    parameters = dict(apart.named_parameters())
    muon = torch.optim.Muon([parameters.pop("1.weight")], lr=0.05, weight_decay=0.1)
    rest = list(parameters.values())
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    _train(together, one, 3)
    for _ in range(3):
        apart.zero_grad()
        torch.autograd.backward(apart(torch.tensor([[1, 2, 3]])).square().sum())
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
    for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_restored_muon_goes_on_bit_for_bit() -> None:
    module = _small_module()
    optimizer = make_optimizer(module, name="muon", learning_rate=0.01, weight_decay=0.1)
    _train(module, optimizer, 3)
    saved = (
        {name: tensor.clone() for name, tensor in module.state_dict().items()},
        copy.deepcopy(optimizer.state_dict()),
    )
    resumed = _small_module()
    resumed.load_state_dict(saved[0])
    again = make_optimizer(resumed, name="muon", learning_rate=0.01, weight_decay=0.1)
    again.load_state_dict(saved[1])
    _train(module, optimizer, 3)
    _train(resumed, again, 3)
    for ours, theirs in zip(resumed.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
