"""Documents beside what is learned: the loss, the same bits after a crash, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.corpus import open_dataset
from full_stack_transformer.datasets.replay import replayed_part
from full_stack_transformer.errors import DatasetError, UsageError
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.setup import open_setup
from tests.training.small_conversations import write_conversations
from tests.training.test_resume import _assert_equal
from tests.training.training_here import TrainingHere, checkpoint_of, curve_of

_TRAININGS: dict[str, dict[str, Any]] = {
    "documents, accumulated": {"accumulate_grad_batches": 3},
    "documents, concatenated, from scratch": {"batching": "concatenated", "model_path": None},
    "conversations, packed": {"batching": "packed", "dataset": "talks"},
    "conversations, an adapter": {"lora_rank": 2, "lora_dropout": 0.2, "dataset": "talks"},
}


@pytest.fixture(scope="module")
def talks(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("datasets") / "talks" / "0", model_dir)


def _options(kind: str, dataset_dir: Path, talks: Path, model_dir: Path) -> dict[str, Any]:
    options = {"model_path": str(model_dir), "replay": (f"{dataset_dir}:0.25",), **_TRAININGS[kind]}
    is_talk = options.pop("dataset", "") == "talks"
    task = {"task": "supervised_fine_tuning", "max_length": 64} if is_talk else {}
    return {**options, **task, "dataset_dir": talks if is_talk else dataset_dir}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", _TRAININGS)
def test_crashes_leave_no_trace(
    kind: str, dataset_dir: Path, talks: Path, model_dir: Path, tmp_path: Path
) -> None:
    training = TrainingHere(dataset_dir, tmp_path)
    options = _options(kind, dataset_dir, talks, model_dir) | {
        "max_steps": 5,
        "val_check_interval": 3.0,
        "checkpoint_every_n_minutes": 0.0,
    }
    whole = training.to_the_end(**options, experiment_name="whole")
    training.crash(in_batch=2, **options, experiment_name="crashed")
    training.crash(in_batch=4, **options, resume="last", experiment_name="crashed")
    crashed = training.to_the_end(**options, resume="last", experiment_name="crashed")
    _assert_equal(checkpoint_of(whole), checkpoint_of(crashed))
    assert curve_of(whole) == curve_of(crashed)
    replayed = curve_of(whole, metric_names.TRAIN_REPLAY_LOSS)
    assert replayed
    assert set(curve_of(crashed, metric_names.TRAIN_REPLAY_LOSS)) <= set(replayed)


@pytest.mark.parametrize("batching", ["length", "packed"])
@pytest.mark.parametrize("learns_talks", [False, True], ids=["documents", "conversations"])
def test_the_loss_is_the_mean_over_own_and_replayed_targets(
    learns_talks: bool, batching: str, dataset_dir: Path, talks: Path, model_dir: Path
) -> None:
    """Of transformers, document by document; the share is that of the learned tokens."""
    kind = "conversations, packed" if learns_talks else "documents, accumulated"
    options = _options(kind, dataset_dir, talks, model_dir) | {
        "batching": batching,
        "accumulate_grad_batches": 1,
        "batch_size": 8,
        "max_epochs": 10,
    }
    module, data, plain = None, None, None
    for replays in (True, False):
        setup = open_setup(TrainArguments(**options | ({} if replays else {"replay": ()})))
        setup.begin(None)
        if replays:
            module, data = setup.make_module(setup.make_backbone(), setup.arguments), setup.data
        else:
            plain = setup.data
    assert module is not None
    assert data is not None
    assert plain is not None
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    num_targets = num_replayed = 0.0
    is_checked = False
    for batch, own in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
        assert torch.equal(batch["input_ids"], own["input_ids"]), "its own samples are as without"
        num_targets += float(batch["num_targets"])
        num_replayed += float(batch.get("num_replay_targets", 0.0))
        part = replayed_part(batch)
        if part is None or is_checked:
            continue
        is_checked = True
        sums = dict.fromkeys((metric_names.CROSS_ENTROPY, metric_names.REPLAY_LOSS), 0.0)
        for name, one in zip(sums, (own, part), strict=True):
            for ids, labels in _documents(one):
                num = int((labels[1:] != -100).sum())
                if num:
                    loss = model(input_ids=ids[None], labels=labels[None]).loss
                    sums[name] += loss.item() * num
        loss, shown = module.mean_losses(batch)
        assert loss.item() == pytest.approx(
            sum(sums.values()) / float(batch["num_targets"]), abs=1e-5
        )
        both = (own["num_targets"], batch["num_replay_targets"])
        for (name, total), count in zip(sums.items(), both, strict=True):
            assert shown[name].item() == pytest.approx(total / float(count), abs=1e-5)
    assert is_checked
    assert num_replayed / num_targets == pytest.approx(0.25, abs=0.03)


def _documents(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of each document, one row at a time."""
    found = []
    for row in range(len(batch["input_ids"])):
        documents = batch.get("document_ids", torch.zeros_like(batch["input_ids"]))[row]
        for number in range(int(documents.max()) + 1):
            place = documents == number
            found.append((batch["input_ids"][row][place], batch["labels"][row][place]))
    return found


