"""A base and a tuned model in one table, also where their tokenizers differ."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.datasets.corpus import open_dataset
from full_stack_transformer.errors import DatasetError, UsageError
from full_stack_transformer.evaluation.run import main, measured
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer
from tests.training.small_conversations import write_conversations
from tests.training.training_here import TrainingHere


@pytest.fixture(scope="module")
def tuned(dataset_dir: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tuned")
    return TrainingHere(dataset_dir, root).to_the_end(max_steps=4, model_path=str(model_dir))


@pytest.fixture(scope="module")
def other(documents_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset with another tokenizer, and a model of it."""
    root = tmp_path_factory.mktemp("other")
    dataset = prepare_dataset(
        PrepareDatasetArguments(
            documents_train_file=(documents_dir / "train.txt",),
            documents_valid_file=(documents_dir / "valid.txt",),
            vocab_size=280,
            max_sample_length=128,
            datasets_root=root,
            dataset_name="other",
        )
    )
    return dataset, TrainingHere(dataset, root).to_the_end(max_steps=2)


def test_both_models_are_measured_on_every_dataset(
    tuned: Path,
    model_dir: Path,
    dataset_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    talks = write_conversations(tmp_path / "talks" / "0", model_dir)
    with caplog.at_level(logging.INFO):
        main(EvaluateArguments(tuned, dataset_dir, (talks,), compare=model_dir, device="cpu"))
    content = json.loads(capsys.readouterr().out)
    assert content["same_tokenizer"] is True
    assert (content["base"], content["tuned"]) == (str(model_dir), str(tuned))
    for found, place in zip(content["comparisons"], (dataset_dir, talks), strict=True):
        assert found["dataset"] == str(place)
        for name, model in (("base", model_dir), ("tuned", tuned)):
            assert found[name] == measured(EvaluateArguments(model, place, device="cpu"))
        change = found["tuned"]["perplexity"] / found["base"]["perplexity"] - 1
        assert found["change_in_percent"]["perplexity"] == pytest.approx(100 * change)
    documents, conversations = content["comparisons"]
    assert documents["change_in_percent"].keys() == {"loss", "perplexity", "bits_per_byte"}
    assert documents["change_in_percent"]["loss"] < -1
    assert conversations["change_in_percent"].keys() == {"loss", "perplexity"}
    table = next(message for message in caplog.messages if message.startswith("base: "))
    assert [line.split()[0] for line in table.splitlines()[2:]] == [
        *("base", str(dataset_dir), "loss", "perplexity", "bits"),
        *(str(talks), "loss", "perplexity"),
    ]


def test_models_with_different_tokenizers_compare_by_bits_per_byte(
    other: tuple[Path, Path],
    model_dir: Path,
    dataset_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Those of transformers, text by text."""
    dataset, model = other
    with caplog.at_level(logging.INFO):
        content = measured(
            EvaluateArguments(model, dataset_dir, (dataset,), compare=model_dir, device="cpu")
        )
    assert content["same_tokenizer"] is False
    assert "different tokenizers" in caplog.text
    for found in content["comparisons"]:
        assert found["change_in_percent"].keys() == {"bits_per_byte"}
        assert found["base"]["num_bytes"] == found["tuned"]["num_bytes"]
    first = open_dataset(dataset_dir)
    tokenizer = open_saved_tokenizer(first.tokenizer_directory)
    texts = [tokenizer.decode(first.valid[index].tolist()) for index in range(len(first.valid))]
    for name, path in (("base", model_dir), ("tuned", model / "model")):
        backbone, own = AutoModelForCausalLM.from_pretrained(path), open_saved_tokenizer(path)
        total = 0.0
        for text in texts:
            ids = torch.tensor([own.encode_after_begin(text)])
            with torch.inference_mode():
                total += backbone(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        expected = total / math.log(2) / sum(len(text.encode()) for text in texts)
        bits = content["comparisons"][0][name]["bits_per_byte"]
        assert bits == pytest.approx(expected, rel=1e-4)


def test_an_adapter_is_compared_with_its_base(
    model_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    adapter = TrainingHere(dataset_dir, tmp_path).to_the_end(
        max_steps=4, model_path=str(model_dir), lora_rank=2, learning_rate=0.02
    )
    content = measured(EvaluateArguments(adapter, dataset_dir, compare=model_dir, device="cpu"))
    (found,) = content["comparisons"]
    assert found["base"] == measured(EvaluateArguments(model_dir, dataset_dir, device="cpu"))
    assert found["change_in_percent"]["loss"] < -1


def test_what_does_not_compare_is_refused(
    other: tuple[Path, Path], model_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    talks = write_conversations(tmp_path / "talks" / "0", model_dir)
    with pytest.raises(DatasetError, match="compared by the bits per byte of documents"):
        measured(EvaluateArguments(other[1], talks, compare=model_dir, device="cpu"))
    with pytest.raises(UsageError, match="several datasets are for --compare"):
        EvaluateArguments(model_dir, dataset_dir, (talks,))
    with pytest.raises(UsageError, match="omit --harness"):
        EvaluateArguments(model_dir, harness=Path("task.yaml"), compare=model_dir)
    with pytest.raises(UsageError, match="omit --generation"):
        EvaluateArguments(model_dir, dataset_dir, compare=model_dir, generation=3)
