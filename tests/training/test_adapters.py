"""A training of an adapter: what it writes, that its base stays as it is, and what a kill leaves."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from full_stack_transformer.arguments.fine_tuning import AdapterOptions
from full_stack_transformer.arguments.models import MergeArguments
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.errors import ModelError, TrainingError, UsageError
from full_stack_transformer.generation.runners.native.shape import why_not_family
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.modelling.adapters import add_adapter
from full_stack_transformer.modelling.merging import main as merge
from tests.training.test_resume import _assert_equal
from tests.training.training_here import TrainingHere, checkpoint_of

# PEFT asks transformers by a name that will go, and advises on embeddings that the output layer shares.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

_IDS = torch.arange(3, 40)[None]
_KINDS: dict[str, dict[str, Any]] = {
    "lora": {"num_generated_samples": 1},
    "dora, with dropout": {"lora_kind": "dora", "lora_dropout": 0.1},
    "rslora, of two layers, by muon": {
        "lora_kind": "rslora",
        "lora_targets": "q_proj, v_proj",
        "optimizer": "muon",
    },
    "with the embeddings": {"lora_embeddings": True, "optimizer": "muon"},
}


def _digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def _trained(training: TrainingHere, model_dir: Path, **options: Any) -> Path:
    few: dict[str, Any] = {"max_steps": 4, "lora_rank": 4, "learning_rate": 0.02}
    return training.to_the_end(**few | options, model_path=str(model_dir))


@pytest.mark.parametrize("kind", _KINDS)
def test_an_adapter_opens_in_peft_and_merges_into_the_same_model(
    kind: str, dataset_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    before = _digest(model_dir)
    experiment = _trained(TrainingHere(dataset_dir, tmp_path), model_dir, **_KINDS[kind])
    adapter = experiment / "adapter"
    assert not (experiment / "model").exists()
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        path.name for path in adapter.iterdir()
    }
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    card = (adapter / "README.md").read_text()
    assert f"library_name: peft\nbase_model: {model_dir.name}\n" in card
    assert "fst merge" in card
    names = list(load_file(adapter / "adapter_model.safetensors"))
    assert all(name.startswith("base_model.model.") and "lora_" in name for name in names)
    opened = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    base = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    merged = AutoModelForCausalLM.from_pretrained(merge(MergeArguments(experiment))).eval()
    with torch.inference_mode():
        expected = opened(_IDS).logits
        torch.testing.assert_close(merged(_IDS).logits, expected, atol=1e-5, rtol=1e-5)
        assert (base(_IDS).logits - expected).abs().max() > 0.01
    assert _digest(model_dir) == before
    if "num_generated_samples" in _KINDS[kind]:
        lines = (experiment / "generated.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["text"]
    assert TextGenerator.open(experiment).generate("The", max_new_tokens=3, seed=0)


def test_a_crash_leaves_no_trace_in_an_adapter(
    dataset_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    training = TrainingHere(dataset_dir, tmp_path)
    options: dict[str, Any] = {
        "max_steps": 6,
        "lora_rank": 2,
        "lora_dropout": 0.2,
        "model_path": str(model_dir),
        "val_check_interval": 3.0,
        "checkpoint_every_n_minutes": 0.0,
        "ema_decay": 0.5,
    }
    whole = training.to_the_end(**options, experiment_name="whole")
    training.crash(in_batch=2, **options, experiment_name="crashed")
    training.crash(in_validation=3, **options, resume="last", experiment_name="crashed")
    crashed = training.to_the_end(**options, resume="last", experiment_name="crashed")
    _assert_equal(checkpoint_of(whole), checkpoint_of(crashed))
    weights = "adapter/adapter_model.safetensors"
    assert (whole / weights).read_bytes() == (crashed / weights).read_bytes()
    assert all("lora_" in name for name in checkpoint_of(whole)["state_dict"])


def test_another_base_is_refused_when_a_training_is_resumed(
    dataset_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    for directory in (base, tmp_path / "other"):
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(model_dir).save_pretrained(directory)
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1e-3)
    training = TrainingHere(dataset_dir, tmp_path)
    options: dict[str, Any] = {"max_steps": 3, "lora_rank": 2, "model_path": str(base)}
    training.crash(in_batch=2, **options, checkpoint_every_n_minutes=0.0)
    (tmp_path / "other" / "model.safetensors").replace(base / "model.safetensors")
    with pytest.raises(TrainingError, match="other weights than when this training started"):
        training.to_the_end(resume="last", max_steps=3)


def test_adapters_of_other_programs_are_merged_too(model_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(1)
    wrapped = get_peft_model(base, LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "theirs")
    expected = wrapped.eval()(_IDS).logits
    target = merge(MergeArguments(tmp_path / "theirs"))
    assert target == tmp_path / "theirs-merged"
    merged = AutoModelForCausalLM.from_pretrained(target).eval()
    torch.testing.assert_close(merged(_IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(target)("a")["input_ids"]
    assert isinstance(wrapped, PeftModel)


def test_the_decoder_does_not_leave_an_adapter_out(model_dir: Path) -> None:
    """The weights of a layer with an adapter are those of the base."""
    backbone = AutoModelForCausalLM.from_pretrained(model_dir)
    assert why_not_family(backbone) is None
    add_adapter(backbone, AdapterOptions(lora_rank=2), base=str(model_dir))
    assert why_not_family(backbone) == "it has an adapter that is not merged into its weights"


def test_what_cannot_be_an_adapter_is_one_sentence(
    dataset_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--lora_rank adapts a pretrained model: name it with"):
        TrainArguments(dataset_dir=dataset_dir, lora_rank=4)
    with pytest.raises(
        UsageError, match=r"--lora_targets query: .* are down_proj, gate_proj, k_proj"
    ):
        _trained(TrainingHere(dataset_dir, tmp_path), model_dir, lora_targets="query")
    with pytest.raises(UsageError, match="omit --resize_embeddings"):
        _trained(TrainingHere(dataset_dir, tmp_path), model_dir, resize_embeddings="new")
    with pytest.raises(ModelError, match=r"should be an adapter directory .* or an experiment"):
        merge(MergeArguments(model_dir))
    (tmp_path / "empty").mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": str(model_dir)}
    (tmp_path / "empty" / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"empty has adapter_config.json, but no adapter_model"):
        merge(MergeArguments(tmp_path / "empty"))
