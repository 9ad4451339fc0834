"""The schedules and the decay groups are what they say."""

import copy
import json
import math
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from torch.optim import SGD
from transformers import PreTrainedModel as Backbone
from transformers import get_cosine_with_hard_restarts_schedule_with_warmup

from full_stack_transformer.machine import ISA_VARIABLE
from full_stack_transformer.modelling.backbones import new_backbone
from full_stack_transformer.training.optimization import (
    BatchedMuon,
    Schedule,
    learning_rate_factor,
    make_optimizer,
    make_schedule,
    orthogonalized,
)


def _factor(
    step: int,
    progress: float,
    *,
    name: Schedule = "cosine",
    num_warmup_steps: int = 0,
    num_cycles: int = 1,
    decay_fraction: float = 0.2,
    min_ratio: float = 0.1,
) -> float:
    return learning_rate_factor(
        step,
        progress,
        name=name,
        num_warmup_steps=num_warmup_steps,
        num_cycles=num_cycles,
        decay_fraction=decay_fraction,
        min_ratio=min_ratio,
    )


@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_schedule_rises_to_the_top_and_ends_at_its_floor(name: Schedule) -> None:
    rates = [
        _factor(step, step / 100, name=name, num_warmup_steps=4, num_cycles=2)
        for step in range(101)
    ]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0)
    assert max(rates) <= 1.0
    assert rates[100] == pytest.approx(1.0 if name == "constant" else 0.1)


def test_a_schedule_falls_as_it_says() -> None:
    assert _factor(60, 0.6, name="linear", num_warmup_steps=20) == pytest.approx(0.55)
    assert _factor(60, 0.6, name="cosine", num_warmup_steps=20) == pytest.approx(0.55)
    assert _factor(60, 0.6, name="constant", num_warmup_steps=20) == 1.0
    assert _factor(79, 0.79, name="wsd", num_warmup_steps=20) == 1.0
    assert _factor(90, 0.9, name="wsd", num_warmup_steps=20) == pytest.approx(0.55)
    assert _factor(99, 0.99, name="wsd", decay_fraction=0.0) == 1.0


def test_cycles_restart_at_the_top() -> None:
    rates = [_factor(step, step / 300, num_cycles=3) for step in range(300)]
    assert [step for step, rate in enumerate(rates) if rate == 1.0] == [0, 100, 200]
    for cycle in range(3):
        falling = rates[cycle * 100 : cycle * 100 + 100]
        assert falling == sorted(falling, reverse=True)
        assert falling[99] < 0.11


@pytest.mark.parametrize("num_cycles", [1, 3])
def test_the_decay_is_that_of_transformers(num_cycles: int) -> None:
    """Which takes the last step of the rise for the first after it, and has no floor."""
    theirs = get_cosine_with_hard_restarts_schedule_with_warmup(
        SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 7, 50, num_cycles
    ).lr_lambdas[0]
    for step in range(7, 51):
        ours = _factor(step, step / 50, num_warmup_steps=7, num_cycles=num_cycles, min_ratio=0.0)
        assert ours == pytest.approx(theirs(step), abs=1e-12)


