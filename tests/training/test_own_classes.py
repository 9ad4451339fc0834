"""`fst run_experiment` and the verbs of `Trainer`: classes of one's own through the same training."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import transformers

from full_stack_transformer import machine
from full_stack_transformer.arguments.training import RunExperimentArguments, TrainArguments
from full_stack_transformer.errors import MissingExtraError, ModelError, UsageError
from full_stack_transformer.tasks.opening import open_task
from full_stack_transformer.tasks.sequence_classification import SequenceClassification
from full_stack_transformer.training.hugging_face_trainer import to_hf_trainer
from full_stack_transformer.training.run import main as run_experiment
from full_stack_transformer.training.trainer import Trainer
from tests.tasks.small_tasks import small_rows, small_task, small_tokenizer
from tests.training.own_classes import OwnRows, OwnTask

_HERE = "tests.training.own_classes"
_QUICK: dict[str, Any] = {
    "model_config": "tiny",
    "vocab_size": 300,
    "max_length": 32,
    "max_steps": 3,
    "num_warmup_steps": 0,
    "accelerator": "cpu",
    "devices": "1",
    "precision": "32",
    "compile": "never",
    "enable_progress_bar": False,
}


@pytest.fixture(autouse=True)
def _no_measurement() -> Iterator[None]:
    with mock.patch.object(machine, "_SECONDS_PER_SIDE", 1e-3):
        yield


def test_a_data_set_and_a_task_of_ones_own(tmp_path: Path) -> None:
    arguments = RunExperimentArguments(
        data_class=f"{_HERE}.OwnRows",
        model_class=f"{_HERE}.OwnTask",
        experiments_root=tmp_path,
        do_train=True,
        do_eval=True,
        do_predict=True,
        **_QUICK,
    )
    experiment = run_experiment(arguments)
    assert isinstance(experiment, Path)
    opened = open_task(experiment)
    assert isinstance(opened.task, OwnTask)
    saved = json.loads((experiment / "arguments.json").read_text())
    assert saved["data_class"] == f"{_HERE}.OwnRows"
    figures = json.loads((experiment / "eval_results.json").read_text())
    assert 0 <= figures["accuracy"] <= 1
    lines = (experiment / "test_predictions.jsonl").read_text().splitlines()
    rows = OwnRows(arguments).named_rows("test")
    assert [json.loads(line)["text"] for line in lines] == [row["text"] for row in rows]
    first = opened.predict(rows[:1])[0]
    assert json.loads(lines[0])["prediction"]["label"] == first["label"]
    # The same later, with the model alone.
    again = dataclasses.replace(
        arguments, do_train=None, do_predict=None, model_path=str(experiment / "model")
    )
    measured = run_experiment(again)
    assert isinstance(measured, Path)
    assert json.loads((measured / "eval_results.json").read_text()) == figures
    with pytest.raises(UsageError, match="need a trained model"):
        run_experiment(dataclasses.replace(again, model_path=None))


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    """Its shape comes from a file, as that of any model of transformers."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from tests.training.own_classes import (
        BagOfTokensConfig,
        BagOfTokensForSequenceClassification,
    )

    AutoConfig.register("bag_of_tokens", BagOfTokensConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(
        BagOfTokensConfig, BagOfTokensForSequenceClassification, exist_ok=True
    )
    (tmp_path / "bag.json").write_text('{"model_type": "bag_of_tokens", "hidden_size": 8}')
    experiment = run_experiment(
        RunExperimentArguments(
            data_class=f"{_HERE}.OwnRows",
            model_class=f"{_HERE}.BagOfTokensForSequenceClassification",
            experiments_root=tmp_path,
            **{**_QUICK, "model_config": str(tmp_path / "bag.json")},
        )
    )
    assert isinstance(experiment, Path)
    opened = open_task(experiment)
    assert type(opened.backbone).__name__ == "BagOfTokensForSequenceClassification"
    assert opened.backbone.config.hidden_size == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_class": "tests.tasks.small_tasks.small_rows"}, "should derive from"),
        ({"data_class": "nothing"}, "should name a data set"),
        ({"data_class": f"{_HERE}.OwnRows", "model_class": f"{_HERE}.OwnRows"}, "--model_class"),
        (
            {
                "data_class": f"{_HERE}.OwnRows",
                "model_class": "transformers.BertForTokenClassification",
            },
            "has the head of token_labelling, but the rows are for sequence_classification",
        ),
    ],
)
def test_what_is_none_of_them_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        run_experiment(RunExperimentArguments(experiments_root=tmp_path, **options))
    assert list(tmp_path.iterdir()) == []


