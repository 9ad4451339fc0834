"""Conversations become a dataset directory of which the answers are learned."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from full_stack_transformer.arguments.data import PrepareDatasetArguments, VerifyDatasetArguments
from full_stack_transformer.datasets.corpus import Corpus, DatasetDirectory, open_dataset
from full_stack_transformer.datasets.verify import main as verify
from full_stack_transformer.errors import DatasetError, RowError, UsageError
from full_stack_transformer.preparation.prepare import main as prepare
from full_stack_transformer.tokenization.chat import load_chat_template
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer
from tests.tokenization.families import FAMILIES, family_tokenizer


def _row(number: int, answer: str = "") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"the cat {number} <|im_end|>"},
            {"role": "assistant", "content": answer or f"sat {number}"},
            {"role": "user", "content": "why"},
            {"role": "assistant", "content": "[DOC_END] the mat"},
        ]
    }


def _write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of a model with a chat template."""
    directory = tmp_path_factory.mktemp("model")
    family_tokenizer("chatml").save(directory, model_max_length=512)
    (directory / "chat_template.jinja").write_text(FAMILIES["chatml"].template)
    return directory


def _prepare(root: Path, **options: Any) -> DatasetDirectory:
    given = {
        "dataset_name": "talk",
        "datasets_root": root / "datasets",
        "vocab_size": 400,
        **options,
    }
    return open_dataset(prepare(PrepareDatasetArguments(**given)))


def _learned(corpus: Corpus, dataset: DatasetDirectory, index: int) -> str:
    assert corpus.learned is not None
    start = int(corpus.start_positions[index])
    span = slice(start, start + int(corpus.lengths()[index]))
    ids = corpus.tokens[span][corpus.learned[span] == 1].tolist()
    backend = open_saved_tokenizer(dataset.tokenizer_directory).backend
    return str(backend.decode(ids, skip_special_tokens=False))


