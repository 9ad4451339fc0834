"""What holds for every task: saved and opened again it predicts the same, whatever the batch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithPadding

from full_stack_transformer.errors import ModelError, RowError, UsageError
from full_stack_transformer.modelling.model_directory import save_model_directory
from full_stack_transformer.rows.fields import Row
from full_stack_transformer.tasks import token_labelling
from full_stack_transformer.tasks.opening import (
    open_task,
    row_task_class,
    task_class,
    task_class_of,
)
from full_stack_transformer.tasks.task import RowTask, Task
from full_stack_transformer.tokenization.transformers_tokenizer import open_tokenizer
from tests.tasks.small_tasks import TINY_ENCODER, are_close, save_task, small_rows, small_task

_KINDS = {
    "sequence_classification": "sequence_classification",
    "regression": "sequence_classification",
    "multi_label": "sequence_classification",
    "token_labelling": "token_labelling",
    "span_selection": "span_selection",
    "multiple_choice": "multiple_choice",
    "sentence_embedding": "sentence_embedding",
}


def _without_labels(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in ("label", "labels", "answers")}


def _learn(name: str, rows: Sequence[Row], tokenizer_dir: Path, **options: Any) -> RowTask:
    cls = row_task_class(name)
    return cls.learn(rows, open_tokenizer(tokenizer_dir), cls.options_class(**options))


@pytest.mark.parametrize("kind", _KINDS)
def test_a_saved_model_predicts_the_same_in_any_batch(
    kind: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = small_rows(kind, 12)
    task, backbone = small_task(_KINDS[kind], rows, tokenizer_dir)
    expected = task.predict(rows, backbone, batch_size=12)
    save_task(tmp_path / "model", task, backbone, tokenizer_dir, {})
    opened = open_task(tmp_path / "model")
    assert opened.name == _KINDS[kind]
    assert type(opened.task) is type(task)
    bare = [_without_labels(row) for row in rows]
    assert are_close(opened.predict(bare, batch_size=1), expected)
    # The metrics need the labels, the predictions alone do not.
    assert task.metrics(rows, expected).scalars
    for row, prediction in zip(rows, expected, strict=True):
        assert task.is_right(row, prediction) <= 1.0


@pytest.mark.parametrize("kind", _KINDS)
def test_the_plain_class_of_transformers_computes_the_same(
    kind: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = small_rows(kind, 9)
    task, backbone = small_task(_KINDS[kind], rows, tokenizer_dir)
    save_task(tmp_path / "model", task, backbone, tokenizer_dir, {})
    theirs = task.model_class.from_pretrained(tmp_path / "model").eval()
    batch = task.collate(task.features([rows[0]]))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if (
        kind == "sentence_embedding"
    ):  # test_sentence_encoder.py compares it with sentence-transformers
        return
    with torch.inference_mode():
        ours, output = task.forward(backbone, batch), theirs(**inputs)
    if kind == "span_selection":
        output.logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
    torch.testing.assert_close(ours, output.logits, rtol=0, atol=1e-6)
    assert task_class_of(tmp_path / "model").name == _KINDS[kind]


def test_a_text_without_a_pair_is_read_once_and_twice_to_learn(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows, shape = small_rows("sentence_embedding", 4), tmp_path / "shape.json"
    shape.write_text(json.dumps(TINY_ENCODER), encoding="utf-8")  # has dropout
    task, backbone = small_task("sentence_embedding", rows, tokenizer_dir, shape=str(shape))
    batch = task.collate(task.features([{"text": row["text"]} for row in rows]))
    assert batch["input_ids"].shape[:2] == (4, 1)
    [alone] = task.forward(backbone.eval(), batch).detach().unbind(1)
    together = task.forward(backbone, task.collate(task.features(rows))).detach()
    torch.testing.assert_close(alone, together[:, 0])
    first, second = task.forward(backbone.train(), batch).unbind(1)
    assert not torch.equal(first, second)  # each under its own dropout


def test_a_causal_model_that_learned_to_choose_is_opened_as_one(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = small_rows("multiple_choice", 6)
    task, backbone = small_task("multiple_choice", rows, tokenizer_dir, shape="decoder-tiny")
    expected = task.predict(rows, backbone)
    save_model_directory(
        tmp_path / "model",
        backbone,
        tokenizer_directory=tokenizer_dir,
        description={"task": "multiple_choice"},
    )
    opened = open_task(tmp_path / "model")
    assert opened.name == "multiple_choice"
    assert are_close(opened.predict(rows, batch_size=1), expected)
    # By hand: the mean log-likelihood of a choice's tokens after the text.
    tokenizer, row = task.tokenizer, rows[0]
    scores = []
    for choice in row["choices"]:
        before = [
            tokenizer.bos_token_id,
            *tokenizer(row["text"], add_special_tokens=False)["input_ids"],
        ]
        after = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = backbone(torch.tensor([before + after])).logits[0].log_softmax(-1)
        picked = [logits[len(before) - 1 + n, token] for n, token in enumerate(after)]
        scores.append(float(torch.stack(picked).mean()))
    by_hand = torch.tensor(scores).softmax(0).tolist()
    assert expected[0]["scores"] == pytest.approx(by_hand, abs=1e-5)


def test_batches_are_those_of_transformers_collator(tokenizer_dir: Path) -> None:
    rows = small_rows("sequence_classification", 5)
    task, _ = small_task("sequence_classification", rows, tokenizer_dir)
    features = task.features(rows)
    bare = [{name: f[name] for name in ("input_ids", "attention_mask", "labels")} for f in features]
    theirs = DataCollatorWithPadding(task.tokenizer)(bare)
    ours = task.collate(features)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", _KINDS)
def test_the_loss_of_a_batch_is_the_sum_of_those_of_its_rows(
    kind: str, tokenizer_dir: Path
) -> None:
    rows = small_rows(kind, 6)
    task, backbone = small_task(_KINDS[kind], rows, tokenizer_dir)
    features = task.features(rows)

    def loss(some: list[dict[str, Any]]) -> float:
        batch = task.collate(some)
        with torch.inference_mode():
            return float(task.loss_sum(task.forward(backbone, batch), batch))

    assert loss(features) == pytest.approx(sum(loss([one]) for one in features), rel=1e-4)


def test_a_model_that_lacks_its_head_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    """transformers' own pipeline would attach a random one without a word."""
    rows = small_rows("token_labelling", 3)
    _, backbone = small_task("token_labelling", rows, tokenizer_dir)
    weights = {k: v for k, v in backbone.state_dict().items() if "classifier" not in k}
    save_model_directory(
        tmp_path / "model",
        backbone,
        tokenizer_directory=tokenizer_dir,
        description={},
        weights=weights,
    )
    with pytest.raises(ModelError, match="lack 2 tensors"):
        open_task(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("See a_b, now!", ["See", "a_b", ",", "now", "!"]),
        ("deux cafe\u0301s.", ["deux", "cafe\u0301s", "."]),  # accents of their own
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u0939\u0948",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u0948"],
        ),
        ("\u0301a", ["\u0301a"]),
        ("", []),
    ],
    ids=["latin", "accents", "hindi", "mark-first", "empty"],
)
def test_the_words_of_a_text_are_whole_in_every_script(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in token_labelling._spans_of_words(text)] == words


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("sequence_classification", {"text": 3}, "should have 'text', a str; found int there"),
        ("sequence_classification", {"title": "x", "body": "y"}, "the fields title, body$"),
        ("sequence_classification", {"text": "x", "text_pair": 3}, "'text_pair', a str; found int"),
        ("token_labelling", {"words": ["a", 3], "labels": ["O", "O"]}, "list of str; found 3 in"),
        ("token_labelling", {"words": ["a", "b"], "labels": ["O"]}, "1 labels and 2 words"),
        ("multiple_choice", {"text": "a", "choices": ["b"]}, "two choices"),
        ("multiple_choice", {"text": "a", "choices": ["b", None]}, "list of str; found None in"),
        ("multiple_choice", {"text": "a", "choices": ["b", "c"], "label": 2}, "0 to 1, found 2"),
        ("multiple_choice", {"text": "a", "choices": ["b", "c"], "label": 0.7}, "found 0.7"),
        ("sentence_embedding", {"text": "a", "text_pair": "b", "label": "nan"}, "a number"),
        ("span_selection", {"question": "a", "context": "b"}, None),
        (
            "span_selection",
            {"question": "a", "context": "bcd", "answers": [{"text": "c", "start": 0}]},
            "should stand at character 0",
        ),
        (
            "span_selection",
            {"question": "a", "context": "bcd", "answers": [{"text": "x", "start": None}]},
            "'x' is not in the context",
        ),
        ("span_selection", {"question": "a", "context": "b", "answers": "b"}, "list of objects"),
        (
            "span_selection",
            {"question": "a", "context": "b", "answers": [{"text": "b", "start": "0"}]},
            "list of objects with 'text', a str, and 'start', an int",
        ),
        ("span_selection", {"question": "a " * 60, "context": "b"}, "leaves no room"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(
    task: str, row: Row, message: str | None, tokenizer_dir: Path
) -> None:
    found, _ = small_task(task, small_rows(task, 12), tokenizer_dir)
    if message is None:
        assert "labels" not in found.features([row])[0]
        return
    with pytest.raises(RowError, match=message):
        found.features([{**row, "_place": "rows.jsonl, line 3"}])


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(UsageError, match="expected one of causal_lm"):
        task_class("tests.tasks.small_tasks.small_rows")
    with pytest.raises(UsageError, match="should name a task"):
        task_class("no_such_module.Task")
    assert issubclass(task_class("full_stack_transformer.tasks.masked_lm.MaskedLm"), Task)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("sequence_classification", {"text": "a", "label": []}),
        ("token_labelling", {"words": [], "labels": []}),
    ],
)
def test_rows_without_any_label_are_refused(task: str, row: Row, tokenizer_dir: Path) -> None:
    with pytest.raises(RowError, match="each row's list of them is empty"):
        _learn(task, [row], tokenizer_dir)


