"""Answers: SQuAD's rules, case by case."""

import pytest

from full_stack_transformer.metrics.spans import (
    answer_f1,
    exact_match,
    normalized_answer,
    span_metrics,
)


def test_case_punctuation_articles_and_spaces_do_not_count() -> None:
    assert normalized_answer(" The  Dog's,\n an apple-pie! ") == "dogs applepie"
    assert normalized_answer("Theatre a") == "theatre"


@pytest.mark.parametrize(
    ("expected", "predicted", "is_exact", "f1"),
    [
        (["the list"], "List.", 1, 1),
        (["a new list"], "the list", 0, 2 / 3),
        (["a tuple", "new tuple of items"], "new tuple", 0, 2 / 3),
        (["one two"], "three", 0, 0),
        (["to be to"], "to to to", 0, 2 / 3),
        ([], "", 1, 1),
        ([""], "something", 0, 0),
        (["something"], "", 0, 0),
        (["the"], "", 1, 1),
    ],
    ids=[
        "normalised",
        "part",
        "best-of-several",
        "nothing-in-common",
        "repeated-word-counts-as-often-as-expected",
        "rightly-no-answer",
        "wrongly-an-answer",
        "wrongly-no-answer",
        "nothing-but-an-article",
    ],
)
def test_one_answer(expected: list[str], predicted: str, is_exact: float, f1: float) -> None:
    assert exact_match(expected, predicted) == is_exact
    assert answer_f1(expected, predicted) == pytest.approx(f1)


def test_questions_with_and_without_an_answer_are_counted_apart() -> None:
    figures = span_metrics([["new list"], ["x"], [], [""]], ["list", "x", "", "wrong"])
    assert figures.num_examples == 4
    assert figures.exact_match == 2 / 4
    assert figures.f1 == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)
    assert figures.has_answer_exact_match == 1 / 2
    assert figures.has_answer_f1 == pytest.approx(5 / 6)
    assert figures.no_answer_accuracy == 1 / 2


def test_a_kind_that_is_not_there_has_no_figure() -> None:
    assert set(span_metrics([["x"]], ["x"]).scalars()) == {
        "exact_match",
        "f1",
        "has_answer_exact_match",
        "has_answer_f1",
    }


@pytest.mark.parametrize(("expected", "predicted"), [([["x"]], []), ([], [])])
def test_answers_without_questions_are_refused(
    expected: list[list[str]], predicted: list[str]
) -> None:
    with pytest.raises(ValueError, match="as many answers as questions"):
        span_metrics(expected, predicted)
