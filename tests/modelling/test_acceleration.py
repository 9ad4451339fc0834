"""An accelerated backbone computes the same, and its compiled code serves training alone."""

import copy
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel as Backbone
from transformers.activations import NewGELUActivation

from full_stack_transformer.modelling.acceleration import (
    LogisticGelu,
    accelerate,
    compile_layers,
    pays_to_compile,
)
from full_stack_transformer.modelling.backbones import new_backbone
from full_stack_transformer.modelling.losses import next_token_loss

CPU = torch.device("cpu")

each_shape = pytest.mark.parametrize("name", ["tiny", "gpt2"])


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def _backbone(name: str, tmp_path: Path) -> Backbone:
    torch.manual_seed(0)
    if name == "gpt2":
        config = tmp_path / "gpt2.json"
        config.write_text('{"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}')
        name = str(config)
    special = {"begin": 0, "end": 1, "pad": 2}
    backbone = new_backbone(name, vocab_size=97, max_length=64, special_token_ids=special)
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return backbone.train()


def _input_ids(num_tokens: int = 24, num_samples: int = 3) -> Tensor:
    torch.manual_seed(num_tokens)
    return torch.randint(0, 97, (num_samples, num_tokens))


def _step(backbone: Backbone, input_ids: Tensor, **options: Tensor) -> tuple[float, Tensor]:
    """Loss, and the gradient of all weights."""
    backbone.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logits = backbone(input_ids=input_ids, use_cache=False, **options).logits
        loss, num_targets = next_token_loss(logits, input_ids)
    (loss / num_targets).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten() for p in backbone.parameters() if p.grad is not None]
    return float(loss.detach() / num_targets), torch.cat(gradients)


class _Counter:
    """A backend of torch.compile that counts the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.num_graphs += 1
        return graph.forward


@pytest.mark.parametrize("is_compiling", [False, True], ids=["kernel", "written out"])
def test_the_logistic_gelu_is_gelu_new(is_compiling: bool) -> None:
    inputs = torch.linspace(-12, 12, 4001, requires_grad=True)
    expected = NewGELUActivation()(inputs)
    with mock.patch.object(torch.compiler, "is_compiling", return_value=is_compiling):
        found = LogisticGelu()(inputs)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    slope, expected_slope = (
        torch.autograd.grad(values.sum(), inputs)[0] for values in (found, expected)
    )
    assert torch.allclose(slope, expected_slope, rtol=0, atol=5e-6)


@each_shape
def test_loss_and_gradient_stay_the_same(name: str, tmp_path: Path) -> None:
    backbone = _backbone(name, tmp_path)
    names = list(backbone.state_dict())
    loss, gradient = _step(backbone, _input_ids())
    accelerate(backbone)
    compile_layers(backbone, backend="aot_eager")
    found_loss, found = _step(backbone, _input_ids())
    assert found_loss == pytest.approx(loss, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(found, gradient, dim=0) > 0.9995
    assert list(backbone.state_dict()) == names


@each_shape
def test_all_layers_share_one_graph_and_all_lengths_another(name: str, tmp_path: Path) -> None:
    backbone, counter = _backbone(name, tmp_path), _Counter()
    accelerate(backbone)
    compile_layers(backbone, backend=counter)
    _step(backbone, _input_ids())
    assert counter.num_graphs == 1
    for num_tokens in (25, 9, 40, 24, 33):
        _step(backbone, _input_ids(num_tokens))
    assert counter.num_graphs == 2


@each_shape
def test_validation_and_generation_run_uncompiled(name: str, tmp_path: Path) -> None:
    backbone, counter = _backbone(name, tmp_path), _Counter()
    accelerate(backbone)
    compile_layers(backbone, backend=counter)
    with torch.no_grad():
        backbone(input_ids=_input_ids(), use_cache=False)
    backbone.eval()
    backbone.generate(_input_ids(), max_new_tokens=5, do_sample=False, pad_token_id=2)
    assert counter.num_graphs == 0


@each_shape
def test_packed_rows_and_recomputed_activations_are_compiled_too(name: str, tmp_path: Path) -> None:
    backbone, counter = _backbone(name, tmp_path), _Counter()
    accelerate(backbone)
    positions = {"position_ids": (torch.arange(24) % 7).expand(3, -1)}
    loss, gradient = _step(backbone, _input_ids(), **positions)
    backbone.activation_checkpointing_enable({"use_reentrant": False})
    compile_layers(backbone, backend=counter)
    found_loss, found = _step(backbone, _input_ids(), **positions)
    assert counter.num_graphs == 1
    assert found_loss == pytest.approx(loss, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(found, gradient, dim=0) > 0.9995


def test_a_compiler_that_fails_is_named_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Callable[..., Any]:
        raise RuntimeError("no such program: g++")

    backbone = _backbone("tiny", tmp_path)
    accelerate(backbone)
    loss, gradient = _step(backbone, _input_ids())
    compile_layers(backbone, backend=fail)
    with caplog.at_level(logging.WARNING):
        found_loss, found = _step(backbone, _input_ids())
        _step(backbone, _input_ids(9))
    assert found_loss == loss
    assert torch.equal(found, gradient)
    (record,) = caplog.records
    assert "compiling failed" in record.message
    assert "no such program: g++" in record.message


def test_a_compiler_that_is_missed_at_the_first_call_counts_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton's, which makes the code of a GPU."""

    def compile_later(*_: Any) -> Callable[..., Any]:
        def call(*_: Any) -> Any:
            raise RuntimeError("Failed to find C compiler. Please specify via CC")

        return call

    backbone = _backbone("tiny", tmp_path)
    accelerate(backbone)
    loss, _ = _step(backbone, _input_ids())
    compile_layers(backbone, backend=compile_later)
    with caplog.at_level(logging.WARNING):
        assert _step(backbone, _input_ids())[0] == loss
    assert "Failed to find C compiler" in caplog.text


