"""Labelled rows through the whole of `fst train`: learned, resumed to the same bits, opened, measured."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.errors import ModelError, RowError, UsageError
from full_stack_transformer.evaluation.run import measured
from full_stack_transformer.metrics.regression import spearman
from full_stack_transformer.modelling.embedding.encoder import open_sentence_encoder
from full_stack_transformer.modelling.model_directory import save_model_directory
from full_stack_transformer.rows.fields import Row
from full_stack_transformer.tasks.opening import open_task
from full_stack_transformer.training.data.rows import BaseDataModule, FileRows, RowCollator
from full_stack_transformer.training.setup import open_setup
from tests.conftest import RunFst
from tests.tasks.small_tasks import TINY_ENCODER, small_rows, small_task, small_tokenizer
from tests.training.training_here import TrainingHere, checkpoint_of, curve_of


def write_rows(directory: Path, task: str, *, num_train: int = 96, num_valid: int = 24) -> Path:
    """train.jsonl and valid.jsonl of a task."""
    directory.mkdir()
    for seed, (split, number) in enumerate((("train", num_train), ("valid", num_valid))):
        lines = [json.dumps(row) + "\n" for row in small_rows(task, number, seed=seed)]
        (directory / f"{split}.jsonl").write_text("".join(lines))
    return directory


class _Training(TrainingHere):
    def __init__(self, root: Path, task: str, **options: Any) -> None:
        super().__init__(write_rows(root / "rows", task), root)
        config = root / "encoder.json"
        config.write_text(json.dumps(TINY_ENCODER))
        self._options |= {
            "task": task,
            "model_config": str(config),
            "vocab_size": 300,
            "max_length": 48,
            "max_epochs": 3,
            "learning_rate": 1e-2,
            "num_warmup_steps": 4,
            **options,
        }


# The figure, and what it must reach on rows that are easy.
_LEARNED = {
    "sequence_classification": ("accuracy", 0.9),
    "token_labelling": ("token_accuracy", 0.9),
    "span_selection": ("exact_match", 0.5),
    "multiple_choice": ("accuracy", 0.7),
    "sentence_embedding": ("spearman", 0.6),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "span_selection": {"max_epochs": 10},
    "multiple_choice": {"max_epochs": 8},
}


@pytest.mark.parametrize("task", _LEARNED)
def test_a_task_is_learned_and_measured_alike_from_the_saved_directory(
    task: str, tmp_path: Path
) -> None:
    name, least = _LEARNED[task]
    training = _Training(tmp_path, task, **_OPTIONS.get(task, {}))
    experiment = training.to_the_end(metric_for_best_model=name, val_check_interval=24.0)
    summary = json.loads((experiment / "summary.json").read_text())
    best = summary[f"best_validation_{name}"]
    assert best >= least
    arguments = EvaluateArguments(
        experiment, tmp_path / "rows", num_resamples=20, device="cpu", output_dir=tmp_path / "out"
    )
    content = measured(arguments)
    assert content["figures"][name] == pytest.approx(best)
    low, high = content["intervals"][name]
    assert low <= best <= high
    assert content["baselines"]["untrained"][name] < best
    if task != "sentence_embedding":
        assert content["baselines"]["majority"][name] < best
    predictions = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == content["number_of_rows"] == 24
    description = json.loads((experiment / "model" / "description.json").read_text())
    assert description["task"] == task
    assert (tmp_path / "out" / "confusion_matrix.svg").exists() == (
        task in ("sequence_classification", "token_labelling")
    )


def test_crashes_leave_no_trace(tmp_path: Path) -> None:
    training = _Training(tmp_path, "token_labelling", val_check_interval=4.0, max_steps=10)
    whole = training.to_the_end(experiment_name="whole")
    resume: dict[str, Any] = {}
    for crash in ({"in_batch": 6}, {"in_validation": 8}):
        training.crash(**crash, **resume, experiment_name="crashed")
        resume = {"resume": "last"}
    crashed = training.to_the_end(**resume, experiment_name="crashed")
    weights = "model/model.safetensors"
    assert (whole / weights).read_bytes() == (crashed / weights).read_bytes()
    assert curve_of(whole) == curve_of(crashed)
    left, right = (checkpoint_of(one)["state_dict"] for one in (whole, crashed))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_other_rows_cannot_be_gone_on_with(tmp_path: Path) -> None:
    training = _Training(tmp_path, "multiple_choice", max_steps=1)
    training.to_the_end()
    with (tmp_path / "rows" / "train.jsonl").open("a") as file:
        file.write(json.dumps(small_rows("multiple_choice", 1)[0]) + "\n")
    with pytest.raises(Exception, match="is not the dataset that"):
        training.to_the_end(resume="last", max_steps=2)


def test_a_masked_model_learns_and_guesses_alike_from_the_saved_directory(
    dataset_dir: Path, tmp_path: Path
) -> None:
    training = TrainingHere(dataset_dir, tmp_path)
    (tmp_path / "encoder.json").write_text(json.dumps(TINY_ENCODER))
    options: dict[str, Any] = {
        "task": "masked_lm",
        "model_config": str(tmp_path / "encoder.json"),
        "max_steps": 8,
        "val_check_interval": 4.0,
        "whole_word_masking": True,
        "metric_for_best_model": "accuracy",
    }
    experiment = training.to_the_end(**options)
    summary = json.loads((experiment / "summary.json").read_text())
    arguments = EvaluateArguments(experiment, dataset_dir, device="cpu")
    content = measured(arguments)
    assert content["loss"] == pytest.approx(summary["best_validation_loss"], rel=1e-5)
    assert content["accuracy"] == pytest.approx(summary["best_validation_accuracy"])
    opened = open_task(experiment)
    [[guesses]] = opened.predict([{"text": "The reader [MASK] the"}])
    assert [one["score"] for one in guesses] == sorted((g["score"] for g in guesses), reverse=True)
    training.crash(in_batch=6, **options, experiment_name="crashed")
    crashed = training.to_the_end(**options, experiment_name="crashed", resume="last")
    weights = "model/model.safetensors"
    assert (experiment / weights).read_bytes() == (crashed / weights).read_bytes()
    # A start for any other task, which brings a head of its own.
    fine = _Training(
        tmp_path, "sequence_classification", max_steps=1, model_path=str(experiment / "model")
    )
    assert open_task(fine.to_the_end(experiment_name="fine")).name == "sequence_classification"


def test_a_causal_model_chooses_by_likelihood(model_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", "multiple_choice", num_train=8, num_valid=8)
    arguments = EvaluateArguments(model_dir, rows, num_resamples=0, device="cpu")
    content = measured(arguments)
    assert content["task"] == "multiple_choice"
    assert 0 <= content["figures"]["accuracy"] <= 1
    assert "untrained" in content["baselines"]


class OwnRows(BaseDataModule):
    """A data set of one's own, as the documentation shows it."""

    def all_rows(self) -> Iterable[dict[str, Any]]:
        """Made here."""
        return small_rows("sequence_classification", 100)

    def augment(self, row: Row, random: np.random.Generator) -> Row:
        """Words in another order."""
        return {**row, "text": " ".join(random.permutation(row["text"].split()))}


