"""Training on preferences: the formulas written out, TRL's numbers, and the same bits after a crash."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoModelForCausalLM

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.evaluation.run import measured
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.module import TrainingModule
from full_stack_transformer.training.setup import open_setup
from tests.training.small_conversations import write_conversations
from tests.training.test_resume import _assert_equal
from tests.training.training_here import TrainingHere, checkpoint_of, curve_of

_DPO: dict[str, Any] = {"task": "dpo"}
_ORPO: dict[str, Any] = {"task": "orpo"}


@pytest.fixture(scope="module")
def preferences(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("datasets") / "choices" / "0"
    return write_conversations(directory, model_dir, kind="preferences")


@pytest.fixture(scope="module")
def other_model_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights: what the model of `model_dir` may have become."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("other")
    model.save_pretrained(directory)
    return directory


def _module(preferences: Path, model_dir: Path, **options: Any) -> tuple[TrainingModule, Batch]:
    """The training step, and a batch of 8 pairs."""
    arguments = TrainArguments(
        dataset_dir=preferences, model_path=str(model_dir), batch_size=8, **options
    )
    setup = open_setup(arguments)
    setup.begin(None)
    module = setup.make_module(setup.make_backbone(), setup.arguments)
    return module, next(iter(setup.data.train_dataloader()))


def _change(module: TrainingModule, other_model_dir: Path) -> Any:
    """Give the trained model other weights than the start; returns a plain one with those."""
    other = AutoModelForCausalLM.from_pretrained(other_model_dir)
    module.backbone.load_state_dict(other.state_dict())
    return other


@torch.no_grad()
def _log_likelihoods(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Written out: (rows,) sums over the labels, which are shifted here."""
    found = log_softmax(model(input_ids=ids).logits[:, :-1].double(), dim=-1)
    targets = labels[:, 1:]
    chosen = found.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
    return (chosen * (targets != -100)).sum(dim=1)


@pytest.mark.parametrize("reference", ["start", "none"])
def test_the_loss_of_direct_preferences_is_the_formula(
    reference: str, preferences: Path, model_dir: Path, other_model_dir: Path
) -> None:
    module, batch = _module(preferences, model_dir, **_DPO, reference=reference)
    ours = _change(module, other_model_dir)
    chosen, rejected = _log_likelihoods(ours, batch["input_ids"], batch["labels"]).view(2, -1)
    if reference == "start":
        start = AutoModelForCausalLM.from_pretrained(model_dir)
        start_chosen, start_rejected = _log_likelihoods(
            start, batch["input_ids"], batch["labels"]
        ).view(2, -1)
        chosen, rejected = chosen - start_chosen, rejected - start_rejected
    expected = -logsigmoid(0.1 * (chosen - rejected)).mean()
    assert batch["num_targets"] == 8
    assert module.mean_losses(batch)[0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_with_an_adapter_the_reference_is_its_base(preferences: Path, model_dir: Path) -> None:
    module, batch = _module(preferences, model_dir, **_DPO, lora_rank=4, lora_dropout=0.5)
    at_start = module.mean_losses(batch)[0]
    assert at_start.item() == pytest.approx(0.693147, abs=1e-5)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    module.eval()
    start = AutoModelForCausalLM.from_pretrained(model_dir)
    scores = module.task.forward(module.backbone, batch)
    expected = _log_likelihoods(start, batch["input_ids"], batch["labels"]).view(2, -1).T
    torch.testing.assert_close(scores[:, 2:].double(), expected, atol=1e-4, rtol=1e-5)
    assert (scores[:, :2] - scores[:, 2:]).abs().max() > 0.1
    module.train()
    module.mean_losses(batch)[0].backward()  # type: ignore[no-untyped-call]
    assert all(one.grad is not None for one in module.parameters() if one.requires_grad)


@pytest.mark.parametrize("train_on", ["answers", "all"])
def test_the_loss_of_odds_ratios_is_the_formula(
    train_on: str, preferences: Path, model_dir: Path
) -> None:
    module, batch = _module(preferences, model_dir, **_ORPO, train_on=train_on)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids, labels = batch["input_ids"], batch["labels"]
    learned = batch["all_labels"] if train_on == "all" else labels
    found = _log_likelihoods(model, ids, labels)
    means = found / (labels[:, 1:] != -100).sum(dim=1)
    odds = torch.log(means.exp() / (1 - means.exp()))
    nll = -_log_likelihoods(model, ids[:8], learned[:8]).sum() / (learned[:8, 1:] != -100).sum()
    expected = nll - 0.1 * logsigmoid(odds[:8] - odds[8:]).mean()
    assert module.mean_losses(batch)[0].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.parametrize("method", ["dpo", "orpo"])
@pytest.mark.filterwarnings("ignore")
def test_the_losses_are_those_of_trl(
    method: str, preferences: Path, model_dir: Path, other_model_dir: Path, tmp_path: Path
) -> None:
    from tests.training.trl_losses import trl_loss

    module, batch = _module(preferences, model_dir, task=method, train_on="all")
    ours = _change(module, other_model_dir)
    expected = trl_loss(
        method, ours, AutoModelForCausalLM.from_pretrained(model_dir), batch, model_dir, tmp_path
    )
    assert module.mean_losses(batch)[0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "dpo, an adapter", "orpo"])
def test_a_crash_leaves_no_trace(
    kind: str, preferences: Path, model_dir: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "task": kind.partition(",")[0],
        "model_path": str(model_dir),
        "max_steps": 5,
        "val_check_interval": 3.0,
        "checkpoint_every_n_minutes": 0.0,
        "learning_rate": 1e-3,
        "metric_for_best_model": "accuracy",
        **({"lora_rank": 2, "lora_dropout": 0.2} if "adapter" in kind else {}),
    }
    training = TrainingHere(preferences, tmp_path)
    whole = training.to_the_end(**options, experiment_name="whole")
    training.crash(in_batch=1, **options, experiment_name="crashed")
    training.crash(in_validation=3, **options, resume="last", experiment_name="crashed")
    crashed = training.to_the_end(**options, resume="last", experiment_name="crashed")
    _assert_equal(checkpoint_of(whole), checkpoint_of(crashed))


def test_preferences_are_learned_and_measured(
    preferences: Path, model_dir: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"model_path": str(model_dir), "max_steps": 30, **_DPO}
    experiment = TrainingHere(preferences, tmp_path).to_the_end(learning_rate=3e-3, **options)
    losses = [loss for _, loss in curve_of(experiment, metric_names.TRAIN_LOSS)]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    found = measured(EvaluateArguments(experiment, preferences, device="cpu"))
    assert found["num_targets"] == 8
    assert 0 <= found["accuracy"] <= 1