def test_an_error_of_the_model_itself_is_not_taken_for_one_of_the_compiler(
    tmp_path: Path,
) -> None:
    backbone = _backbone("gpt2", tmp_path)
    compile_layers(backbone, backend=_Counter())
    with pytest.raises(IndexError):
        _step(backbone, torch.full((1, 4), 1000))


@each_shape
def test_a_saved_directory_is_that_of_the_plain_model(name: str, tmp_path: Path) -> None:
    backbone = _backbone(name, tmp_path)
    backbone.save_pretrained(tmp_path / "plain")
    accelerate(backbone)
    compile_layers(backbone, backend=_Counter())
    _step(backbone, _input_ids())
    copy.deepcopy(backbone).save_pretrained(tmp_path / "accelerated")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "accelerated" / file.name).read_bytes() == file.read_bytes(), file.name
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "accelerated").eval()
    with torch.no_grad():
        expected = backbone.eval()(input_ids=_input_ids()).logits
        assert torch.allclose(opened(input_ids=_input_ids()).logits, expected, atol=1e-5)


def test_only_a_long_training_pays_for_compiling() -> None:
    assert pays_to_compile(CPU, flops=math.inf, minutes=None)
    assert pays_to_compile(CPU, flops=1e15, minutes=60)
    assert not pays_to_compile(CPU, flops=1e15, minutes=5)
    assert not pays_to_compile(CPU, flops=1e13, minutes=None)
    assert not pays_to_compile(torch.device("mps"), flops=math.inf, minutes=None)


_STEPS = """
import sys
from pathlib import Path
import torch
from tests.modelling import test_acceleration as here

torch.set_num_threads(2)
backbone = here._backbone(sys.argv[1], Path(sys.argv[2]))
here.accelerate(backbone)
if sys.argv[3] == "compiled":
    here.compile_layers(backbone)
for num_tokens in (40, 24, 64):
    loss, gradient = here._step(backbone, here._input_ids(num_tokens))
    print(loss, float(gradient.double().norm()), float(gradient.double().sum()))
"""


@pytest.mark.slow
@each_shape
def test_compiled_code_is_right_and_the_same_in_each_process(name: str, tmp_path: Path) -> None:
    outputs = []
    for mode in ("plain", "compiled", "compiled"):
        command = [sys.executable, "-c", _STEPS, name, str(tmp_path), mode]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        assert "failed" not in done.stderr
        outputs.append(
            [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
        )
    plain, compiled, again = outputs
    assert compiled == again
    for found, expected in zip(compiled, plain, strict=True):
        assert found[:2] == pytest.approx(expected[:2], rel=5e-3)
