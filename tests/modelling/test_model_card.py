"""The model card says what is known and nothing else, and its commands work as they stand."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from full_stack_transformer.command_line import _make_app
from full_stack_transformer.modelling.model_card import model_card
from full_stack_transformer.tasks.multiple_choice import MultipleChoice

DESCRIPTION: dict[str, Any] = {
    "task": "causal_lm",
    "experiment": "books/3",
    "model_type": "llama",
    "num_parameters": 1_234_567,
    "context_length": 256,
    "step": 40,
    "validation_loss": 3.25,
    "validation_perplexity": 25.79,
    "validation_bits_per_byte": 1.5,
    "dataset": {
        "dataset_name": "books",
        "tokenizer_cls_name": "TrainedTokenizer",
        "tokenizer_path": None,
        "vocab_size": 4096,
        "max_sample_length": 256,
        "min_sample_length": 8,
        "number_of_train_samples": 3836,
        "number_of_train_tokens": 852_748,
        "number_of_valid_samples": 178,
        "number_of_valid_tokens": 39_455,
        "counts": {"train": {"num_documents": 1059}, "valid": {"num_documents": 45}},
    },
}
ARGUMENTS: dict[str, Any] = {
    "dataset_dir": "/home/somebody/data",
    "model_path": "/home/somebody/models/first",
    "learning_rate": 1e-3,
    "max_minutes": None,
    "optimizer": "adamw",
}
CURVE = [(step, 10 / (step + 1)) for step in range(0, 1000, 10)]


def _section(card: str, title: str) -> list[list[str]]:
    """The cells of the table below a heading, without its first two lines."""
    text = card.split(f"## {title}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_card_says_what_is_known() -> None:
    card = model_card(DESCRIPTION, ARGUMENTS, CURVE)
    assert "# books/3\n" in card
    assert "A llama model that predicts the next token, 1,234,567 parameters" in card
    assert "| validation bits per byte of text | 1.500 |" in card
    assert _section(card, "Data") == [
        ["dataset", "books"],
        ["training", "1,059 documents, 3,836 samples, 852,748 tokens"],
        ["validation", "45 documents, 178 samples, 39,455 tokens"],
        ["tokenizer", "TrainedTokenizer, 4,096 tokens"],
        ["tokens in a sample", "8 to 256"],
    ]


def test_the_front_matter_is_what_the_hub_reads() -> None:
    _, matter, _ = model_card(DESCRIPTION, ARGUMENTS, CURVE).split("---\n", 2)
    content = yaml.safe_load(matter)
    assert content["library_name"] == "transformers"
    assert content["pipeline_tag"] == "text-generation"
    assert "license" not in content


def test_options_are_listed_without_places_of_the_machine() -> None:
    card = model_card(DESCRIPTION, ARGUMENTS, CURVE)
    assert _section(card, "Training") == [
        ["`--model_path`", "first"],
        ["`--learning_rate`", "0.001"],
        ["`--optimizer`", "adamw"],
    ]
    assert "somebody" not in card


def test_a_long_curve_is_thinned_out() -> None:
    rows = _section(model_card({"step": 40}, {}, CURVE), "Curve")
    assert len(rows) <= 20
    steps = [int(row[0].replace(",", "")) for row in rows]
    assert steps == sorted(set(steps))
    assert {0, 40, 990} <= set(steps)
    assert rows[0] == ["0", "10.0000", "22,026.47"]


@pytest.mark.parametrize("num_validations", [1, 2, 19, 20])
def test_a_short_curve_is_shown_whole(num_validations: int) -> None:
    rows = _section(model_card({}, {}, CURVE[:num_validations]), "Curve")
    assert len(rows) == num_validations
    assert rows[-1][0] == str(CURVE[num_validations - 1][0])


def test_what_is_not_known_is_left_out() -> None:
    card = model_card({}, {}, [])
    assert "# Language model\n" in card
    for title in ("Data", "Training", "Curve", "Averaged"):
        assert f"## {title}" not in card
    assert "None" not in card


def test_the_sources_of_an_average_are_named() -> None:
    sources = [
        {"model": "books/3", "step": 1000, "validation_loss": 3.25},
        {"model": "books/4/last.ckpt", "step": 2000},
    ]
    card = model_card({"averaged_from": sources}, {}, [])
    assert "# Average of 2 models\n" in card
    assert _section(card, "Averaged") == [
        ["books/3", "1,000", "3.2500"],
        ["books/4/last.ckpt", "2,000", ""],
    ]


def test_a_value_cannot_break_a_table() -> None:
    card = model_card({}, {"model_config": "a|b\nc"}, [])
    assert r"| `--model_config` | a\|b c |" in card


def test_the_lines_of_the_card_work(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card = model_card(DESCRIPTION, ARGUMENTS, CURVE)
    shutil.copytree(model_dir, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.startswith("The beginning of a text")
    [commands] = re.findall(r"```sh\n(.*?)```", card, re.DOTALL)
    for line in commands.splitlines():
        _make_app().parse_args(line.removeprefix("fst "), exit_on_error=False, print_error=False)


def test_the_card_of_another_task_shows_how_to_use_it() -> None:
    description = {**DESCRIPTION, "task": "multiple_choice", "validation_accuracy": 0.75}
    card = model_card(description, ARGUMENTS, CURVE, MultipleChoice.card)
    assert "pipeline_tag: multiple-choice" in card
    assert "A llama model that chooses among texts" in card
    assert "| validation accuracy | 0.7500 |" in card
    assert (
        'opened.task.predict([{"text": "A text"}], opened.backbone))  # fields: text, choices'
        in card
    )
    assert "AutoModelForCausalLM" not in card
