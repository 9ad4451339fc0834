"""A model directory is plain Hugging Face format and opens to equal logits."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from full_stack_transformer.errors import ModelError
from full_stack_transformer.modelling.model_directory import open_model, resolve_device
from full_stack_transformer.modelling.model_files import find_model_directory


def test_plain_transformers_opens_it_to_equal_logits(model_dir: Path) -> None:
    ours = open_model(model_dir, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    inputs = tokenizer("The reader learns from", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == ours.tokenizer.encode_prompt("The reader learns from")
    with torch.inference_mode():
        assert torch.equal(
            theirs(inputs["input_ids"]).logits, ours.backbone(inputs["input_ids"]).logits
        )
    assert Tokenizer.from_file(str(model_dir / "tokenizer.json")).get_vocab_size() == 300


def test_generation_stops_at_the_end_of_a_document(model_dir: Path) -> None:
    config = transformers.GenerationConfig.from_pretrained(model_dir)
    assert config.eos_token_id == open_model(model_dir, device="cpu").tokenizer.end_id


def test_a_model_is_named_by_its_experiment(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "books" / "3" / "model")
    assert open_model(tmp_path / "books" / "3", device="cpu").name == "books/3"
    assert open_model(model_dir, device="cpu").name == "tiny-model"


def test_what_is_no_model_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found an empty directory"):
        find_model_directory(tmp_path)
    (tmp_path / "x").write_text("")
    with pytest.raises(ModelError, match=r"without config\.json"):
        find_model_directory(tmp_path)
    with pytest.raises(ModelError, match="found no such path"):
        find_model_directory(tmp_path / "none")
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ModelError, match=r"found no such file; there are last\.ckpt"):
        find_model_directory(tmp_path / "previous.ckpt")


def test_a_foreign_tokenizer_is_refused(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.add_tokens(["one more", "and another"])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    with pytest.raises(ModelError, match="302 tokens, the model 300 embeddings"):
        open_model(tmp_path / "model", device="cpu")


def test_a_device_that_is_not_here_is_named() -> None:
    with pytest.raises(ModelError, match="--device nonsense"):
        resolve_device("nonsense")
    assert resolve_device("cpu") == torch.device("cpu")
