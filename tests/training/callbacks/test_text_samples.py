"""Text samples are written at each validation, follow their file, and disturb nothing."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from full_stack_transformer.arguments.sampling import as_keywords
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.errors import InputError
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.storage import write_json
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer
from full_stack_transformer.training.callbacks.text_samples import (
    GENERATED_FILE_NAME,
    PARAMETERS_FILE_NAME,
    Sample,
    SampleParameters,
    SampleTexts,
    as_markdown,
    drop_lines_after,
    evaluating,
    read_parameters,
    write_parameters,
)
from tests.training.small_training import SmallTraining

_SAMPLING = replace(SampleParameters().sampling, max_new_tokens=6, seed=5)
_FEW = SampleParameters(prompts=("The", ""), num_samples=2, sampling=_SAMPLING)


def _lines(directory: Path) -> list[dict[str, Any]]:
    text = (directory / GENERATED_FILE_NAME).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _samples(
    dataset: DatasetDirectory, directory: Path, parameters: SampleParameters
) -> SampleTexts:
    return SampleTexts(directory, open_saved_tokenizer(dataset.tokenizer_directory), parameters)


def test_each_validation_writes_what_the_generator_gives(
    dataset: DatasetDirectory, tmp_path: Path
) -> None:
    training = SmallTraining(dataset, tmp_path, max_steps=4, val_check_interval=2)
    training.fit(_samples(dataset, tmp_path, _FEW))
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == [2, 2, 2, 2, 4, 4, 4, 4]
    assert [line["seed"] for line in lines[:4]] == [5, 6, 5, 6]
    assert [line["parameters"]["prompt"] for line in lines[:4]] == ["The", "The", "", ""]
    # The weights of the end are those of the last validation: the plain way gives the same texts.
    generator = TextGenerator(training.opened_model())
    for first, prompt in ((4, "The"), (6, "")):
        texts = generator.generate(prompt, num_return_sequences=2, **as_keywords(_SAMPLING))
        assert texts == [line["text"] for line in lines[first : first + 2]]


def test_samples_change_no_weight(dataset: DatasetDirectory, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 4,
        "val_check_interval": 2,
        "dropout": 0.3,
        "model_config": "gpt2-tiny",
    }
    alone = SmallTraining(dataset, tmp_path / "alone", **options)
    alone.fit()
    beside = SmallTraining(dataset, tmp_path / "beside", **options)
    beside.fit(_samples(dataset, tmp_path / "beside", _FEW))
    assert len(_lines(tmp_path / "beside")) == 8
    theirs = beside.backbone.state_dict()
    for name, weight in alone.backbone.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


def test_the_file_is_read_at_each_validation(dataset: DatasetDirectory, tmp_path: Path) -> None:
    """A person edits it while the training runs: here at each step."""
    write_parameters(tmp_path / PARAMETERS_FILE_NAME, _FEW)
    edits = {2: replace(_FEW, prompts=("Every",), num_samples=1), 4: replace(_FEW, num_samples=0)}

    def edit(step: int) -> None:
        if step in edits:
            write_parameters(tmp_path / PARAMETERS_FILE_NAME, edits[step])

    training = SmallTraining(dataset, tmp_path, max_steps=6, val_check_interval=2, at_step=edit)
    # A file that is there is kept: a training that is resumed finds the edited one.
    training.fit(_samples(dataset, tmp_path, SampleParameters()))
    assert [line["step"] for line in _lines(tmp_path)] == [2]
    assert _lines(tmp_path)[0]["parameters"]["prompt"] == "Every"


def test_a_broken_file_is_named_and_the_last_good_one_counts(
    dataset: DatasetDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = {
        2: '{"temperature": -1}',
        4: "{not JSON",
        6: '{"prompts": ["' + "long " * 90 + '"]}',
    }

    def edit(step: int) -> None:
        if step in contents:
            (tmp_path / PARAMETERS_FILE_NAME).write_text(contents[step])

    training = SmallTraining(dataset, tmp_path, max_steps=6, val_check_interval=2, at_step=edit)
    with caplog.at_level(logging.WARNING):
        training.fit(_samples(dataset, tmp_path, _FEW))
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "temperature must be a number from 0 to 100, found -1" in warnings[0]
    assert "keep the previous parameters" in warnings[0]
    assert "should be a JSON object" in warnings[1]
    assert "no text samples of step 6: the model's context is 64 tokens" in warnings[2]
    assert len(warnings) == 3
    assert [line["step"] for line in _lines(tmp_path)] == [2] * 4 + [4] * 4


def test_a_file_that_cannot_be_written_does_not_end_the_training(
    dataset: DatasetDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / GENERATED_FILE_NAME).mkdir()
    training = SmallTraining(dataset, tmp_path, max_steps=2)
    training.fit(_samples(dataset, tmp_path, _FEW))
    assert training.trainer.global_step == 2
    assert "no text samples of step 2" in caplog.text


def test_tensorboard_shows_the_samples_as_text(dataset: DatasetDirectory, tmp_path: Path) -> None:
    SmallTraining(dataset, tmp_path, max_steps=2).fit(_samples(dataset, tmp_path, _FEW))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    shown = events.Tensors("sample/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert " ".join(shown.split()) == " ".join(f"The{_lines(tmp_path)[0]['text']}".split())


def test_long_lines_are_broken_and_markdown_is_not_read() -> None:
    text = "# no heading\n\n" + "word " * 40
    shown = as_markdown(Sample(0, {"prompt": "* "}, text))
    assert shown.splitlines()[:2] == ["    * # no heading", "    "]
    assert all(len(line) <= 104 and line.startswith("    ") for line in shown.splitlines())
    assert shown.split() == f"* {text}".split()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number from 0 to 100, found 'hot'"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 10**400}, "temperature must be"),
        ({"top_p": 0}, "top_p must be a number above 0 to 1, found 0"),
        ({"top_k": 2.5}, "top_k must be a whole number from 0"),
        ({"num_samples": True}, "num_samples must be a whole number from 0 to 64, found True"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1"),
        ({"repetition_penalty": 11}, "repetition_penalty must be a number"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"prompts": "one"}, "prompts must be a list of texts, found 'one'"),
        ({"prompts": [1]}, "prompts must be a list of texts"),
        (
            {"temprature": 1},
            "unknown name 'temprature'; expected one of prompts, num_samples, max_new_tokens",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    content: dict[str, object], message: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "x.json", content)
    with pytest.raises(InputError, match=r"x\.json: ") as error:
        read_parameters(tmp_path / "x.json")
    assert message in str(error.value)


def test_parameters_come_back(tmp_path: Path) -> None:
    sampling = replace(SampleParameters().sampling, temperature=0.0, top_k=3, seed=2**40)
    parameters = SampleParameters(prompts=("a", "ä"), sampling=sampling)
    write_parameters(tmp_path / "x.json", parameters)
    assert read_parameters(tmp_path / "x.json") == parameters
    write_json(tmp_path / "x.json", {"temperature": 1})
    default = SampleParameters().sampling
    assert read_parameters(tmp_path / "x.json").sampling == replace(default, temperature=1.0)
    assert default.temperature == 0.7


def test_lines_after_a_step_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / GENERATED_FILE_NAME
    drop_lines_after(file, 5)
    assert not file.exists()
    # U+2028 and U+0085 end a line for `splitlines`, not in JSON Lines.
    kept = '{"step": 3, "text": "a\u2028b"}\n{"step": 5, "text": "c\x85"}\n'
    file.write_text(kept + '{"step": 6, "text": "d"}\n{"step": 6, "te', encoding="utf-8")
    drop_lines_after(file, 5)
    assert file.read_text(encoding="utf-8") == kept
    before = file.stat().st_mtime_ns
    drop_lines_after(file, 5)
    assert (file.stat().st_mtime_ns, file.read_text(encoding="utf-8")) == (before, kept)


def test_a_line_cut_inside_a_character_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / GENERATED_FILE_NAME
    file.write_bytes(b'{"step": 1, "text": "a"}\n{"step": 1, "text": "\xc3')
    drop_lines_after(file, 1)
    assert file.read_bytes() == b'{"step": 1, "text": "a"}\n'


def test_every_part_is_in_its_own_mode_again() -> None:
    inner = nn.Sequential(nn.Dropout(), nn.Dropout())
    module = nn.Sequential(nn.Dropout(), inner)
    inner[0].eval()
    before = [part.training for part in module.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(module):
        assert not any(part.training for part in module.modules())
        raise ZeroDivisionError
    assert [part.training for part in module.modules()] == before == [True, True, True, False, True]
