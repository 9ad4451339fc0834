"""Exports that are directories: for transformers, and for ONNX Runtime."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from full_stack_transformer.arguments.exporting import ExportArguments
from full_stack_transformer.errors import UsageError
from full_stack_transformer.exporting.command import main
from tests.exporting.small_exports import make_model


def test_a_directory_for_transformers_is_the_same_model(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "llama")
    output = main(
        ExportArguments(
            model,
            format="huggingface",
            output=tmp_path / "out" / "exported",
            dtype="float16",
            num_check_texts=500,
            num_check_prompts=3,
        )
    )
    weights = load_file(output / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    expected = load_file(model / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name].half()) for name in expected)
    assert (output / "chat_template.jinja").is_file()
    assert [*output.parent.iterdir()] == [output]


def test_a_model_trained_here_is_checked_by_transformers(model_dir: Path, tmp_path: Path) -> None:
    output = main(
        ExportArguments(
            model_dir,
            format="huggingface",
            output=tmp_path / "exported",
            num_check_texts=500,
            num_check_prompts=3,
        )
    )
    ids = torch.tensor([[0, 50, 60]])
    ours = AutoModelForCausalLM.from_pretrained(model_dir)(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(output)(ids).logits, ours)


def test_a_checkpoint_is_refused(model_dir: Path, tmp_path: Path) -> None:
    options = ExportArguments(
        model_dir / "x.ckpt", format="huggingface", output=tmp_path / "exported"
    )
    with pytest.raises(UsageError, match="is a checkpoint"):
        main(options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_computes_the_same(model_dir: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    output = main(
        ExportArguments(
            model_dir, format="onnx", output=tmp_path / "exported", num_check_prompts=10
        )
    )
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {
        file.name for file in output.iterdir()
    }