def test_words_that_python_takes_for_numbers_are_names(tokenizer_dir: Path) -> None:
    """Not a regression whose loss is NaN, nor an order that changes from run to run."""
    rows = [{"text": "a", "label": label} for label in ("nan", "1", "inf", "b", "0")]
    task = _learn("sequence_classification", rows, tokenizer_dir)
    assert task.config_fields()["id2label"] == dict(enumerate(["0", "1", "b", "inf", "nan"]))


@pytest.mark.parametrize("answer", ["pig", " pig", "pig ", " pig\n "])
def test_an_answer_with_spaces_around_it_is_learned_as_an_answer(
    answer: str, tokenizer_dir: Path
) -> None:
    context = f"oak fern {answer} moss"
    row = {"question": "which animal", "context": context, "answers": [{"text": answer}]}
    task, _ = small_task("span_selection", small_rows("span_selection", 3), tokenizer_dir)
    [feature] = task.features([row])
    first, last = feature["labels"]
    found = context[feature["offsets"][first][0] : feature["offsets"][last][1]]
    assert found == "pig"


@pytest.mark.parametrize("max_length", [4, 5])
def test_words_are_read_in_the_shortest_windows(max_length: int, tokenizer_dir: Path) -> None:
    row = {"words": ["cat", "sees", "the", "dog", "again"], "labels": ["B-ANIMAL", *["O"] * 4]}
    task = _learn("token_labelling", [row], tokenizer_dir, max_length=max_length)
    seen = {word for feature in task.features([row]) for word in feature["word_tokens"]}
    assert seen == set(range(5))


def test_pairs_that_are_all_unlike_are_refused_by_simcse(tokenizer_dir: Path) -> None:
    row = {"text": "a", "text_pair": "b", "label": 0}
    with pytest.raises(RowError, match="no label is above 0; pass --embedding_loss cosine"):
        _learn("sentence_embedding", [row], tokenizer_dir, embedding_loss="simcse")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json should hold JSON"),
        (
            "config.json",
            '{"architectures": ["XForTokenClassification"]}',
            "config.json names no model_type",
        ),
        ("description.json", "{", "description.json should hold JSON"),
        ("model.safetensors", "", "is empty"),
    ],
)
def test_a_damaged_directory_is_refused(
    name: str, content: str, message: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = small_rows("token_labelling", 3)
    task, backbone = small_task("token_labelling", rows, tokenizer_dir)
    save_task(tmp_path / "model", task, backbone, tokenizer_dir, {"task": task.name})
    (tmp_path / "model" / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        open_task(tmp_path / "model")
