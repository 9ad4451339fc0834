"""A training that starts from a pretrained model keeps what that had, and never makes it worse."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.command_line import run
from full_stack_transformer.datasets.corpus import open_dataset
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer
from tests.chat_model import CHAT_TEMPLATE, NUM_EMBEDDINGS, make_chat_model
from tests.training.training_here import TrainingHere, checkpoint_of, curve_of

WEIGHTS = "model.safetensors"
DEFAULTS = {"learning_rate": None, "num_warmup_steps": None}


@pytest.fixture(scope="module")
def start(documents_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = (documents_dir / "train.txt").read_text()
    return make_chat_model(tmp_path_factory.mktemp("start") / "chatty", text)


@pytest.fixture(scope="module")
def own_dataset(start: Path, documents_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents, prepared for the model."""
    return prepare_dataset(
        PrepareDatasetArguments(
            documents_train_file=(documents_dir / "train.txt",),
            documents_valid_file=(documents_dir / "valid.txt",),
            datasets_root=tmp_path_factory.mktemp("datasets"),
            dataset_name="own",
            tokenizer_path=str(start),
            max_sample_length=64,
        )
    )


@pytest.fixture(scope="module")
def tuned(start: Path, own_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of a few steps at a rate that makes it better."""
    training = TrainingHere(own_dataset, tmp_path_factory.mktemp("tuned"))
    return training.to_the_end(model_path=str(start), max_steps=6, learning_rate=3e-3)


def test_documents_are_framed_as_the_model_expects(start: Path, own_dataset: Path) -> None:
    """Its tokenizer puts nothing before a text, and an end after it."""
    dataset = open_dataset(own_dataset)
    framing = dataset.description["document_framing"]
    assert framing == {"begin": "", "text_before": "", "text_after": "", "end": "<|im_end|>"}
    theirs = AutoTokenizer.from_pretrained(start)
    first = dataset.train[0].tolist()
    assert theirs.bos_token_id not in first
    text = theirs.decode(dataset.train.tokens[:400])
    assert "Nr 0 " in text or text.split("<|im_end|>")[0]
    ids = theirs(text.split("<|im_end|>")[0]).input_ids
    assert dataset.train.tokens[: len(ids) + 1].tolist() == [*ids, theirs.eos_token_id]
    # The tokenizer beside the dataset is the model's, whole.
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (own_dataset / "tokenizer" / file).read_bytes() == (start / file).read_bytes()
    assert run(["verify_dataset", str(own_dataset)]) == 0


def test_a_begin_token_stands_where_the_model_has_one(
    start: Path, documents_dir: Path, tmp_path: Path
) -> None:
    """Also in several processes, which open the saved tokenizer."""
    import shutil

    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    own = tmp_path / "own"
    shutil.copytree(start, own)
    backend = Tokenizer.from_file(str(own / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> <|endoftext|> $A",
        special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)],
    )
    backend.save(str(own / "tokenizer.json"))
    corpora = []
    for num_workers in (1, 5):
        dataset = open_dataset(
            prepare_dataset(
                PrepareDatasetArguments(
                    documents_train_file=(documents_dir / "train.txt",),
                    documents_valid_file=(documents_dir / "valid.txt",),
                    datasets_root=tmp_path / f"datasets{num_workers}",
                    dataset_name="own",
                    tokenizer_path=str(own),
                    num_workers=num_workers,
                )
            )
        )
        corpora.append(np.array(dataset.valid.tokens))
    assert corpora[0].tolist() == corpora[1].tolist()
    assert corpora[0][:2].tolist() == [1, 0]
    ends = np.flatnonzero(corpora[0] == 2)
    assert (corpora[0][ends[:-1] + 1] == 1).all()
    assert (corpora[0][ends[:-1] + 2] == 0).all()


def test_what_the_start_had_is_kept(start: Path, tuned: Path) -> None:
    model = tuned / "model"
    kept = (
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "additional_chat_templates/tool_use.jinja",
    )
    for name in kept:
        assert (model / name).read_bytes() == (start / name).read_bytes(), name
    before, after = (
        json.loads((one / "generation_config.json").read_text()) for one in (start, model)
    )
    assert before == after
    before, after = (json.loads((one / "config.json").read_text()) for one in (start, model))
    assert before == after
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert (tokenizer.model_max_length, tokenizer.unk_token) == (8192, "<|endoftext|>")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(start).chat_template
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], return_dict=False)
    assert ids[0] == 1 and 2 in ids, CHAT_TEMPLATE
    assert GenerationConfig.from_pretrained(model).eos_token_id == [2, 0]
    old, new = load_file(start / WEIGHTS), load_file(model / WEIGHTS)
    assert {name: (one.dtype, one.shape) for name, one in old.items()} == {
        name: (one.dtype, one.shape) for name, one in new.items()
    }
    assert any(not torch.equal(old[name], new[name]) for name in old)
    opened = AutoModelForCausalLM.from_pretrained(model)
    assert opened.get_input_embeddings().num_embeddings == NUM_EMBEDDINGS


def test_the_start_is_measured_first(start: Path, tuned: Path) -> None:
    curve = curve_of(tuned)
    assert [step for step, _ in curve] == [0, 6]
    assert curve[1][1] < curve[0][1]
    best = checkpoint_of(tuned)["callbacks"]
    assert any(state.get("curve") for state in best.values() if isinstance(state, dict))


def test_a_start_that_nothing_beats_stays_the_best(
    start: Path, own_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    training = TrainingHere(own_dataset, tmp_path)
    experiment = training.to_the_end(model_path=str(start), max_steps=4, learning_rate=50.0)
    assert "the start: validation loss" in caplog.text
    assert "no validation was better than the start" in caplog.text
    old, new = load_file(start / WEIGHTS), load_file(experiment / "model" / WEIGHTS)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    summary = json.loads((experiment / "summary.json").read_text())
    assert summary["best_step"] == 0
    assert not (experiment / "checkpoints/best.ckpt").exists()


def test_a_kill_at_any_time_gives_the_same_weights(
    start: Path, own_dataset: Path, tuned: Path, tmp_path: Path
) -> None:
    """In the validation of the start, in a step, and in the last validation."""
    options: dict[str, Any] = {"model_path": str(start), "max_steps": 6, "learning_rate": 3e-3}
    for number, crash in enumerate(({"in_validation": 0}, {"in_batch": 3}, {"in_validation": 6})):
        (tmp_path / str(number)).mkdir()
        training = TrainingHere(own_dataset, tmp_path / str(number))
        training.crash(**crash, **options, checkpoint_every_n_minutes=0.0)
        again = training.to_the_end(**options, resume="last")
        for name in (f"model/{WEIGHTS}", "model/config.json"):
            assert (again / name).read_bytes() == (tuned / name).read_bytes()
        assert curve_of(again) == curve_of(tuned)


def test_rates_are_low_by_default(
    start: Path, own_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    training = TrainingHere(own_dataset, tmp_path)
    experiment = training.to_the_end(model_path=str(start), max_steps=1, **DEFAULTS)
    saved = json.loads((experiment / "arguments.json").read_text())
    assert (saved["learning_rate"], saved["num_warmup_steps"]) == (5e-5, 20)
    assert "learning rate 5e-05 after 20 steps of warm-up" in caplog.text
    scratch = TrainArguments(dataset_dir=own_dataset)
    assert (scratch.peak_learning_rate, scratch.warmup_steps) == (1e-3, 100)
    # Again without them: what was saved.
    assert training.to_the_end(max_steps=1, resume="last", **DEFAULTS) == experiment


def test_a_dataset_of_other_tokens_is_refused(
    start: Path, dataset_dir: Path, own_dataset: Path, tuned: Path, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError) as refusal:
        TrainingHere(dataset_dir, tmp_path)(model_path=str(start), max_steps=1)
    assert "300 tokens" in str(refusal.value) and "320 tokens" in str(refusal.value)
    assert (
        f"fst prepare_dataset --tokenizer_path {start} --documents_train_file train.txt "
        "--documents_valid_file valid.txt --max_sample_length 64 --dataset_name tiny"
    ) in str(refusal.value)
    assert "--resize_embeddings new" in str(refusal.value)
    assert not (tmp_path / "experiment").exists()
    # The tuned model is a start for the same dataset.
    again = TrainingHere(own_dataset, tmp_path).to_the_end(
        model_path=str(tuned / "model"), max_steps=1, learning_rate=0.0
    )
    assert (again / "model/chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_embeddings_of_equal_tokens_are_carried_over(
    start: Path, dataset_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    experiment = TrainingHere(dataset_dir, tmp_path).to_the_end(
        model_path=str(start), max_steps=1, learning_rate=0.0, resize_embeddings="new"
    )
    model = experiment / "model"
    old, new = open_saved_tokenizer(start), open_saved_tokenizer(model)
    assert new.vocab_size == 300
    name = "model.embed_tokens.weight"
    before, after = (
        load_file(start / WEIGHTS)[name].float(),
        load_file(model / WEIGHTS)[name].float(),
    )
    assert after.shape == (300, 64)
    names = old.backend.get_vocab()
    known = {names.get(token): index for token, index in new.backend.get_vocab().items()}
    shared = {theirs: ours for theirs, ours in known.items() if theirs is not None}
    assert len(shared) > 250  # all bytes, and some words
    for theirs, ours in shared.items():
        assert torch.equal(after[ours], before[theirs])
    assert torch.equal(after[new.end_id], before[old.end_id])
    others = set(range(300)) - set(shared.values()) - {new.begin_id, new.end_id, new.pad_id}
    mean = before[:320].mean(0)
    for index in others:
        assert torch.allclose(after[index], mean, atol=1e-3)
    config = json.loads((model / "config.json").read_text())
    settings = json.loads((model / "generation_config.json").read_text())
    for found in (config, settings):
        assert (found["bos_token_id"], found["eos_token_id"]) == (new.begin_id, new.end_id)
    assert config["vocab_size"] == 300
    assert "keep their embeddings" in caplog.text
