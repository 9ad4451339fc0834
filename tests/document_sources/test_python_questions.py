"""Questions about the library: their answers, and that what is held out is held out."""

import shutil
from collections import Counter, defaultdict

import pytest

from full_stack_transformer.conversations.layouts import conversation_of
from full_stack_transformer.document_sources import python_questions as module
from full_stack_transformer.document_sources.python_questions import Question, python_questions
from full_stack_transformer.document_sources.task_rows import task_rows


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """All of them."""
    return python_questions()


def test_answers_are_those_of_the_interpreter(questions: list[Question]) -> None:
    answers = {one.question: one.answer for one in questions}
    assert answers["What is the base class of FileNotFoundError?"] == "OSError"
    thing = module._thing("shutil", "rmtree", shutil.rmtree)
    assert thing is not None and thing.sentence == "Recursively delete a directory tree."
    facts = {fact.kind: fact.answer for fact in module._facts([thing], Counter(["rmtree"]))}
    assert facts["do"] == "Recursively delete a directory tree."
    assert (facts["module"], facts["name"]) == ("shutil", "rmtree")
    assert thing.documentation.startswith("function shutil.rmtree(path, ignore_errors, onerror")
    assert {one.kind for one in questions} == set(module._WORDINGS)
    assert all(one.answer and "{" not in one.question for one in questions)


def test_a_held_out_question_is_not_asked_in_training(questions: list[Question]) -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    for one in questions:
        sides[one.side].add(one.question)
    assert not sides["train"] & (sides["valid"] | sides["test"])
    asked = [one for one in questions if one.kind != "documentation"]
    assert 0.08 < sum(one.side == "valid" for one in asked) / len(asked) < 0.12
    assert 0.005 < sum(one.side == "test" for one in asked) / len(asked) < 0.02


def test_a_fact_held_out_in_one_wording_is_learned_in_the_others() -> None:
    sides = []
    for number in range(200):
        fact = module._Fact("base", "Exception", f"Error{number}", {})
        found = list(fact.questions())
        assert [*fact.questions()] == found
        sides.append(tuple(sorted(Counter(one.side for one in found).items())))
    assert set(sides) == {(("test", 1),), (("train", 5),), (("train", 4), ("valid", 1))}


def test_conversations_are_read_as_any_others(questions: list[Question]) -> None:
    rows = task_rows("supervised_fine_tuning")
    assert rows == task_rows("supervised_fine_tuning")
    by_side: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        conversation = conversation_of(row.fields, "here")
        by_side[row.side] += [
            (asked["content"], answer["content"])
            for asked, answer in zip(
                conversation.messages[::2], conversation.messages[1::2], strict=True
            )
        ]
        assert bool(conversation.kind) == (row.side != "train")
    for side in ("train", "valid", "test"):
        expected = [(one.question, one.answer) for one in questions if one.side == side]
        assert by_side[side] == expected