def test_any_model_embeds_sentences_when_told_to(model_dir: Path, tmp_path: Path) -> None:
    rows = small_rows("sentence_embedding", 12)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    content = measured(EvaluateArguments(model_dir, path, task="sentence_embedding"))
    encoder = open_sentence_encoder(model_dir)
    first, second = (encoder.encode([row[name] for row in rows]) for name in ("text", "text_pair"))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines = (first * second).sum(axis=1) / norms
    expected = spearman(cosines, [row["label"] for row in rows])
    assert content["figures"]["spearman"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ModelError, match="belongs to another task"):
        measured(EvaluateArguments(model_dir, path, task="sequence_classification"))


def test_a_data_set_of_ones_own_has_splits_dimensions_and_loaders(tmp_path: Path) -> None:
    arguments = TrainArguments(train_file=Path("unused"), task="sequence_classification")
    data = OwnRows(arguments)
    again = OwnRows(arguments)
    sizes = {split: len(data.named_rows(split)) for split in ("train", "valid", "test")}
    assert sum(sizes.values()) == 100
    assert 65 <= sizes["train"] <= 92
    assert data.named_rows("test") == again.named_rows("test")
    task, _ = small_task(
        "sequence_classification", data.named_rows("train"), small_tokenizer(tmp_path)
    )
    data.open(task)
    assert data.output_dims == (2,)
    assert data.mapping == ["animal", "plant"]
    assert data.input_dims[1] == len(task.tokenizer)
    batches = list(data.train_dataloader())
    assert sum(len(batch["labels"]) for batch in batches) == sizes["train"]
    tested = list(data.test_dataloader())
    assert sum(len(batch["numbers"]) for batch in tested) == sizes["test"]
    # Augmented rows are others in each epoch, and the same when an epoch is seen again.
    plan, collate = data.train_plan(0, 1), data.train_collator()
    first, same, other = (collate(plan.batch(epoch, 0)) for epoch in (0, 0, 1))
    assert torch.equal(first["input_ids"], same["input_ids"])
    assert not torch.equal(first["numbers"], other["numbers"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train_file": None},
            "needs --dataset_dir or --train_file with labelled rows; found neither",
        ),
        ({"dataset_dir": Path("x")}, "found both"),
        ({"task": "causal_lm"}, "--train_file is for labelled rows"),
        ({"task": "masked_lm", "train_file": None}, "--task masked_lm needs --dataset_dir"),
        ({"doc_stride": -1}, "--doc_stride must be at least 0"),
        ({"task": "unheard_of"}, "--task must be one of causal_lm, .*; found 'unheard_of'"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"train_file": Path("x"), "task": "sequence_classification", **options}
    with pytest.raises(UsageError, match=message):
        open_setup(TrainArguments(**given))


def test_rows_that_are_on_both_sides_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = write_rows(tmp_path / "rows", "sequence_classification", num_train=40, num_valid=8)
    known = [json.loads(line) for line in (rows / "train.jsonl").read_text().splitlines()[:3]]
    for row in known:
        row |= {"label": "other", "id": 7}  # whatever else a row says
    text = "".join(json.dumps(row) + "\n" for row in [*known, {"text": "new", "label": "plant"}])
    (rows / "test.jsonl").write_text(text, encoding="utf-8")
    data = FileRows(TrainArguments(task="sequence_classification", dataset_dir=rows))
    assert len(data.rows("test")) == 4
    assert "3 of 4 rows of test are among those to train on too" in caplog.text


def test_a_figure_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    training = _Training(tmp_path, "sequence_classification", max_steps=1)
    with pytest.raises(UsageError, match=r"must be one of loss, accuracy, .*; found 'bleu'"):
        training.to_the_end(metric_for_best_model="bleu")


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    training = _Training(tmp_path, "sequence_classification", max_steps=1)
    with (tmp_path / "rows" / "valid.jsonl").open("a") as file:
        file.write(json.dumps({"text": "no label"}) + "\n")
    with pytest.raises(RowError, match=r"line 25: a row .* needs a label"):
        training.to_the_end()


@pytest.mark.parametrize(
    ("task", "field"),
    [
        ("sequence_classification", "label"),
        ("token_labelling", "labels"),
        ("span_selection", "answers"),
        ("multiple_choice", "label"),
    ],
)
def test_a_row_without_a_label_is_predicted_and_not_measured(
    task: str, field: str, tmp_path: Path
) -> None:
    rows = small_rows(task, 8)
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    found, backbone = small_task(task, rows, tokenizer)
    save_model_directory(
        tmp_path / "model", backbone, tokenizer_directory=tokenizer, description={"task": task}
    )
    del rows[3][field]
    assert len(found.predict(rows, backbone.eval())) == len(rows)
    path, all_rows = tmp_path / "bare.jsonl", tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    all_rows.write_text("".join(json.dumps(row) + "\n" for row in small_rows(task, 8)))
    (tmp_path / "empty.jsonl").touch()
    model = tmp_path / "model"
    for arguments in (
        EvaluateArguments(model, path),
        EvaluateArguments(model, all_rows, train_file=path),
    ):
        with pytest.raises(RowError, match=r"bare.jsonl, line 4: a row .* needs a label"):
            measured(arguments)
    with pytest.raises(RowError, match="no rows for the baselines"):
        measured(EvaluateArguments(model, all_rows, train_file=tmp_path / "empty.jsonl"))


def test_rows_that_cannot_be_measured_by_are_refused(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one text alone"}\n')
    with pytest.raises(RowError, match="no row with a pair of texts and a label"):
        measured(EvaluateArguments(model_dir, path, task="sentence_embedding"))


class _LongRows(BaseDataModule):
    """Rows of several windows, that `augment` leaves as they are."""

    task_name = "token_labelling"

    def all_rows(self) -> Iterable[dict[str, Any]]:
        """Sixty words each."""
        rows = small_rows(self.task_name, 40)
        return [{name: (row[name] * 60)[:60] for name in ("words", "labels")} for row in rows]

    def augment(self, row: Row, random: np.random.Generator) -> Row:
        """Itself."""
        return row


def test_every_window_of_an_augmented_row_is_seen(tmp_path: Path) -> None:
    data = _LongRows(TrainArguments(train_file=Path("unused"), task="token_labelling"))
    rows = data.named_rows("train")
    task, _ = small_task("token_labelling", rows, small_tokenizer(tmp_path))
    data.open(task)
    assert len(data.features("train")) > len(rows)
    plan, augmented, plain = (
        data.train_plan(0, 1),
        data.train_collator(),
        RowCollator(data, "train"),
    )
    for position in range(plan.num_batches_per_epoch):
        spans = plan.batch(0, position)
        assert torch.equal(augmented(spans)["input_ids"], plain(spans)["input_ids"])


def test_a_file_in_the_place_of_a_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,b\n")
    with pytest.raises(UsageError, match=r"rows.csv is a file of rows; pass it as --train_file"):
        FileRows(TrainArguments(dataset_dir=path, task="sequence_classification"))


_QUICKLY = (
    *("--max_steps", "1", "--vocab_size", "300", "--compile", "never", "--accelerator", "cpu"),
    *("--precision", "32", "--no_enable_progress_bar"),
)


def _encoder(root: Path) -> tuple[str | Path, ...]:
    (root / "encoder.json").write_text(json.dumps(TINY_ENCODER))
    return ("--model_config", root / "encoder.json", "--experiments_root", root, *_QUICKLY)


def test_a_published_table_is_trained_on_and_a_class_of_the_test_alone_is_an_error(
    tmp_path: Path, run_fst: RunFst
) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = [f"r{n};text {n % 30};{n % 3 - 1}" for n in range(90)]
    bad = "no label here"
    (rows / "Train.csv").write_text("\n".join(["ID;Text;Label", *lines, bad]) + "\n")
    tests = ["x1;text 1;0", "x2;a new one;-1", "x3;another;other", "x4;a third;1"]
    (rows / "test.csv").write_text("\n".join(["ID;Text;Label", *tests]) + "\n")
    words = ("--task", "sequence_classification", *_encoder(tmp_path))
    done = run_fst(
        *("train", *words, "--dataset_dir", rows, "--on_bad_row", "skip"),
        *("--do_train", "--do_predict"),
    )
    assert done.returncode == 0, done.stderr
    experiment = Path(done.stdout.strip())
    said = done.stderr
    assert "Train.csv: columns are separated by semicolon; text is 'Text', label is 'Label'" in said
    assert "Train.csv: skipped 1 bad row" in said
    assert "1 of 4 rows of test are among those to train on too" in said
    assert "rows of valid are among" not in said
    assert re.search(r"classes: (-1|0|1) \(\d+\), (-1|0|1) \(\d+\), (-1|0|1) \(\d+\)", said)
    assert said.index("classes: ") < said.index(" parameters on ")
    assert "the test rows: 1 of 4 labels are none of the training rows' and count as errors" in said
    assert len((experiment / "test_predictions.jsonl").read_text().splitlines()) == 4
    results = json.loads((experiment / "test_results.json").read_text())
    assert results["accuracy"] <= 0.75
    evaluated = run_fst(
        "evaluate", experiment, rows, "--on_bad_row", "skip", "--num_resamples", "9"
    )
    assert evaluated.returncode == 0, evaluated.stderr
    content = json.loads(evaluated.stdout)
    assert content["figures"]["accuracy"] == results["accuracy"]
    assert {one["label"]: one["support"] for one in content["classes"]} == {
        "-1": 1,
        "0": 1,
        "1": 1,
        "other": 1,
    }
    assert set(content["baselines"]) == {"majority", "words", "untrained"}


def test_the_column_of_labels_is_given_for_training_and_evaluation(
    tmp_path: Path, run_fst: RunFst
) -> None:
    path = tmp_path / "words.conll"
    path.write_text("".join(f"Anna{n} B-PER 0\nleft O 0\n\n" for n in range(30)))
    words = ("--task", "token_labelling", "--train_file", path, *_encoder(tmp_path))
    refused = run_fst("train", *words)
    assert refused.returncode == 1
    assert "pass --label_column N, counted from 1" in refused.stderr
    assert not (tmp_path / "experiment" / "0").exists()
    done = run_fst("train", *words, "--label_column", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"labels: B-PER \((\d+)\), O \(\1\)", done.stderr)
    experiment = Path(done.stdout.strip())
    arguments = EvaluateArguments(experiment, path, label_column="2", num_resamples=0, device="cpu")
    assert measured(arguments)["number_of_rows"] == 30
    arguments = EvaluateArguments(experiment, path, label_column="3", num_resamples=0, device="cpu")
    with pytest.raises(RowError, match=r"none of its labels \(0 \(60\)\) is one of the training"):
        measured(arguments)


@pytest.mark.parametrize(
    ("task", "field", "label", "message"),
    [
        ("sequence_classification", "label", "x", "two labels at least; found only 'x'"),
        ("sequence_classification", "label", 0.5, "two labels at least; found only '0.5'"),
        ("sequence_classification", "label", ["x"], "two labels at least"),
        ("span_selection", "answers", [], "all 8 rows have none"),
        (
            "sentence_embedding",
            "label",
            1,
            "cosine needs two different labels at least; found only 1",
        ),
    ],
)
def test_one_label_for_all_rows_is_refused(
    task: str, field: str, label: Any, message: str, tmp_path: Path
) -> None:
    rows = [{**row, field: label} for row in small_rows(task, 8)]
    with pytest.raises(RowError, match=message):
        small_task(task, rows, small_tokenizer(tmp_path))


def test_labels_that_differ_by_case_or_white_space_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("Good", "good ", "bad")
    rows = [{"text": f"text {n}", "label": names[n % 3]} for n in range(9)]
    task, _ = small_task("sequence_classification", rows, small_tokenizer(tmp_path))
    task.log_labels(rows, "x.csv")
    assert "x.csv: the labels 'Good' and 'good ' differ by case or white space only" in caplog.text


def test_labels_that_were_not_learned_count_as_errors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("sequence_classification", "token_labelling", "multi_label"):
        task_name = "sequence_classification" if name == "multi_label" else name
        rows = small_rows(name, 12)
        tokenizer = small_tokenizer(tmp_path / name)
        task, backbone = small_task(task_name, rows, tokenizer)
        asked = small_rows(name, 4, seed=1)
        field = "labels" if name == "token_labelling" else "label"
        unseen = {"token_labelling": ["B-STONE"] * len(asked[0].get("words", ()))}
        asked[0][field] = unseen.get(name, ["stone"] if name == "multi_label" else "stone")
        predictions = task.predict(asked, backbone)
        assert len(predictions) == 4
        features = task.labelled_features(asked)
        if name != "multi_label":
            assert task.num_targets(features[0]) == 0
        assert torch.isfinite(
            task.loss_sum(
                torch.cat([task.forward(backbone, task.collate([one])) for one in features[1:2]]),
                task.collate(features[1:2]),
            )
        )
        metrics = task.metrics(asked, predictions)
        assert any("tone" in one.label.casefold() for one in metrics.per_class)
        assert task.is_right(asked[0], predictions[0]) < 0.5
        task.log_unknown_labels(asked, "test.jsonl")
        with pytest.raises(RowError, match="none of its labels"):
            task.log_unknown_labels(asked[:1], "test.jsonl")
    assert "labels are none of the training rows' and count as errors: stone (1)" in caplog.text


def test_rows_without_a_text_or_a_label_are_left_out_when_told(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(20)]
    bare = [{"text": None, "label": "a"}, {"text": "no label", "label": None}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bare]))
    options: dict[str, Any] = {"task": "sequence_classification", "train_file": path}
    data = FileRows(TrainArguments(**options, on_bad_row="skip"))
    assert sum(len(data.named_rows(split)) for split in ("train", "valid")) == 20
    with pytest.raises(RowError, match="line 21 has no text: 'text' is null; correct it, or pass"):
        FileRows(TrainArguments(**options)).named_rows("train")
