"""Names that users of other trainers type: each leads to an option that exists."""

import dataclasses
import re

import pytest

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.arguments.familiar_options import INSTEAD, SAME, translate
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.errors import UsageError

_OURS = {field.name for field in dataclasses.fields(TrainArguments)}


def test_every_name_leads_to_an_option_that_exists() -> None:
    assert set(SAME.values()) <= _OURS
    prepare = {field.name for field in dataclasses.fields(PrepareDatasetArguments)}
    for answer in INSTEAD.values():
        for name in re.findall(r"--(?:no_)?(\w+)", answer):
            elsewhere = {"max_sample_length"} & prepare | {"repo", "revision"}
            assert name in _OURS | elsewhere, answer


def test_no_name_of_ours_is_taken() -> None:
    assert not (SAME.keys() | INSTEAD.keys()) & _OURS


def test_names_are_translated_in_every_spelling() -> None:
    words = ["train", "--model-name-or-path=x", "--num_train_epochs", "3", "--do_train"]
    assert translate(words) == ["train", "--model_path=x", "--max_epochs", "3", "--do_train"]
    assert translate(["--gpus=1", "--seed", "1"]) == [
        *("--accelerator", "gpu", "--devices", "1", "--seed", "1")
    ]
    assert translate(["--gpus", "0"]) == ["--accelerator", "cpu"]
    assert translate(["--gpus", "-1"])[-1] == "auto"


@pytest.mark.parametrize("name", INSTEAD)
def test_what_is_gone_says_what_to_type(name: str) -> None:
    with pytest.raises(UsageError, match=re.escape(INSTEAD[name])):
        translate(["train", f"--{name}", "1"])
