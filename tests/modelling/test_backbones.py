"""Backbones are what their preset says, and broken weights are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from full_stack_transformer import machine
from full_stack_transformer.errors import MachineError, ModelError, UsageError
from full_stack_transformer.modelling.backbones import (
    DECODER_PRESETS,
    context_length,
    new_backbone,
    num_parameters,
)
from full_stack_transformer.modelling.pretrained import load_backbone, pretrained_backbone

IDS = {"begin": 0, "end": 1, "pad": 2}


@pytest.mark.parametrize("name", [*DECODER_PRESETS, "gpt2"])
def test_a_preset_makes_a_model_of_its_vocabulary(name: str) -> None:
    with torch.device("meta"):
        backbone = new_backbone(name, vocab_size=500, max_length=96, special_token_ids=IDS)
    assert backbone.get_input_embeddings().num_embeddings == 500
    assert context_length(backbone.config) == 96
    assert backbone.config.eos_token_id == 1


def test_a_model_without_memory_is_made_where_little_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`fst doctor` counts the operations of large presets on the meta device."""
    monkeypatch.setattr(machine, "free_memory_bytes", lambda device: 1)
    ids = {"begin": 0, "end": 1, "pad": 2}
    with torch.device("meta"):
        assert new_backbone("base", vocab_size=300, max_length=64, special_token_ids=ids)
    with pytest.raises(MachineError, match="memory is short for the weights of tiny"):
        new_backbone("tiny", vocab_size=300, max_length=64, special_token_ids=ids)


def test_embeddings_are_tied_and_counted_once() -> None:
    backbone = new_backbone("tiny", vocab_size=500, max_length=16, special_token_ids=IDS)
    assert backbone.get_input_embeddings().weight is backbone.get_output_embeddings().weight
    assert num_parameters(backbone) == sum(p.numel() for p in set(backbone.parameters()))


def test_a_config_file_gives_the_architecture(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fields = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    path.write_text(json.dumps(fields))
    backbone = new_backbone(str(path), vocab_size=77, max_length=16, special_token_ids=IDS)
    assert backbone.config.model_type == "qwen3"
    assert backbone.config.vocab_size == 77


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="tiny, micro, mini, small, base, gpt2"):
        new_backbone("huge", vocab_size=9, max_length=9, special_token_ids=IDS)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "none"}'])
def test_a_bad_config_file_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        new_backbone(str(path), vocab_size=9, max_length=9, special_token_ids=IDS)


def test_missing_tensors_are_refused(model_dir: Path, tmp_path: Path) -> None:
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 tensors"):
        load_backbone(str(tmp_path), dtype=torch.float32)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pretrained(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A saved GPT-2 of 40 tokens, its head tied to the embeddings or not."""
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}
    (tmp_path / "small.json").write_text(
        json.dumps({**config, "tie_word_embeddings": request.param})
    )
    torch.manual_seed(1)
    backbone = new_backbone(
        str(tmp_path / "small.json"), vocab_size=40, max_length=16, special_token_ids=IDS
    )
    with torch.no_grad():
        backbone.get_input_embeddings().weight.add_(0.5)  # a mean that is not zero
    backbone.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_new_tokens_start_as_the_mean_of_the_old_ones(pretrained: Path) -> None:
    old = load_backbone(str(pretrained), dtype=torch.float32)
    new = pretrained_backbone(str(pretrained), vocab_size=43)
    assert new.config.vocab_size == 43
    is_tied = old.config.tie_word_embeddings
    assert (new.get_output_embeddings().weight is new.get_input_embeddings().weight) is is_tied
    for before, after in (
        (old.get_input_embeddings().weight, new.get_input_embeddings().weight),
        (old.get_output_embeddings().weight, new.get_output_embeddings().weight),
    ):
        assert torch.equal(after[:40], before)
        # As likely as an average token, and hardly different from each other.
        torch.testing.assert_close(
            after[40:], before.mean(dim=0).expand(3, -1), rtol=0, atol=1e-3 * before.std().item()
        )
    ids = torch.tensor([[3, 1, 4]])
    with torch.inference_mode():
        torch.testing.assert_close(new(ids).logits[..., :40], old(ids).logits)


def test_the_seed_decides_new_embeddings(pretrained: Path) -> None:
    drawn = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        backbone = pretrained_backbone(str(pretrained), vocab_size=43)
        drawn.append(backbone.get_input_embeddings().weight[40:])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_no_model_is_named() -> None:
    with pytest.raises(
        ModelError, match=r"/no/such/place should be a model directory.*no such path"
    ):
        load_backbone("/no/such/place", dtype=torch.float32)
