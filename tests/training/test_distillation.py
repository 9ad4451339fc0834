"""Learning from a teacher: the loss written out, whom it takes, and the same bits after a crash."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.tasks.distillation import divergence_sum
from full_stack_transformer.training.setup import open_setup
from tests.training.small_conversations import write_conversations
from tests.training.test_resume import _assert_equal
from tests.training.training_here import TrainingHere, checkpoint_of


@pytest.fixture(scope="module")
def teacher_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights, and a vocabulary that is filled up."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.resize_token_embeddings(320)
    directory = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_dir / name, directory / name)
    return directory


@pytest.mark.parametrize("kind", ["documents", "conversations"])
def test_the_loss_is_the_formula(
    kind: str, dataset_dir: Path, model_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    data = dataset_dir
    if kind == "conversations":
        data = write_conversations(tmp_path / "talks" / "0", model_dir)
    arguments = TrainArguments(
        dataset_dir=data,
        model_path=str(model_dir),
        teacher=str(teacher_dir),
        teacher_weight=0.25,
        teacher_temperature=2.0,
    )
    setup = open_setup(arguments)
    assert setup.arguments.task == "distillation"
    setup.begin(None)
    module = setup.make_module(setup.make_backbone(), setup.arguments)
    batch = next(iter(setup.data.train_dataloader()))
    labels = batch["labels"][:, 1:]
    chosen = labels != -100
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(directory)(batch["input_ids"]).logits[:, :-1][chosen]
        for directory in (model_dir, teacher_dir)
    )
    theirs = theirs[:, : ours.shape[1]]
    entropy = cross_entropy(ours, labels[chosen])
    divergence = kl_div(
        log_softmax(ours / 2, -1),
        log_softmax(theirs / 2, -1),
        log_target=True,
        reduction="batchmean",
    )
    loss, shown = module.mean_losses(batch)
    assert next(iter(shown.values())).item() == pytest.approx(entropy.item(), abs=1e-5)
    expected = 0.75 * entropy + 0.25 * 4 * divergence
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_divergence_in_parts_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, teacher = torch.randn(2, 1, 9, 7, generator=torch.Generator().manual_seed(0))
    whole = divergence_sum(logits, teacher, 1.0)
    monkeypatch.setattr("full_stack_transformer.tasks.distillation._NUMBERS_AT_ONCE", 14)
    torch.testing.assert_close(divergence_sum(logits, teacher, 1.0), whole)
    assert divergence_sum(logits, logits, 3.0).item() == pytest.approx(0.0, abs=1e-6)


def test_a_student_comes_nearer_and_a_crash_leaves_no_trace(
    dataset_dir: Path, model_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "model_path": str(model_dir),
        "teacher": str(teacher_dir),
        "max_steps": 4,
        "checkpoint_every_n_minutes": 0.0,
    }
    training = TrainingHere(dataset_dir, tmp_path)
    whole = training.to_the_end(**options, experiment_name="whole")
    training.crash(in_batch=2, **options, experiment_name="crashed")
    crashed = training.to_the_end(**options, resume="last", experiment_name="crashed")
    _assert_equal(checkpoint_of(whole), checkpoint_of(crashed))
    assert (whole / "model" / "model.safetensors").is_file()


def test_a_teacher_with_another_tokenizer_is_refused(
    dataset_dir: Path, model_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher_dir, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace('"!"', '"!!"'), encoding="utf-8")
    training = TrainingHere(dataset_dir, tmp_path)
    with pytest.raises(ModelError, match="has another tokenizer"):
        training(model_path=str(model_dir), teacher=str(other), max_steps=1)
    with pytest.raises(UsageError, match="--task distillation needs --teacher"):
        training(model_path=str(model_dir), task="distillation", max_steps=1)
    with pytest.raises(UsageError, match="--teacher is for --task distillation, not for"):
        training(model_path=str(model_dir), task="masked_lm", teacher=str(other), max_steps=1)