def test_minutes_decide_like_steps() -> None:
    """Only what is over of the training counts, not whether steps or minutes say so."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make_schedule(
        optimizer,
        lambda step: min(1.0, step * 0.25),
        name="linear",
        num_warmup_steps=1,
        num_cycles=1,
        decay_fraction=0.2,
        min_ratio=0.0,
    )
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([2.0, 2.0, 4 / 3, 2 / 3, 0.0])


def _backbone(name: str, *, is_tied: bool, tmp_path: Path) -> Backbone:
    """The smallest model of an architecture."""
    sizes = {
        "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2},
        "llama": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
        | {"intermediate_size": 32},
    }
    config = {"model_type": name, "tie_word_embeddings": is_tied, **sizes[name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = {"begin": 0, "end": 1, "pad": 2}
    path = str(tmp_path / "config.json")
    return new_backbone(path, vocab_size=50, max_length=16, special_token_ids=ids)


def _names(module: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> set[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)] for parameter in parameters}


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_only_matrices_decay(
    optimizer_name: Literal["adamw", "muon"], name: str, is_tied: bool, tmp_path: Path
) -> None:
    backbone = _backbone(name, is_tied=is_tied, tmp_path=tmp_path)
    optimizer = make_optimizer(backbone, name=optimizer_name, learning_rate=1e-3, weight_decay=0.1)
    decayed, kept = (
        [
            parameter
            for group in optimizer.param_groups
            if (group["weight_decay"] > 0) is is_decayed
            for parameter in group["params"]
        ]
        for is_decayed in (True, False)
    )
    assert len(decayed) + len(kept) == len(list(backbone.parameters()))
    assert all(parameter.ndim == 2 for parameter in decayed)
    not_decayed = {"norm", "embed_tokens", "wte", "wpe", "ln_", "bias"}
    for parameter_name in _names(backbone, kept):
        assert any(part in parameter_name for part in not_decayed), parameter_name
    for parameter_name in _names(backbone, decayed):
        assert not any(part in parameter_name for part in not_decayed), parameter_name
    assert ("lm_head.weight" in _names(backbone, decayed)) is not is_tied


def test_muon_leaves_the_head_to_adamw(tmp_path: Path) -> None:
    backbone = _backbone("llama", is_tied=False, tmp_path=tmp_path)
    optimizer = make_optimizer(backbone, name="muon", learning_rate=1e-3, weight_decay=0.1)
    for group in optimizer.param_groups:
        if "betas" not in group:  # Muon's
            assert all(".layers." in name for name in _names(backbone, group["params"]))
        assert ("lm_head.weight" in _names(backbone, group["params"])) <= ("betas" in group)


def test_frozen_parameters_are_left_out() -> None:
    module = _small_module()
    module[1].weight.requires_grad_(False)
    optimizer = make_optimizer(module, name="adamw", learning_rate=1e-3, weight_decay=0.1)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert _names(module, trained) == {"0.weight", "1.bias", "2.weight", "2.bias"}


def test_gradients_that_are_scaled_are_left_to_the_scaler() -> None:
    """A fused optimizer would undo it itself, after the gradients were clipped."""
    module = _small_module()
    for scales_gradients in (False, True):
        optimizer = make_optimizer(
            module,
            name="adamw",
            learning_rate=1e-3,
            weight_decay=0.1,
            scales_gradients=scales_gradients,
        )
        undoes_it = getattr(optimizer, "_step_supports_amp_scaling", False)
        assert undoes_it is not scales_gradients


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
    muon = BatchedMuon([parameters.pop("1.weight")], lr=0.05, weight_decay=0.1)
    rest = list(parameters.values())
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    _train(together, one, 3)
    for _ in range(3):
        apart.zero_grad()
        torch.autograd.backward(apart(torch.tensor([[1, 2, 3]])).square().sum())
        muon.step()
        adamw.step()
    for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)  # of updates of 0.01 to 0.15


@pytest.fixture(params=["avx2", "all"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the instructions for bfloat16 are hidden, where the processor has them."""
    if request.param == "avx2":
        monkeypatch.setenv(ISA_VARIABLE, "avx2")
    else:
        monkeypatch.delenv(ISA_VARIABLE, raising=False)
    return str(request.param)


def test_muon_is_torchs_to_the_rounding_of_bf16(isa: str) -> None:
    """Whatever it multiplies in; of square, wide and tall matrices the last has no gradient."""
    numbers = torch.Generator().manual_seed(0)
    shapes = [(24, 24), (24, 60), (60, 24), (24, 60), (24, 30), (1, 8), (24, 24)]
    ours, theirs = (
        [
            torch.nn.Parameter(torch.randn(shape, generator=numbers.manual_seed(0)))
            for shape in shapes
        ]
        for _ in range(2)
    )
    options = {"lr": 0.1, "weight_decay": 0.5}
    mine, torchs = BatchedMuon(ours, **options), torch.optim.Muon(theirs, **options)  # type: ignore[arg-type]
    for _ in range(3):
        for one, other in zip(ours[:-1], theirs[:-1], strict=True):
            one.grad = torch.randn(one.shape, generator=numbers)
            other.grad = one.grad.clone()
        mine.step()
        torchs.step()  # type: ignore[no-untyped-call]
    for one, other in zip(ours, theirs, strict=True):
        # Three updates of 0.1 times about 1 for the norm; bfloat16 keeps three digits.
        assert (one - other).norm() <= 0.01 * 0.3 * max(one.shape) ** 0.5
    mine_state, torchs_state = mine.state_dict(), torchs.state_dict()
    assert mine_state["param_groups"] == torchs_state["param_groups"]
    assert mine_state["state"].keys() == torchs_state["state"].keys()
    for index, state in torchs_state["state"].items():
        assert torch.equal(mine_state["state"][index]["momentum_buffer"], state["momentum_buffer"])
    mine.load_state_dict(torchs_state)  # as in a checkpoint from before


def test_fp32_orthogonalises_exactly(subtests: pytest.Subtests) -> None:
    """Also matrices of a low rank, whose Gram matrix is almost singular."""
    coefficients = (3.4445, -4.7750, 2.0315)
    numbers = torch.Generator().manual_seed(0)
    for rows, columns in ((48, 48), (48, 128), (16, 256)):
        for rank in (1, rows):
            with subtests.test(rows=rows, columns=columns, rank=rank):
                left = torch.randn(rows, rank, generator=numbers)
                matrix = left @ torch.randn(rank, columns, generator=numbers)
                exact = matrix.double() / matrix.double().norm()
                for _ in range(5):
                    gram = exact @ exact.mT
                    factor = coefficients[1] * gram + coefficients[2] * gram @ gram
                    exact = coefficients[0] * exact + factor @ exact
                found = orthogonalized(matrix[None], coefficients, 5)[0]
                assert (found - exact).norm() < 1e-3 * exact.norm()


def test_a_restored_muon_goes_on_bit_for_bit(isa: str) -> None:
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
