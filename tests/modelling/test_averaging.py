"""The mean of models is the mean of their weights, in a directory that opens like any other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from full_stack_transformer import command_line
from full_stack_transformer.arguments.models import AverageCheckpointsArguments
from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.modelling.averaging import main as average_checkpoints
from full_stack_transformer.modelling.model_directory import open_model


def _average(*models: Path, output_dir: Path) -> Path:
    return average_checkpoints(AverageCheckpointsArguments(models=models, output_dir=output_dir))


@pytest.fixture
def others(model_dir: Path, tmp_path: Path) -> list[Path]:
    """Two models of the same shape with other weights."""
    paths = []
    for seed in (1, 2):
        path = tmp_path / f"model-{seed}"
        shutil.copytree(model_dir, path)
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: weight + torch.randn(weight.shape, generator=generator)
            for name, weight in _weights(model_dir).items()
        }
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "description.json").write_text(
            json.dumps({"step": 10 * seed, "validation_loss": 4.0 - seed, "dataset": {"a": 1}})
        )
        paths.append(path)
    return paths


def _weights(directory: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(directory / "model.safetensors")
    return weights


def test_each_weight_is_the_mean(model_dir: Path, others: list[Path], tmp_path: Path) -> None:
    target = _average(model_dir, *others, output_dir=tmp_path / "new" / "mean")
    sources = [_weights(path) for path in (model_dir, *others)]
    found = _weights(target)
    assert found.keys() == sources[0].keys()
    for name, weight in found.items():
        expected = torch.stack([source[name] for source in sources]).mean(dim=0)
        torch.testing.assert_close(weight, expected)


def test_the_mean_of_equal_models_is_that_model(model_dir: Path, tmp_path: Path) -> None:
    target = _average(model_dir, model_dir, model_dir, output_dir=tmp_path / "mean")
    expected = _weights(model_dir)
    for name, weight in _weights(target).items():
        assert torch.equal(weight, expected[name]), name


def test_the_mean_opens_like_any_model(others: list[Path], tmp_path: Path) -> None:
    target = _average(*others, output_dir=tmp_path / "mean")
    assert {path.name for path in target.iterdir()} == {
        path.name for path in others[0].iterdir()
    } | {"README.md"}
    model = open_model(target, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target)
    ids = torch.tensor([model.tokenizer.encode_prompt("The reader")])
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, model.backbone(ids).logits)
    assert not list(tmp_path.glob(".*"))


def test_its_description_names_the_sources(others: list[Path], tmp_path: Path) -> None:
    target = _average(*others, output_dir=tmp_path / "mean")
    description = json.loads((target / "description.json").read_text())
    assert description["averaged_from"] == [
        {"model": "model-1", "step": 10, "validation_loss": 3.0},
        {"model": "model-2", "step": 20, "validation_loss": 2.0},
    ]
    assert description["dataset"] == {"a": 1}
    assert "| model-2 | 20 | 2.0000 |" in (target / "README.md").read_text(encoding="utf-8")


def test_checkpoints_of_an_experiment_are_averaged(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tmp_path / "books" / "3"
    shutil.copytree(model_dir, experiment / "model")
    (experiment / "checkpoints").mkdir()
    backbone = open_model(model_dir, device="cpu").backbone
    state = {f"backbone.{name}": weight for name, weight in backbone.state_dict().items()}
    for step, name in ((1, "best"), (3, "last")):
        content = {
            "state_dict": {key: weight * step for key, weight in state.items()},
            "global_step": step,
        }
        torch.save(content, experiment / "checkpoints" / f"{name}.ckpt")
    best, last = (experiment / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    target = tmp_path / "mean"
    words = ["average_checkpoints", str(best), str(last), "--output_dir", str(target)]
    assert command_line.run(words) == 0
    assert capsys.readouterr().out == f"{target}\n"
    description = json.loads((target / "description.json").read_text())
    assert description["averaged_from"] == [
        {"model": "books/3/best.ckpt", "step": 1},
        {"model": "books/3/last.ckpt", "step": 3},
    ]
    expected = _weights(model_dir)
    for key, weight in _weights(target).items():
        torch.testing.assert_close(weight, 2 * expected[key])


def test_another_shape_is_refused(model_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(ModelError, match=r"other has rms_norm_eps 1e-05, .* has 1e-06"):
        _average(model_dir, other, output_dir=tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_another_tokenizer_is_refused(model_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    Tokenizer.from_str(json.dumps(content)).save(str(other / "tokenizer.json"))
    with pytest.raises(ModelError, match="other has another tokenizer"):
        _average(model_dir, other, output_dir=tmp_path / "mean")


def test_what_is_there_is_never_overwritten(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--output_dir .* exists"):
        _average(model_dir, model_dir, output_dir=tmp_path)


def test_one_model_has_no_average(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--models must name at least two models, found 1"):
        _average(model_dir, output_dir=tmp_path / "mean")
