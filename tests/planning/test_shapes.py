"""Sizes of models, against the real ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.modelling.acceleration import flops_per_token
from full_stack_transformer.modelling.backbones import DECODER_PRESETS, new_backbone, num_parameters
from full_stack_transformer.planning.shapes import Shape, shape_of_option, shape_of_size


def _real(option: str, vocab_size: int, max_length: int) -> Any:
    with torch.device("meta"):
        return new_backbone(
            option,
            vocab_size=vocab_size,
            max_length=max_length,
            special_token_ids={"begin": 0, "end": 1, "pad": 2},
        )


@pytest.mark.parametrize("name", [*DECODER_PRESETS, "gpt2"])
def test_a_preset_has_the_weights_and_flops_of_the_real_model(name: str) -> None:
    shape = shape_of_option(name, 4096, 256)
    backbone = _real(name, 4096, 256)
    assert shape.num_parameters == pytest.approx(num_parameters(backbone), rel=0.01)
    assert shape.flops_per_token(100) == flops_per_token(backbone, 100)


@pytest.mark.parametrize("size", [2e5, 2e6, 3e7, 1.2e8, 1.3e9, 7e9, 7e10, 4e11])
def test_a_size_becomes_a_model_of_that_size(size: float, tmp_path: Path) -> None:
    shape = shape_of_size(size, 1024 if size < 1e6 else 4096, takes_preset=False)
    assert shape.num_parameters == pytest.approx(size, rel=0.1)
    assert 16 <= shape.hidden_size / shape.num_layers <= 300
    if size < 1e10:  # transformers takes long to build many layers
        (tmp_path / "model.json").write_text(json.dumps(shape.config()))
        backbone = _real(str(tmp_path / "model.json"), shape.vocab_size, 64)
        assert shape.num_parameters == pytest.approx(num_parameters(backbone), rel=0.01)
        assert shape.flops_per_token(64) == flops_per_token(backbone, 64)


def test_a_preset_is_taken_where_it_fits() -> None:
    assert shape_of_size(2.5e6, 4096).option == "mini"
    assert shape_of_size(2e6, 4096).option == ""


def test_a_file_gives_the_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    wanted = shape_of_size(1.3e9, 4096)
    path.write_text(json.dumps(wanted.config()))
    found = shape_of_option(str(path), 4096, 64)
    assert isinstance(found, Shape)
    assert found.num_parameters == wanted.num_parameters
    path.write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(ModelError, match=r"num_hidden_layers.* is missing; or pass --parameters"):
        shape_of_option(str(path), 4096, 64)
    with pytest.raises(UsageError, match="or a JSON file; found 'huge'"):
        shape_of_option("huge", 4096, 64)


def test_a_vocabulary_may_be_too_large_for_a_model() -> None:
    with pytest.raises(UsageError, match="too few for a vocabulary of 65,536 tokens"):
        shape_of_size(1e5, 65_536)
