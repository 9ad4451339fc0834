"""Fine-tuning on conversations: transformers' loss, the same bits after a crash, and what is said first."""

import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from full_stack_transformer.arguments.fine_tuning import AdapterOptions
from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.corpus import open_dataset
from full_stack_transformer.errors import DatasetError, UsageError
from full_stack_transformer.evaluation.run import measured
from full_stack_transformer.modelling.adapters import add_adapter
from full_stack_transformer.modelling.targets import is_predicting, logits_where
from full_stack_transformer.tasks.opening import task_class_of
from full_stack_transformer.training.module import TrainingModule
from full_stack_transformer.training.setup import open_setup
from tests.generation.small_models import varied_backbone
from tests.training.small_conversations import write_conversations
from tests.training.test_resume import _assert_equal
from tests.training.training_here import TrainingHere, checkpoint_of

_TASK = {"task": "supervised_fine_tuning"}


@pytest.fixture(scope="module")
def conversations(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("datasets") / "talks" / "0", model_dir)


def _module(conversations: Path, model_dir: Path, **options: Any) -> tuple[TrainingModule, Any]:
    """The training step, and the batches."""
    arguments = TrainArguments(
        **{"dataset_dir": conversations, "model_path": str(model_dir), **_TASK, **options}
    )
    setup = open_setup(arguments)
    setup.begin(None)
    module = setup.make_module(setup.make_backbone(), setup.arguments)
    return module, setup.data


