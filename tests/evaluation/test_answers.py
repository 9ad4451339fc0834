"""Answers of a model beside expected ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.conversations.messages import checked
from full_stack_transformer.errors import RowError
from full_stack_transformer.evaluation.answers import Answer, answer, figures, read_questions
from full_stack_transformer.evaluation.run import measured
from full_stack_transformer.generation.text_generator import TextGenerator
from tests.chat_model import make_chat_model
from tests.conftest import RunFst

QUESTIONS = ("Which module has sqrt?", "What is pi?", "And e?", "What does print do?", "Why?")


def _row(question: str, expected: str, **more: str) -> dict[str, Any]:
    asked = [{"role": "user", "content": question}, {"role": "assistant", "content": expected}]
    return {"messages": asked, **more}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a chat template."""
    return make_chat_model(tmp_path_factory.mktemp("answers") / "model", " ".join(QUESTIONS))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations."""
    path = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    rows = [
        _row(question, "Math.", kind="why" if "?" in question else "") for question in QUESTIONS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "is_right", "contains"),
    [
        ("math", True, True),
        (" The math! ", True, True),
        ("It is the module math, of course.", False, True),
        ("mathematics", False, False),
        ("", False, False),
    ],
)
def test_an_answer_is_right_after_normalisation(text: str, is_right: bool, contains: bool) -> None:
    found = Answer(checked(_row("?", "Math.")["messages"], "here"), "Math.", text, True)
    assert (found.is_right, found.contains_it) == (is_right, contains)


def test_figures_are_shares_of_all_and_of_each_kind() -> None:
    asked = [checked(_row("?", "yes")["messages"], "here") for _ in range(4)]
    answers = [
        Answer(one, "yes", text, ended)
        for one, text, ended in zip(
            asked, ("Yes.", "yes, yes", "no", "YES"), (True, True, True, False), strict=True
        )
    ]
    found = figures(answers, num_resamples=10)
    assert found["number_of_answers"] == 4 and "kinds" not in found
    assert (found["exact_match"], found["contains_expected"]) == (0.5, 0.75)
    assert found["ended_by_itself"] == 0.75
    assert found["intervals"]["exact_match"]["low"] <= 0.5


def test_answers_are_those_that_a_chat_gives(model: Path, file: Path) -> None:
    generator = TextGenerator.open(model, weights_dtype="float32", num_slots=3)
    asked = read_questions([file])
    found = answer(generator, asked, at_once=3, max_new_tokens=12)
    for one in found:
        alone = generator.chat(
            [{"role": "user", "content": one.conversation.messages[0]["content"]}],
            max_new_tokens=12,
            temperature=0,
        )
        assert one.text == alone.strip()


def test_the_command_prints_figures_and_keeps_answers(
    run_fst: RunFst, model: Path, file: Path, tmp_path: Path
) -> None:
    words = ("evaluate", model, "--conversations", file, "--max_new_tokens", "4")
    done = run_fst(*words, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kinds"]["why"]["number_of_answers"] == len(QUESTIONS)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == list(QUESTIONS)
    assert all(line["expected"] == "Math." for line in lines)


def test_two_models_are_asked_the_same(
    model: Path, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = EvaluateArguments(
        model, compare=model, conversations=(file,), output_dir=tmp_path, num_resamples=0
    )
    with caplog.at_level("INFO"):
        found = measured(arguments)
    assert found["base"] == found["tuned"]
    texts = [(tmp_path / name).read_text() for name in ("answers.jsonl", "base_answers.jsonl")]
    assert texts[0] == texts[1]
    assert "exact match of why" in caplog.text


def test_a_conversation_without_a_last_answer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    row = _row("?", "yes")
    row["messages"].append({"role": "user", "content": "Why?"})
    path.write_text(json.dumps(row))
    with pytest.raises(RowError, match=r"line 1: the last of two or more messages"):
        read_questions([path])
