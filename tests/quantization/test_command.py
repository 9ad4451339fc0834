"""`fst quantize`: a file in the model directory from which the same texts come, complete or absent."""

import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from full_stack_transformer.arguments.models import EvaluateArguments, QuantizeArguments
from full_stack_transformer.errors import FullStackTransformerError, ModelError
from full_stack_transformer.evaluation.run import measured
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.modelling.model_directory import open_model
from full_stack_transformer.modelling.pretrained import load_backbone
from full_stack_transformer.quantization.command import main as quantize
from full_stack_transformer.quantization.files import open_rounded, read_description
from tests.conftest import RunFst

PROMPT, GREEDY = "the man", {"temperature": 0.0, "max_new_tokens": 20}
NAME = "quantized_int4.safetensors"


pytestmark = pytest.mark.usefixtures("decoder")


@pytest.fixture
def directory(model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path / "model")


def _quantized(directory: Path, **options: Any) -> Path:
    return quantize(QuantizeArguments(model=directory, **options))


def _text(directory: Path, dtype: str = "int4") -> str:
    generator = TextGenerator.open(directory, device="cpu", weights_dtype=dtype)  # type: ignore[arg-type]
    return generator.generate(PROMPT, **GREEDY)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_file_gives_the_text_of_weights_rounded_at_the_start(
    directory: Path, dtype: Any, tmp_path: Path
) -> None:
    expected = _text(directory, dtype)
    path = _quantized(directory, dtype=dtype, method="nearest")
    assert path == directory / f"quantized_{dtype}.safetensors"
    assert open_rounded(directory, dtype) is not None
    assert _text(directory, dtype) == expected
    # Without the full weights beside it, too.
    target = _quantized(directory, dtype=dtype, method="nearest", output=tmp_path / "small")
    assert not (target / "model.safetensors").exists()
    assert _text(target, dtype) == _text(target, "auto") == expected
    with pytest.raises(ModelError, match=f"only, .* with --weights_dtype {dtype}"):
        open_model(target, weights_dtype="bfloat16")
    with pytest.raises(ModelError, match="holds rounded weights only"):
        load_backbone(str(target), dtype=torch.float32)


def test_a_calibration_is_reported_and_described(
    directory: Path, dataset_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        path = _quantized(directory, calibration=dataset_dir, num_calibration_tokens=4096)
    assert "layer 2 of 2: outputs changed by" in caplog.text
    assert "other tokens" in caplog.text
    assert "MB in place of" in caplog.text
    description = read_description(path)
    assert description["method"] == "gptq"
    assert description["group_size"] == 32
    assert description["perplexity_after"] == pytest.approx(
        description["perplexity_before"], rel=0.1
    )
    assert 2048 <= description["calibration"]["num_tokens"] <= 4096
    assert set(description["source"]) == {"model.safetensors"}
    assert _text(directory)
    assert path.stat().st_mode & 0o777 == (directory / "config.json").stat().st_mode & 0o777


def test_the_calibrated_weights_are_those_that_are_served(
    directory: Path, dataset_dir: Path, run_fst: RunFst
) -> None:
    _quantized(directory, calibration=dataset_dir, num_calibration_tokens=2048)
    words = ("--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "20")
    done = run_fst("generate", directory, *words, "--weights_dtype", "int4")
    assert done.returncode == 0, done.stderr
    assert "rounding to the nearest" not in done.stderr
    assert done.stdout.rstrip("\n") == PROMPT + _text(directory)
    before = EvaluateArguments(model=directory, dataset_dir=dataset_dir, weights_dtype="int4")
    losses = [measured(before)["rounded_weights"]["loss"]]
    (directory / NAME).unlink()
    losses.append(measured(before)["rounded_weights"]["loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.1)


def test_other_weights_are_noticed(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _quantized(directory, method="nearest")
    weights = directory / "model.safetensors"
    shutil.copy(weights, directory / "copy")
    (directory / "copy").replace(weights)  # another time, the same content
    assert open_rounded(directory, "int4") is not None
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert open_rounded(directory, "int4") is None
    assert f"{path} was made from other weights" in caplog.text
    _quantized(directory, method="nearest")
    assert open_rounded(directory, "int4") is not None


KILLED = """
import os, signal, sys
from pathlib import Path
from full_stack_transformer.arguments.models import QuantizeArguments
from full_stack_transformer.quantization import command
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
Path.replace = die
command.main(QuantizeArguments(model=Path(sys.argv[1]), method="nearest"))
"""


def test_a_kill_leaves_the_directory_good(directory: Path) -> None:
    """Just before the complete file gets its name."""
    done = subprocess.run([sys.executable, "-c", KILLED, directory], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (directory / NAME).exists()
    assert open_rounded(directory, "int4") is None
    assert _text(directory)
    _quantized(directory, method="nearest")
    assert open_rounded(directory, "int4") is not None
    assert not list(directory.glob(".*partial"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "does not say what it was trained on, or that is gone; pass --calibration"),
        ({"calibration": "short.txt"}, "tokens to calibrate on; at least 2,048 are needed"),
        ({"calibration": "latin.txt"}, "latin.txt is not UTF-8 (byte 3)"),
        ({"method": "nearest", "output": "there"}, "there exists; name a directory that does not"),
    ],
    ids=["no text", "short", "not UTF-8", "output"],
)
def test_a_mistake_is_one_sentence(
    directory: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "short.txt").write_text("a short text")
    (tmp_path / "latin.txt").write_bytes("Großes".encode("latin-1"))
    (tmp_path / "there").mkdir()
    options = {
        name: tmp_path / value if name in ("calibration", "output") else value
        for name, value in options.items()
    }
    with pytest.raises(FullStackTransformerError) as caught:
        _quantized(directory, **options)
    assert message in str(caught.value)
    assert not list(directory.glob("*quantized*"))


def test_a_second_time_is_refused(directory: Path) -> None:
    _quantized(directory, method="nearest")
    with pytest.raises(FullStackTransformerError, match="exists already; remove it"):
        _quantized(directory, method="nearest")


def test_a_damaged_file_is_named(directory: Path) -> None:
    path = _quantized(directory, method="nearest")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="is damaged, or was not written by fst quantize"):
        open_rounded(directory, "int4")


def test_a_model_that_the_decoder_cannot_run_is_refused(directory: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(directory)
    other = transformers.BloomConfig(
        vocab_size=config.vocab_size, hidden_size=64, n_layer=1, n_head=2
    )
    torch.manual_seed(0)
    transformers.BloomForCausalLM(other).save_pretrained(directory)
    with pytest.raises(ModelError, match="int4 weights are for the C\\+\\+ decoder, which cannot"):
        _quantized(directory, method="nearest")
