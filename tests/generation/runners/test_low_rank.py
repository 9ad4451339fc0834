"""Adapters in the C++ decoder: the numbers of merged weights, and the bits of each request alone."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import MachineError, ModelError, RequestError
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.runners.native.decoder import NativeRunner, WeightsDtype
from full_stack_transformer.generation.runners.torch import SequenceWork, TorchRunner
from full_stack_transformer.modelling.adapter_weights import AdapterWeights, LowRank
from tests.generation.runners.test_families import CONFIGS
from tests.generation.small_adapters import (
    adapter_weights,
    linear_names,
    merged,
    random_adapter,
)
from tests.generation.small_models import (
    SAMPLED,
    make_runner,
    random_prompts,
    run_requests,
    small_backbone,
    token_request,
    varied_backbone,
)

TEXT = [(5 * place) % 60 + 3 for place in range(45)]

pytestmark = pytest.mark.usefixtures("decoder")


@cache
def _backbone(name: str) -> Backbone:
    return varied_backbone(CONFIGS[name]()) if name in CONFIGS else small_backbone(name)


def _logits(runner: NativeRunner | TorchRunner, adapter: int) -> Tensor:
    return runner.run([SequenceWork(range(5), 0, TEXT, len(TEXT), adapter)])


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", [*CONFIGS, "gpt2", "llama"])
def test_adapters_compute_what_they_do_through_pytorch(name: str) -> None:
    """Joined layers, heads in turn, the other way round: of all linear layers, some, and the head."""
    backbone = _backbone(name)
    names = linear_names(backbone)
    of_layers = adapter_weights(backbone, rank=6, seed=1)
    head = next(
        one for one, part in backbone.named_modules() if part is backbone.get_output_embeddings()
    )
    some = adapter_weights(
        backbone, rank=17, seed=2, endings={names[-1].rpartition(".")[2], head, "v_proj"}
    )
    mixed = AdapterWeights(
        Path("mixed"),
        {
            one: (of_layers if place % 3 else some).layers.get(one, of_layers.layers[one])
            for place, one in enumerate(names)
            if place % 4
        },
    )
    native = NativeRunner(
        backbone, num_blocks=5, block_size=16, weights_dtype="float32", kv_dtype="float32"
    )
    plain = TorchRunner(backbone, num_blocks=5, block_size=16)
    before = _logits(native, 0)
    for number, adapter in enumerate((of_layers, some, mixed), 1):
        for runner in (native, plain):
            runner.add_adapter(number, adapter)
        expected = _logits(plain, number)
        assert _distance(before, expected) > 0.05
        assert _distance(_logits(native, number), expected) < 2e-4
    assert torch.equal(_logits(native, 0), before)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 5e-4), ("bfloat16", 0.05), ("int8", 0.06), ("int4", 0.5)],
)
def test_adapters_beside_weights_of_all_types_are_near_the_merged_model(
    tmp_path: Path, dtype: WeightsDtype, tolerance: float
) -> None:
    """About as near as the base is to its own weights, with an adapter as large as these."""
    backbone = small_backbone("llama")
    adapter = random_adapter(tmp_path / "one", backbone, rank=8)
    runner = make_runner(dtype)
    runner.add_adapter(1, adapter)
    with torch.inference_mode():
        expected = merged(tmp_path / "one", backbone)(torch.tensor([TEXT])).logits[0]
        base = backbone(torch.tensor([TEXT])).logits[0]
    assert isinstance(runner, NativeRunner)
    assert _distance(_logits(runner, 0), base) < tolerance
    assert _distance(_logits(runner, 1), expected) < tolerance


def test_a_large_number_of_one_rank_leaves_the_others_as_they_are() -> None:
    """Each rank has its own scale, so the order of sizes among ranks does not matter."""
    backbone = small_backbone("llama")
    name = linear_names(backbone)[0]
    matrices = adapter_weights(backbone, rank=4, seed=1).layers[name]
    factors = torch.tensor([1e-12, 1e12, 1.0, 0.0])
    scaled = LowRank(matrices.down * factors[:, None], matrices.up / factors.clamp(min=1e-12))
    runners = make_runner("float32"), TorchRunner(backbone, num_blocks=5, block_size=16)
    for runner in runners:
        runner.add_adapter(1, AdapterWeights(Path("scaled"), {name: scaled}))
    native, plain = (runner.run([SequenceWork(range(5), 0, TEXT, 9, 1)]) for runner in runners)
    assert _distance(native, plain) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_requests_of_many_adapters_are_as_alone(dtype: WeightsDtype) -> None:
    """Through the engine: in company, with adapters that come and go, and base requests as without any."""
    backbone = small_backbone("llama")
    weights = [adapter_weights(backbone, rank=rank, seed=rank) for rank in (1, 4, 9, 16)]
    requests = [
        token_request(prompt, 6, SAMPLED, seed) for seed, prompt in enumerate(random_prompts(20))
    ]

    def answers(adapter: AdapterWeights | None) -> list[list[int]]:
        alone = Engine(make_runner(dtype), num_slots=1)
        number = 0 if adapter is None else alone.add_adapter(adapter)
        return run_requests(
            alone, [type(one)(**{**vars(one), "adapter": number}) for one in requests[:10]]
        )

    expected = [answers(one) for one in (None, *weights)]
    assert len({str(one) for one in expected}) == 5
    engine = Engine(make_runner(dtype, num_blocks=60), num_slots=20, max_chunk_tokens=50)
    numbers = [0, *map(engine.add_adapter, weights)]
    for _ in range(2):
        asked = {
            engine.add(type(one)(**{**vars(one), "adapter": numbers[place % 5]})): place
            for place, one in enumerate(requests[:10] * 2)
        }
        found: dict[int, list[int]] = {place: [] for place in range(20)}
        gone = numbers[3]
        while engine.num_running:
            for event in engine.step():
                if event.token_id is not None:
                    found[asked[event.request_id]].append(event.token_id)
            if gone == numbers[3]:  # in the middle
                engine.remove_adapter(gone)
                numbers[3] = engine.add_adapter(weights[2])
        for place, ids in found.items():
            assert ids == expected[place % 5][place % 10]
    with pytest.raises(RequestError, match=f"no adapter {gone}"):
        engine.add(type(requests[0])(**{**vars(requests[0]), "adapter": gone}))


def test_what_the_decoder_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, and layers that it does not have; it goes on as before."""
    backbone = small_backbone("llama")
    adapter = adapter_weights(backbone, rank=4, seed=1)
    engine = Engine(make_runner("int8"), num_slots=1)
    other = AdapterWeights(
        Path("other"), {**adapter.layers, "other": next(iter(adapter.layers.values()))}
    )
    with pytest.raises(ModelError, match="the C\\+\\+ decoder has no layer other"):
        engine.add_adapter(other)
    with monkeypatch.context() as patched:
        patched.setattr("full_stack_transformer.machine.free_memory_bytes", lambda device: 1000)
        with pytest.raises(MachineError, match="memory is short for the adapter adapter"):
            engine.add_adapter(adapter)
    assert engine.add_adapter(adapter) == 1