def test_the_template_of_the_model_is_used_and_kept(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = _write(tmp_path / "a.jsonl", *map(_row, range(40)))
    dataset = _prepare(tmp_path, conversations=(path,), tokenizer_path=str(model))
    assert dataset.kind == "conversations"
    assert len(dataset.train) + len(dataset.valid) == 40
    assert len(dataset.valid)
    theirs = transformers.AutoTokenizer.from_pretrained(dataset.tokenizer_directory)
    tokenizer = open_saved_tokenizer(dataset.tokenizer_directory)
    whole = {
        theirs.apply_chat_template(_row(number)["messages"], tokenize=False) for number in range(40)
    }
    for index in range(len(dataset.train)):
        text = tokenizer.backend.decode(dataset.train[index].tolist(), skip_special_tokens=False)
        assert text in whole
        number = text.split()[3]
        learned = f"sat {number}<|im_end|>[DOC_END] the mat<|im_end|>"
        assert _learned(dataset.train, dataset, index) == learned
    description = dataset.description
    assert description["chat_template"] == "own"
    marks = [
        corpus.learned.sum()
        for corpus in (dataset.train, dataset.valid)
        if corpus.learned is not None
    ]
    assert description["num_learned_tokens"] == sum(marks)
    assert (description["num_cut_answers"], description["num_refused_rows"]) == (0, 0)
    assert description["max_sample_length"] == description["longest_conversation"]
    assert f"{len(dataset.train)} conversations, {2 * len(dataset.train)} answers" in caplog.text
    verify(VerifyDatasetArguments(dataset.directory))
    again = _prepare(tmp_path, conversations=(path,), tokenizer_path=str(model))
    assert np.array_equal(again.train.tokens, dataset.train.tokens)


def test_without_a_tokenizer_one_is_trained_and_a_plain_template_saved(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", *map(_row, range(20)))
    valid = _write(tmp_path / "b.jsonl", _row(99))
    dataset = _prepare(tmp_path, conversations=(path,), documents_valid_file=(valid,))
    assert (len(dataset.train), len(dataset.valid)) == (20, 1)
    assert dataset.description["chat_template"] == "plain"
    assert _learned(dataset.valid, dataset, 0) == " sat 99[DOC_END] [DOC_END] the mat[DOC_END]"
    theirs = transformers.AutoTokenizer.from_pretrained(dataset.tokenizer_directory)
    text = theirs.apply_chat_template(
        _row(99)["messages"][:1], tokenize=False, add_generation_prompt=True
    )
    assert text == "[DOC_START]User: the cat 99 <|im_end|>\nAssistant:"


def test_a_long_answer_is_counted_and_kept_on_the_disk(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _write(tmp_path / "a.jsonl", *map(_row, range(20)), _row(20, "long " * 200))
    valid = _write(tmp_path / "b.jsonl", _row(99))
    options = {"conversations": (path,), "documents_valid_file": (valid,), "max_sample_length": 100}
    dataset = _prepare(tmp_path, tokenizer_path=str(model), **options)
    assert dataset.train.lengths().max() == dataset.description["longest_conversation"] > 400
    assert dataset.description["max_sample_length"] == 100
    assert dataset.description["num_cut_answers"] == 2
    assert "2 answers" in caplog.text
    verify(VerifyDatasetArguments(dataset.directory))
    with pytest.raises(DatasetError, match=r"ends within --max_sample_length 9 tokens.*raise it"):
        _prepare(tmp_path, tokenizer_path=str(model), **{**options, "max_sample_length": 9})


def test_preferences_are_pairs_and_learn_the_last_answer(tmp_path: Path, model: Path) -> None:
    rows = [
        {
            "prompt": [*_row(number)["messages"][:3]],
            "chosen": "the mat",
            "rejected": f"the cat ate {number}",
        }
        for number in range(30)
    ]
    path = _write(tmp_path / "a.jsonl", *rows)
    dataset = _prepare(tmp_path, preferences=(path,), tokenizer_path=str(model))
    assert dataset.kind == "preferences"
    assert len(dataset.train) + len(dataset.valid) == 60
    for corpus in (dataset.train, dataset.valid):
        assert len(corpus)
        for index in range(0, len(corpus), 2):
            assert _learned(corpus, dataset, index) == "the mat<|im_end|>"
            assert _learned(corpus, dataset, index + 1).startswith("the cat ate")
            prompts = [corpus[index + one].tolist() for one in (0, 1)]
            assert prompts[0][:12] == prompts[1][:12]
    verify(VerifyDatasetArguments(dataset.directory))


def test_rows_that_cannot_be_used_stop_or_are_counted(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strict = tmp_path / "strict"
    family_tokenizer("gemma").save(strict, model_max_length=512)
    (strict / "chat_template.jinja").write_text(FAMILIES["gemma"].template)
    system = {"messages": [{"role": "system", "content": "x"}, *_row(1)["messages"]]}
    path = _write(tmp_path / "a.jsonl", *map(_row, range(9)), {"text": "a"}, system, _row(3))
    options = {"conversations": (path,), "tokenizer_path": str(strict)}
    with pytest.raises(RowError, match=r"line 10 should have messages"):
        _prepare(tmp_path, **options)
    _write(path, *map(_row, range(9)), system)
    with pytest.raises(
        RowError, match=r"line 10: the chat template refuses.*System role not supported"
    ):
        _prepare(tmp_path, **options)
    assert not list((tmp_path / "datasets" / "talk").glob("*"))
    _write(path, *map(_row, range(9)), {"text": "a"}, system, _row(3))
    dataset = _prepare(tmp_path, **options, on_bad_row="skip", deduplicate="exact")
    assert dataset.description["num_refused_rows"] == 2
    assert len(dataset.train) + len(dataset.valid) == 9
    assert "left out 2 rows" in caplog.text
    with pytest.raises(DatasetError, match="only one conversation"):
        _prepare(tmp_path, conversations=(_write(path, _row(1)),), tokenizer_path=str(model))


def test_documents_keep_the_template_of_a_tokenizer_that_was_made_here(
    tmp_path: Path, documents_dir: Path, dataset_dir: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(dataset_dir / "tokenizer", model)
    (model / "chat_template.jinja").write_text(FAMILIES["chatml"].template)
    dataset = prepare(
        PrepareDatasetArguments(
            documents_train_file=(documents_dir / "train.txt",),
            validation_fraction=0.1,
            tokenizer_path=str(model),
            datasets_root=tmp_path,
            dataset_name="kept",
        )
    )
    assert load_chat_template(dataset / "tokenizer").source == FAMILIES["chatml"].template


def test_a_template_that_never_ends_is_stopped(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "full_stack_transformer.preparation.conversations._SECONDS_FOR_TEMPLATE", 0.2
    )
    endless = tmp_path / "endless"
    family_tokenizer("chatml").save(endless, model_max_length=512)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (endless / "chat_template.jinja").write_text(loops + FAMILIES["chatml"].template)
    path = _write(tmp_path / "a.jsonl", *map(_row, range(3)))
    with pytest.raises(RowError, match=r"line 1: the chat template takes more than 0.2 s"):
        _prepare(tmp_path, conversations=(path,), tokenizer_path=str(endless))


def test_a_flipped_mark_is_found(tmp_path: Path, model: Path) -> None:
    path = _write(tmp_path / "a.jsonl", *map(_row, range(9)))
    dataset = _prepare(tmp_path, conversations=(path,), tokenizer_path=str(model))
    learned = dataset.directory / "train" / "learned.npy"
    content = bytearray(learned.read_bytes())
    content[-1] = 7
    learned.write_bytes(content)
    with pytest.raises(
        DatasetError, match=r"(?s)other content.*1 marks are not 0 or 1, the first is 7"
    ):
        verify(VerifyDatasetArguments(dataset.directory))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "only one of them; found none"),
        (
            {"conversations": (Path("a"),), "preferences": (Path("a"),)},
            "found --conversations and --pref",
        ),
        ({"preferences": (Path("a"),), "answers_of": "Ann"}, "--answers_of needs --conversations"),
        ({"conversations": (Path("a"),), "resume": True}, "--resume is for documents"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PrepareDatasetArguments(dataset_name="a", **options)
