"""Adapters beside a base: read, refused, computed together, loaded and removed."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from full_stack_transformer.errors import MachineError, ModelError, RequestError
from full_stack_transformer.generation import engine as engine_module
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.runners.torch import Runner, SequenceWork, TorchRunner
from full_stack_transformer.modelling.adapter_weights import (
    AdapterWeights,
    _ends_with,
    read_adapter,
)
from tests.generation.small_adapters import ATTENTION, merged, random_adapter, write_adapter
from tests.generation.small_models import (
    GREEDY,
    SAMPLED,
    RememberingRunner,
    make_runner,
    random_prompts,
    run_requests,
    small_backbone,
    token_request,
)

NO_ADAPTER = AdapterWeights(Path("none"), {})


def logits_of(runner: Runner, ids: list[int], adapter: int = 0) -> torch.Tensor:
    """Of each token of a text."""
    return runner.run([SequenceWork(range(8), 0, ids, num_logits=len(ids), adapter=adapter)])


# ------------------------------------------------------------------ what is read


def test_patterns_name_the_layers_that_peft_means() -> None:
    """PEFT matches names by regular expressions; here without what could take hours."""
    numbers, parts = random.Random(0), ("layers", "0", ".*", ".", "\\.", "q_proj", "a", "b", "proj")
    names = ("model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "lm_head", "ab.ab.b")
    num_right = 0
    for _ in range(3000):
        pattern = "".join(numbers.choices(parts, k=numbers.randint(1, 5)))
        for name in names:
            expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
            assert _ends_with(name, pattern) == expected, (name, pattern)
            num_right += expected
    assert num_right > 300


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_an_adapter_computes_what_the_merged_model_does(tmp_path: Path, shape: str) -> None:
    """Ranks and scales of their own, rsLoRA, the head: as PEFT has it."""
    backbone = small_backbone(shape)
    first = "q_proj" if shape == "llama" else "c_attn"
    kinds: list[dict[str, Any]] = [
        {"rank": 8, "ranks": {first: 3}, "alpha_pattern": {f"0.*{first}": 7}},
        {"rank": 5, "use_rslora": True, "endings": [first]},
        {"rank": 2, "endings": [first, "lm_head"]},
    ]
    runner, ids = TorchRunner(backbone, num_blocks=8, block_size=16), [5, 9, 200, 31, 7]
    before = logits_of(runner, ids)
    for number, kind in enumerate(kinds, 1):
        adapter = random_adapter(tmp_path / str(number), backbone, seed=number, **kind)
        runner.add_adapter(number, adapter)
        with torch.inference_mode():
            expected = merged(tmp_path / str(number), backbone)(torch.tensor([ids])).logits[0]
        found = logits_of(runner, ids, number)
        assert (found - before).abs().max() > 0.1 * before.std()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(runner, ids), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA (use_dora); merge the two instead: fst merge"),
        ({"modules_to_save": ["lm_head"]}, "whole layers"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "it is no LoRA, but IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "its training changed the base"),
        ({"alora_invocation_tokens": [1]}, "words that switch it on"),
        ({"rank_pattern": {"(": 1}}, "no number"),
        ({"alpha_pattern": {"(m+)+x": 1}}, "another pattern than letters"),
        ({"r": "many"}, "no number"),
        ({"r": 5}, "have sizes [4, 64] and [64, 4], not [5, 64] and [64, 5]"),
        ({"rank": 300}, "its rank is 300"),
        ({"others": {"base_model.model.model.norm.weight": torch.ones(64)}}, "more than matrices"),
        (
            {
                "others": {
                    "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 300)
                }
            },
            "it changes embeddings",
        ),
        (
            {"others": {"base_model.model.model.other.lora_A.weight": torch.ones(4, 64)}},
            "whose other half is there",
        ),
    ],
)
def test_what_cannot_stand_beside_a_base_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    """In one sentence."""
    backbone = small_backbone("llama")
    directory = write_adapter(tmp_path, backbone, **{"endings": ATTENTION, **change})
    with pytest.raises(ModelError) as caught:
        read_adapter(directory, backbone)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_an_adapter_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """None, of another model, pickled, cut off, NaN."""
    backbone = small_backbone("llama")
    with pytest.raises(ModelError, match="is no adapter"):
        read_adapter(tmp_path, backbone)
    directory = write_adapter(tmp_path / "one", backbone)
    with pytest.raises(ModelError, match=r"the base has no layer model\.layers\.0\.mlp\.down_proj"):
        read_adapter(directory, small_backbone("gpt2"))
    path = directory / "adapter_model.safetensors"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        read_adapter(directory, backbone)
    path.write_bytes(content[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        read_adapter(directory, backbone)
    path.write_bytes(content)
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ModelError, match="NaN or infinite"):
        read_adapter(directory, backbone)
    (directory / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(ModelError, match="is no adapter"):
        read_adapter(directory, backbone)


# ------------------------------------------------------------------ the engine

Make = Callable[[], Runner]


def test_requests_of_many_adapters_are_as_alone() -> None:
    """Whatever is shared, put back and read in chunks: cached beginnings belong to their adapter."""
    numbers = random.Random(4)
    prompts = random_prompts(6, vocab_size=40, max_tokens=40)
    requests = [
        token_request(numbers.choice(prompts), numbers.randint(1, 20), SAMPLED, seed % 3)
        for seed in range(40)
    ]

    def with_adapters(engine: Engine) -> list[Any]:
        ids = [0, *(engine.add_adapter(NO_ADAPTER) for _ in range(3))]
        return [
            type(one)(**{**vars(one), "adapter": ids[place % 4]})
            for place, one in enumerate(requests)
        ]

    together = Engine(RememberingRunner(), num_slots=8, max_chunk_tokens=9)
    found = run_requests(together, with_adapters(together))
    assert together.block_use.num_reused_tokens > 0
    alone = Engine(RememberingRunner(), num_slots=1)
    assert found == run_requests(alone, with_adapters(alone))
    assert len({tuple(one) for one in found}) > len({tuple(one.prompt_ids) for one in requests})


def test_an_adapter_is_removed_when_its_requests_have_ended() -> None:
    """New ones are refused at once; what was read with it is forgotten, what others have read is not."""
    runner = RememberingRunner()
    engine = Engine(runner, num_slots=4)
    first, second = engine.add_adapter(NO_ADAPTER), engine.add_adapter(NO_ADAPTER)
    assert (first, second) == (1, 2)
    prompt = list(range(3, 36))
    for adapter in (0, first, second):
        engine.add(token_request(prompt, 5, GREEDY, 0, adapter=adapter))
    engine.step()
    engine.remove_adapter(first)
    assert runner.adapters == {0, 1, 2}
    with pytest.raises(RequestError, match="no adapter 1, or it has been removed"):
        engine.add(token_request(prompt, 5, GREEDY, 0, adapter=first))
    with pytest.raises(RequestError, match="no adapter 1"):
        engine.remove_adapter(first)
    while engine.num_running:
        engine.step()
    assert runner.adapters == {0, 2}
    assert engine.block_use.num_kept == 4
    engine.remove_adapter(second)
    assert runner.adapters == {0} and engine.block_use.num_kept == 2
    assert engine.add_adapter(NO_ADAPTER) == 3


def test_there_may_be_so_many_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more."""
    monkeypatch.setattr(engine_module, "MAX_ADAPTERS", 2)
    engine = Engine(RememberingRunner(), num_slots=1)
    engine.add_adapter(NO_ADAPTER)
    number = engine.add_adapter(NO_ADAPTER)
    with pytest.raises(ModelError, match="2 adapters are loaded"):
        engine.add_adapter(NO_ADAPTER)
    engine.remove_adapter(number)
    engine.add_adapter(NO_ADAPTER)


def test_an_adapter_that_memory_has_no_room_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is taken."""
    adapter = random_adapter(tmp_path / "one", small_backbone("llama"))
    engine = Engine(make_runner("torch"), num_slots=1)
    monkeypatch.setattr("full_stack_transformer.machine.free_memory_bytes", lambda device: 1000)
    with pytest.raises(MachineError, match="memory is short for the adapter"):
        engine.add_adapter(adapter)
    with pytest.raises(MachineError, match="memory is short for the adapter"):
        read_adapter(tmp_path / "one", small_backbone("llama"))
