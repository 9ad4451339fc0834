"""The model directory holds the best model, opens in plain transformers, and says where it comes from."""

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.errors import MachineError
from full_stack_transformer.modelling.model_directory import open_model
from full_stack_transformer.tasks.causal_lm import CausalLm, CausalLmOptions
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks.export import ExportModel
from full_stack_transformer.training.module import ValidationMetrics
from tests.training.small_training import SmallTraining


def _export(dataset: DatasetDirectory, directory: Path) -> ExportModel:
    return ExportModel(
        directory / "model",
        task=CausalLm(None, CausalLmOptions()),
        tokenizer_directory=dataset.tokenizer_directory,
        experiment="tiny/0",
        dataset_description=dataset.description,
        arguments={"learning_rate": 5e-3},
    )


def _fit(training: SmallTraining, export: ExportModel, losses: list[float]) -> None:
    """Train with validations that find `losses`."""
    task = training.task

    def log() -> None:
        task.log(metric_names.VALID_LOSS, torch.tensor(losses.pop(0)), logger=False)

    with mock.patch.object(task, "on_validation_epoch_end", log):
        training.fit(export)
    assert not losses


def _description(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "model/description.json").read_text())
    return content


def test_plain_transformers_opens_it_to_equal_logits(
    dataset: DatasetDirectory, tmp_path: Path
) -> None:
    training = SmallTraining(dataset, tmp_path, max_steps=3)
    training.fit(_export(dataset, tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.from_numpy(dataset.valid[0])[None]
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, training.backbone.eval()(ids).logits)
    description = _description(tmp_path)
    assert description["step"] == 3
    assert description["experiment"] == "tiny/0"
    assert description["dataset"] == dataset.description
    assert description["num_parameters"] == sum(p.numel() for p in training.backbone.parameters())
    assert description["context_length"] == 64
    loss = description["validation_loss"]
    assert description["validation_perplexity"] == pytest.approx(math.exp(loss))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "tiny/0" in card
    assert f"{loss:.4f}" in card


def test_the_config_does_not_say_how_attention_was_computed(
    dataset: DatasetDirectory, tmp_path: Path
) -> None:
    configs = []
    for attention in ("eager", "sdpa"):
        training = SmallTraining(dataset, tmp_path / attention, max_steps=1)
        training.backbone.set_attn_implementation(attention)
        training.fit(_export(dataset, tmp_path / attention))
        configs.append((tmp_path / attention / "model" / "config.json").read_text())
    assert configs[0] == configs[1]
    assert "eager" not in configs[0]


def test_only_an_improvement_is_exported(dataset: DatasetDirectory, tmp_path: Path) -> None:
    export = _export(dataset, tmp_path)
    losses = [3.0, math.nan, 2.5, math.inf, 2.5, 4.0]
    training = SmallTraining(dataset, tmp_path, max_steps=12, val_check_interval=2)
    _fit(training, export, losses)
    assert [step for step, _ in export.curve] == [2, 4, 6, 8, 10, 12]
    assert export.best is not None
    assert (export.best.step, export.best.loss) == (6, 2.5)
    assert _description(tmp_path)["step"] == 6


def test_nothing_but_nan_exports_nothing(dataset: DatasetDirectory, tmp_path: Path) -> None:
    export = _export(dataset, tmp_path)
    _fit(SmallTraining(dataset, tmp_path, max_steps=1), export, [math.nan])
    assert export.best is None
    assert not (tmp_path / "model").exists()


def test_a_resumed_training_knows_the_best(dataset: DatasetDirectory, tmp_path: Path) -> None:
    export = _export(dataset, tmp_path)
    export.best = ValidationMetrics(
        step=7, loss=2.5, metrics={"perplexity": 12.2, "bits_per_byte": 1.5}
    )
    export.curve = [(3, 3.5), (7, 2.5)]
    # As a checkpoint brings it back: plain values alone.
    torch.save(export.state_dict(), tmp_path / "state")
    again = _export(dataset, tmp_path)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert (again.best, again.curve) == (export.best, export.curve)
    _fit(SmallTraining(dataset, tmp_path, max_steps=1), again, [2.6])
    assert again.best is not None
    assert again.best.step == 7
    assert not (tmp_path / "model").exists()
    empty = _export(dataset, tmp_path)
    empty.load_state_dict(empty.state_dict())
    assert (empty.best, empty.curve) == (None, [])


@pytest.mark.parametrize(
    "where", ["transformers.modeling_utils.safe_save_file", "shutil.copyfile", "os.fsync"]
)
def test_a_full_disk_keeps_the_previous_model(
    where: str, dataset: DatasetDirectory, tmp_path: Path
) -> None:
    SmallTraining(dataset, tmp_path, max_steps=1).fit(_export(dataset, tmp_path))
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    full = OSError(28, "No space left on device")
    with (
        mock.patch(where, side_effect=full),
        pytest.raises(MachineError, match=r"the disk is full.*previous one is intact"),
    ):
        SmallTraining(dataset, tmp_path, max_steps=1, seed=1).fit(_export(dataset, tmp_path))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert open_model(tmp_path / "model", device="cpu").description["step"] == 1
    assert not list(tmp_path.glob(".model*"))
