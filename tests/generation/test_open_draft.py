"""A draft model is opened beside its model, or refused with a sentence that says why."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from full_stack_transformer.errors import MachineError, ModelError
from full_stack_transformer.generation import open_engine as opening
from full_stack_transformer.generation.open_draft import DraftSource, OpenedDraft, open_draft
from full_stack_transformer.generation.open_engine import open_engine
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.modelling.backbones import new_backbone
from full_stack_transformer.modelling.model_directory import OpenedModel, open_model
from tests.conftest import RunFst
from tests.generation.small_models import make_runner, small_backbone


@pytest.fixture(scope="module")
def model(model_dir: Path) -> OpenedModel:
    return open_model(model_dir, device="cpu")


@pytest.fixture(scope="module")
def other_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the same tokenizer, and more layers."""
    directory = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(model_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    torch.manual_seed(3)
    backbone = AutoModelForCausalLM.from_config(
        type(AutoModelForCausalLM.from_pretrained(model_dir).config)(
            **config | {"num_hidden_layers": 3}
        )
    )
    backbone.save_pretrained(directory)
    return directory


def test_texts_are_the_same_with_any_draft(model_dir: Path, other_dir: Path) -> None:
    def texts(draft: DraftSource | None) -> list[str]:
        generator = TextGenerator.open(
            model_dir, device="cpu", weights_dtype="float32", draft=draft
        )
        return [generator.generate("The", seed=seed, max_new_tokens=60)[0] for seed in range(3)]

    make_runner("float32")  # skips without a decoder
    expected = texts(None)
    for path in (model_dir, other_dir):
        assert texts(DraftSource(path)) == expected


def test_of_the_model_itself_the_weights_are_read_once(
    model: OpenedModel, model_dir: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(model_dir)
    assert open_draft(DraftSource(link), model, model_dir, device="cpu").model is model


def test_a_draft_that_is_larger_is_warned_of(
    model: OpenedModel, model_dir: Path, other_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_draft(DraftSource(other_dir), model, model_dir, device="cpu")
    [warning] = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert "should be much smaller" in warning


def test_a_draft_of_another_vocabulary_is_refused(
    model: OpenedModel, model_dir: Path, tmp_path: Path
) -> None:
    """Also one with as many tokens, of which two have changed places."""
    directory = tmp_path / "swapped"
    shutil.copytree(model_dir, directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="another vocabulary than the model: 2 of its") as caught:
        open_draft(DraftSource(directory), model, model_dir, device="cpu")
    assert f"'a' is id {vocabulary['a']} there and id {vocabulary['b']} in the" in str(caught.value)


def test_a_draft_that_cannot_continue_texts_is_refused(
    run_fst: RunFst, model_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "classes"
    shutil.copytree(model_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (directory / "config.json").write_text(json.dumps(config))
    for path, message in (
        (directory, "cannot continue texts"),
        (tmp_path / "nowhere", "should be a model directory"),
    ):
        done = run_fst("generate", model_dir, "--prompt", "The", "--draft_model", path)
        assert done.returncode and message in done.stderr and str(path) in done.stderr
        assert "Traceback" not in done.stderr


def test_a_draft_takes_its_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    make_runner("float32")
    backbone = small_backbone("llama")
    draft = OpenedDraft(OpenedModel("same", backbone, None, {}), "float32")  # type: ignore[arg-type]
    block_bytes = opening.BLOCK_SIZE * opening.kv_token_bytes(backbone.config, "float32")
    for num_blocks, num_left in ((100, 84), (32, 24)):
        engine = open_engine(
            backbone,
            num_slots=32,
            weights_dtype="float32",
            kv_memory=num_blocks * block_bytes,
            draft=draft,
        )
        assert engine.block_use.num_blocks == num_left
    with pytest.raises(MachineError, match="the draft model same cannot be used: a text of"):
        open_engine(
            backbone, num_slots=1, weights_dtype="float32", kv_memory=8 * block_bytes, draft=draft
        )


def test_through_pytorch_there_are_guesses_only_where_a_draft_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "why_not_native", lambda backbone: "no compiler")
    backbone = small_backbone("llama")
    assert open_engine(backbone, num_slots=1, weights_dtype="float32").guesses is None
    draft = OpenedDraft(OpenedModel("same", backbone, None, {}), "auto")  # type: ignore[arg-type]
    engine = open_engine(backbone, num_slots=1, weights_dtype="float32", draft=draft)
    assert engine.guesses is not None and engine.guesses.draft is not None
    assert "through PyTorch guesses change the last bits" in caplog.text


def test_a_broken_draft_is_named() -> None:
    make_runner("float32")
    broken = new_backbone(
        "tiny", vocab_size=300, max_length=128, special_token_ids={"begin": 0, "end": 1, "pad": 2}
    ).eval()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    draft = OpenedDraft(OpenedModel("small", broken, None, {}), "auto")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="the draft model small cannot be used: the model has"):
        open_engine(small_backbone("llama"), num_slots=1, draft=draft)