@pytest.mark.parametrize("train_on", ["answers", "all"])
@pytest.mark.parametrize("batching", ["length", "packed"])
def test_the_first_loss_is_that_of_transformers(
    train_on: str, batching: str, conversations: Path, model_dir: Path
) -> None:
    """Conversation by conversation, without padding, with the labels written out."""
    module, data = _module(
        conversations, model_dir, train_on=train_on, batching=batching, batch_size=8
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    corpus = open_dataset(conversations).train
    assert corpus.learned is not None
    total, num_targets = 0.0, 0
    for index in range(len(corpus)):
        (start,), (length,) = corpus.spans(np.array([index]))
        ids = torch.from_numpy(corpus[index])[None]
        labels = ids.clone()
        if train_on == "answers":
            mask = torch.from_numpy(corpus.learned[start : start + length].astype(bool))
            labels[0, ~mask] = -100
        num = int((labels[0, 1:] != -100).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * num
        num_targets += num
    ours = 0.0
    found_targets = found_tokens = 0.0
    for position, batch in enumerate(data.train_dataloader()):
        if position == data.num_batches_per_epoch:
            break
        assert module.task.options.train_on == train_on
        loss, _ = module.mean_losses(batch)
        ours += loss.item() * float(batch["num_targets"])
        found_targets += float(batch["num_targets"])
        found_tokens += float(batch["num_tokens"])
    assert (found_targets, found_tokens) == (num_targets, corpus.num_tokens)
    assert ours / num_targets == pytest.approx(total / num_targets, abs=1e-5)


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_that_of_trl(conversations: Path, model_dir: Path, tmp_path: Path) -> None:
    from tests.training.trl_losses import trl_loss

    module, data = _module(conversations, model_dir, batch_size=8)
    batch = next(iter(data.train_dataloader()))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    expected = trl_loss("answers", model, None, batch, model_dir, tmp_path)
    assert module.mean_losses(batch)[0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("gpt2", {}),
    ],
)
def test_the_output_layer_at_some_positions_gives_their_logits(
    family: str, extra: dict[str, float]
) -> None:
    """Also where a model scales its logits; and their gradient is that of all logits."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    sizes["num_key_value_heads"] = 2
    backbone = varied_backbone(transformers.AutoConfig.for_model(family, **sizes, **extra))
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    chosen = is_predicting(labels)
    some = logits_where(backbone, chosen, input_ids=ids)
    every = backbone(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(some[0], every[chosen])
    weight = backbone.get_input_embeddings().weight
    (left,) = torch.autograd.grad(some.square().sum(), weight)
    (right,) = torch.autograd.grad(every[chosen].square().sum(), weight)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["full, packed", "an adapter, with noise"])
def test_a_crash_leaves_no_trace(
    kind: str, conversations: Path, model_dir: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "model_path": str(model_dir),
        "max_steps": 6,
        "val_check_interval": 3.0,
        "checkpoint_every_n_minutes": 0.0,
        **_TASK,
        **({"batching": "packed"} if "packed" in kind else {"lora_rank": 2, "neftune_alpha": 5.0}),
    }
    training = TrainingHere(conversations, tmp_path)
    whole = training.to_the_end(**options, experiment_name="whole")
    training.crash(in_batch=1, **options, experiment_name="crashed")
    training.crash(in_validation=3, **options, resume="last", experiment_name="crashed")
    crashed = training.to_the_end(**options, resume="last", experiment_name="crashed")
    _assert_equal(checkpoint_of(whole), checkpoint_of(crashed))
    name = (
        "adapter/adapter_model.safetensors" if "lora_rank" in options else "model/model.safetensors"
    )
    assert (whole / name).read_bytes() == (crashed / name).read_bytes()
    if "lora_rank" not in options:
        assert task_class_of(whole / "model").name == "causal_lm"


def test_noise_is_added_in_training_alone(conversations: Path, model_dir: Path) -> None:
    module, _ = _module(conversations, model_dir, neftune_alpha=5.0)
    table = module.backbone.get_input_embeddings()
    ids = torch.arange(3, 19).view(2, 8)
    noise = table(ids) - table.weight[ids]
    limit = 5 / (8 * table.weight.shape[1]) ** 0.5
    assert 0.9 * limit < noise.abs().max().item() <= limit
    module.eval()
    assert torch.equal(table(ids), table.weight[ids])


@pytest.mark.parametrize(
    ("options", "rate", "epochs"),
    [
        ({}, 2e-5, 3),
        ({"task": "causal_lm"}, 2e-5, 3),
        ({"lora_rank": 4}, 2e-4, 3),
        ({"learning_rate": 1e-4, "max_epochs": 2}, 1e-4, 2),
        ({"max_steps": 7}, 2e-5, -1),
    ],
    ids=["full", "by the kind of the dataset", "an adapter", "chosen", "steps"],
)
def test_the_defaults_of_a_method_are_said(
    options: dict[str, Any],
    rate: float,
    epochs: int,
    conversations: Path,
    model_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        setup = open_setup(
            TrainArguments(
                **{"dataset_dir": conversations, "model_path": str(model_dir), **_TASK, **options}
            )
        )
    assert (setup.arguments.learning_rate, setup.arguments.max_epochs) == (rate, epochs)
    said = f"--learning_rate {rate}" in caplog.text and "defaults of --task" in caplog.text
    assert said == ("learning_rate" not in options)


def test_a_dataset_of_another_kind_names_its_task(
    conversations: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=r"holds conversations, .*--task supervised_fine_tuning"):
        TrainingHere(conversations, tmp_path)(max_steps=1, task="orpo")
    with pytest.raises(DatasetError, match=r"holds documents, .*pass --task causal_lm"):
        TrainingHere(dataset_dir, tmp_path)(max_steps=1, **_TASK)


def test_what_does_not_fit_is_said(
    conversations: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        _, data = _module(conversations, model_dir, max_length=30)
        assert data.num_batches_per_epoch > 0
        assert data.num_batches_per_epoch > 0
    assert caplog.text.count("train: ") == 1
    assert "answers" in caplog.text
    assert "do not fit" in caplog.text


def test_conversations_longer_than_the_context_are_refused(
    model_dir: Path, conversations: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.config.max_position_embeddings = 16
    shutil.copytree(model_dir, tmp_path / "short")
    model.save_pretrained(tmp_path / "short")
    with pytest.raises(UsageError, match="pass --max_length 16"):
        _module(conversations, tmp_path / "short")
    _module(conversations, tmp_path / "short", max_length=16)


def test_a_model_is_measured_on_its_answers(conversations: Path, model_dir: Path) -> None:
    """fst evaluate takes the task of the dataset's kind."""
    found = measured(EvaluateArguments(model_dir, conversations, device="cpu"))
    module, data = _module(conversations, model_dir)
    module.eval()
    loss, num_targets = 0.0, 0.0
    for batch in data.val_dataloader():
        loss += module.mean_losses(batch)[0].item() * batch["num_targets"].item()
        num_targets += batch["num_targets"].item()
    assert found["num_targets"] == num_targets
    assert found["loss"] == pytest.approx(loss / num_targets, abs=1e-5)


def test_an_adapter_at_the_start_changes_no_loss(conversations: Path, model_dir: Path) -> None:
    module, data = _module(conversations, model_dir)
    batch = next(iter(data.train_dataloader()))
    before = module.mean_losses(batch)[0].item()
    add_adapter(module.backbone, AdapterOptions(lora_rank=4), base=str(model_dir))
    assert module.mean_losses(batch)[0].item() == pytest.approx(before, abs=1e-6)