def test_the_shares_are_said_at_the_start(
    dataset_dir: Path, talks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        TrainingHere(dataset_dir, tmp_path)(
            max_steps=1, replay=(f"{dataset_dir}:0.1", f"{dataset_dir}:0.05")
        )
    said = [line for line in caplog.messages if line.startswith("replaying")]
    assert len(said) == 2
    assert "10.0% of the learned tokens" in said[0]
    assert "5.0% of the learned tokens" in said[1]


def test_what_cannot_be_replayed_is_refused(
    dataset_dir: Path, documents_dir: Path, talks: Path, model_dir: Path, tmp_path: Path
) -> None:
    training = TrainingHere(dataset_dir, tmp_path)
    other = prepare_dataset(
        PrepareDatasetArguments(
            documents_train_file=(documents_dir / "train.txt",),
            documents_valid_file=(documents_dir / "valid.txt",),
            vocab_size=280,
            datasets_root=tmp_path / "datasets",
            dataset_name="other",
        )
    )
    for word, message in (
        (f"{other}:0.1", "was prepared with another tokenizer .* fst prepare_dataset"),
        (f"{talks}:0.1", "holds conversations; what is replayed are documents"),
        (f"{tmp_path / 'nothing'}:0.1", "is not a dataset directory"),
    ):
        with pytest.raises(DatasetError, match=message):
            training(max_steps=1, replay=(word,))
    for words in (
        ("data",),
        ("data:x",),
        ("data:0",),
        ("data:0.6",),
        ("a:0.3", "b:0.3"),
        (":0.1",),
    ):
        with pytest.raises(UsageError, match="--replay"):
            TrainArguments(dataset_dir=dataset_dir, replay=words)
    preferences = write_conversations(tmp_path / "pairs" / "0", model_dir, kind="preferences")
    with pytest.raises(UsageError, match="--replay is for tasks that learn the next tokens"):
        training(
            dataset_dir=preferences,
            max_steps=1,
            task="dpo",
            model_path=str(model_dir),
            replay=(f"{dataset_dir}:0.1",),
        )
    short = prepare_dataset(
        PrepareDatasetArguments(
            documents_train_file=(documents_dir / "train.txt",),
            documents_valid_file=(documents_dir / "valid.txt",),
            tokenizer_path=str(dataset_dir / "tokenizer"),
            max_sample_length=32,
            datasets_root=tmp_path / "datasets",
            dataset_name="short",
        )
    )
    with pytest.raises(UsageError, match="--replay: a sample may have 64 tokens"):
        training(max_steps=1, dataset_dir=short, replay=(f"{dataset_dir}:0.1",))


def test_other_replayed_documents_are_refused_when_a_training_is_resumed(
    dataset_dir: Path, tmp_path: Path
) -> None:
    training = TrainingHere(dataset_dir, tmp_path)
    options: dict[str, Any] = {"max_steps": 3, "checkpoint_every_n_minutes": 0.0}
    replay = (f"{dataset_dir}:0.1",)
    training.crash(in_batch=2, replay=replay, **options)
    with pytest.raises(DatasetError, match="is not the dataset that"):
        training(replay=(f"{dataset_dir}:0.2",), resume="last", **options)
    moved = tmp_path / "moved"
    moved.symlink_to(open_dataset(dataset_dir).directory)
    training.to_the_end(replay=(f"{moved}:0.1",), resume="last", **options)