def test_a_shape_of_another_model_is_refused(tmp_path: Path) -> None:
    arguments = RunExperimentArguments(
        data_class=f"{_HERE}.OwnRows",
        model_class="transformers.BertForSequenceClassification",
        experiments_root=tmp_path,
        **_QUICK,
    )
    with pytest.raises(ModelError, match="tiny describes a model of type 'modernbert', but Bert"):
        run_experiment(arguments)


def test_a_trainer_takes_classes_by_their_names(tmp_path: Path) -> None:
    trainer = Trainer(
        RunExperimentArguments(
            data_class=f"{_HERE}.OwnRows",
            model_class=f"{_HERE}.OwnTask",
            experiments_root=tmp_path,
            **_QUICK,
        )
    )
    assert isinstance(open_task(trainer.train()).task, OwnTask)
    assert 0 <= trainer.evaluate()["accuracy"] <= 1


class _Count(pl.Callback):
    def __init__(self) -> None:
        self.num_batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.num_batches += 1


def test_a_trainer_has_the_usual_verbs(tmp_path: Path) -> None:
    arguments = TrainArguments(
        task="sequence_classification",
        train_file=Path("made here"),
        experiments_root=tmp_path,
        **_QUICK,
    )
    trainer = Trainer(arguments, data=OwnRows(arguments), task_class=SequenceClassification)
    counts = _Count()
    trainer.add_callback(counts)
    trainer.add_callback(pl.Callback())
    assert trainer.pop_callback(_Count) is counts
    trainer.callbacks.append(counts)
    with pytest.raises(UsageError, match=r"call train\(\) first"):
        trainer.evaluate()
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["labels"]) == arguments.batch_size
    assert trainer.num_examples() > 60
    assert trainer.is_world_process_zero()
    experiment = trainer.train()
    assert counts.num_batches == 3
    figures = trainer.evaluate()
    trainer.save_metrics("eval", figures)
    assert json.loads((experiment / "eval_results.json").read_text()) == figures
    [prediction] = trainer.predict([{"text": "cat sees the dog"}])
    assert prediction["label"] in ("animal", "plant")
    for _ in range(2):  # as a cell of a notebook that is run again
        trainer.save_model(tmp_path / "mine")
    with pytest.raises(UsageError, match="is no model directory"):
        trainer.save_model(tmp_path)
    assert open_task(tmp_path / "mine").name == "sequence_classification"
    assert trainer.metrics_format({"accuracy": 0.5}) == {"accuracy": "0.5000"}


@pytest.mark.parametrize(
    "name",
    [
        "sequence_classification",
        "token_labelling",
        "span_selection",
        "multiple_choice",
        "sentence_embedding",
    ],
)
@pytest.mark.parametrize("num_batches", [1, 2])
def test_the_hugging_face_trainer_finds_the_same_loss(
    name: str, num_batches: int, tmp_path: Path
) -> None:
    """In the first step, of one batch or of several, and in an evaluation."""
    rows = small_rows(name, 8)
    task, backbone = small_task(name, rows, small_tokenizer(tmp_path / "t"))
    features = task.features(rows)
    batch = task.collate(features)
    loss_sum = task.loss_sum(task.forward(backbone, batch), batch).detach()
    ours = float(loss_sum) / sum(map(task.num_targets, features))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        use_cpu=True,
        max_steps=3,
        logging_steps=1,
        report_to="none",
        per_device_train_batch_size=8 // num_batches,
        gradient_accumulation_steps=num_batches,
    )
    theirs = to_hf_trainer(task, backbone, features, arguments)
    before = theirs.evaluate(features)["eval_loss"]
    assert before == pytest.approx(ours, rel=1e-5)
    theirs.train()
    assert theirs.state.log_history[0]["loss"] == pytest.approx(ours, rel=1e-5)
    found = theirs.predict(features)
    assert found.metrics["test_loss"] < before
    for feature in features:
        del feature["labels"]
    if name != "sentence_embedding":  # where texts without a label are alike
        assert theirs.predict(features).label_ids is None


def test_the_hugging_face_trainer_needs_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = small_rows("sequence_classification", 8)
    task, backbone = small_task("sequence_classification", rows, small_tokenizer(tmp_path / "t"))
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match="pip install accelerate"):
        to_hf_trainer(task, backbone, task.features(rows), None)
