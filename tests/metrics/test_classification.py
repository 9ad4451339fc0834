"""Classes and labelled words: against counting one by one, and cases worked by hand."""

import itertools
import math
import random

import numpy as np
import pytest

from full_stack_transformer.metrics.classification import (
    _spans,
    classification_metrics,
    label_metrics,
    multi_label_metrics,
)

Span = tuple[str, int, int]
"""Type, first word, word after the last."""

# A: 3 of 4 found; B: 2 of 3; C: 0 of 1, and once predicted wrongly; D never occurs.
EXPECTED = [0, 0, 0, 0, 1, 1, 1, 2]
PREDICTED = [0, 0, 0, 1, 1, 1, 2, 0]


def test_a_case_worked_by_hand() -> None:
    metrics = classification_metrics(EXPECTED, PREDICTED, ["A", "B", "C", "D"])
    assert metrics.accuracy == metrics.f1_micro == 5 / 8
    assert [(row.label, row.support) for row in metrics.per_class] == [
        ("A", 4),
        ("B", 3),
        ("C", 1),
        ("D", 0),
    ]
    assert [row.precision for row in metrics.per_class] == [3 / 4, 2 / 3, 0, 0]
    assert [row.recall for row in metrics.per_class] == [3 / 4, 2 / 3, 0, 0]
    assert metrics.f1_macro == pytest.approx((3 / 4 + 2 / 3 + 0) / 3)  # D is not there to be found
    assert metrics.f1_weighted == pytest.approx((4 * 3 / 4 + 3 * 2 / 3) / 8)
    assert metrics.confusion == ((3, 1, 0, 0), (0, 2, 1, 0), (1, 0, 0, 0), (0, 0, 0, 0))
    # (5*8 - (4*4 + 3*3 + 1*1)) / sqrt((64 - 26) * (64 - 26))
    assert metrics.matthews == pytest.approx(14 / 38)
    assert "f1_binary" not in metrics.scalars()


def test_two_classes_have_glues_f1_and_the_correlation_of_the_two_sides() -> None:
    generator = np.random.default_rng(0)
    expected = generator.integers(2, size=200)
    predicted = np.where(generator.random(200) < 0.7, expected, 1 - expected)
    metrics = classification_metrics(expected, predicted, ["no", "yes"])
    both = int(((expected == 1) & (predicted == 1)).sum())
    assert metrics.f1_binary == pytest.approx(2 * both / int(expected.sum() + predicted.sum()))
    # For two classes Matthews' figure is Pearson's correlation.
    assert metrics.matthews == pytest.approx(np.corrcoef(expected, predicted)[0, 1])


def test_a_single_class_or_label_is_measured_too() -> None:
    metrics = classification_metrics([0, 0], [0, 0], ["only"])
    assert (metrics.accuracy, metrics.f1_macro, metrics.matthews) == (1, 1, 0)
    assert classification_metrics([1, 1], [1, 1], ["no", "yes"]).confusion == ((0, 0), (0, 2))
    labelled = multi_label_metrics([[1], [0], [1]], [[1], [1], [0]], ["only"])
    assert labelled.accuracy == 1 / 3
    assert labelled.f1_macro == labelled.f1_micro == labelled.f1_weighted == 1 / 2
    assert [row.support for row in labelled.per_class] == [2]


def test_a_constant_answer_has_no_correlation() -> None:
    metrics = classification_metrics([0, 1, 1], [1, 1, 1], ["no", "yes"])
    assert metrics.matthews == 0
    assert metrics.accuracy == 2 / 3


def test_matthews_of_many_examples_does_not_overflow() -> None:
    expected = np.repeat([0, 1], 100_000)  # whose products of four pass 2^63
    assert classification_metrics(expected, expected, ["no", "yes"]).matthews == 1


def test_the_confusion_matrix_equals_counting_pair_by_pair() -> None:
    generator = np.random.default_rng(1)
    expected, predicted = generator.integers(5, size=(2, 300))
    counted = np.zeros((5, 5), int)
    for wanted, given in zip(expected, predicted, strict=True):
        counted[wanted, given] += 1
    metrics = classification_metrics(expected, predicted, list("abcde"))
    assert np.array_equal(metrics.confusion, counted)


def test_several_labels_worked_by_hand() -> None:
    expected = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]
    predicted = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]]
    metrics = multi_label_metrics(expected, predicted, ["a", "b", "c"])
    assert metrics.accuracy == 2 / 4
    assert metrics.label_accuracy == 10 / 12
    assert [row.f1 for row in metrics.per_class] == [1, 0, 0]
    assert metrics.f1_macro == pytest.approx(1 / 3)
    assert metrics.f1_micro == pytest.approx(2 * 3 / (4 + 4))
    assert metrics.f1_weighted == pytest.approx(3 / 4)
    assert metrics.matthews is None
    assert math.isclose(metrics.scalars()["label_accuracy"], 10 / 12)


@pytest.mark.parametrize(
    ("expected", "predicted", "message"),
    [
        ([0, 1], [0], "one length"),
        ([], [], "no examples"),
        ([0, 1], [0, 2], "classes 0 to 1"),
        ([0, 1], [0, -100], "classes 0 to 1"),
        ([0.0, 1.0], [0.0, 1.0], "classes 0 to 1"),
    ],
    ids=["lengths", "empty", "beyond", "ignored", "floats"],
)
def test_what_is_no_pair_of_classes_is_refused(
    expected: list[int], predicted: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        classification_metrics(expected, predicted, ["a", "b"])


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(examples, 3\)"):
        multi_label_metrics([[0, 1]], [[0, 1]], ["a", "b", "c"])
    with pytest.raises(ValueError, match="no examples"):
        multi_label_metrics(np.zeros((0, 1)), np.zeros((0, 1)), ["a"])


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ("B-P I-P O B-L", [("P", 0, 2), ("L", 3, 4)]),
        ("B-P B-P I-P", [("P", 0, 1), ("P", 1, 3)]),
        ("I-P I-P O I-L", [("P", 0, 2), ("L", 3, 4)]),
        ("B-P I-L", [("P", 0, 1), ("L", 1, 2)]),
        ("S-P S-P B-L I-L E-L I-L", [("P", 0, 1), ("P", 1, 2), ("L", 2, 5), ("L", 5, 6)]),
        ("B-P E-P E-P", [("P", 0, 2), ("P", 2, 3)]),
        ("B-a-b I-a-b B-", [("a-b", 0, 2), ("_", 2, 3)]),
        ("O O", []),
        ("", []),
    ],
    ids=[
        "plain",
        "neighbours",
        "without-a-beginning",
        "changed-type",
        "iobes",
        "ends-alone",
        "types-with-dashes",
        "outside",
        "empty",
    ],
)
def test_the_spans_of_labels(labels: str, spans: list[Span]) -> None:
    assert _spans([labels.split()]) == {(kind, start, end - 1) for kind, start, end in spans}


def _spans_by_borders(labels: list[str]) -> list[Span]:
    """IOB2 read as conlleval words it: between which neighbours does a span begin or end."""
    padded = ["O", *labels, "O"]
    starts, ends = [], []
    for position, (before, now) in enumerate(itertools.pairwise(padded)):
        differ = before[2:] != now[2:]
        if before != "O" and (now == "O" or now[0] == "B" or differ):
            ends.append((before[2:], position))
        if now != "O" and (before == "O" or now[0] == "B" or differ):
            starts.append((now[2:], position))
    return [(kind, start, end) for (kind, start), (_, end) in zip(starts, ends, strict=True)]


def test_spans_equal_those_by_borders_whatever_the_labels() -> None:
    draw = random.Random(0)
    for _ in range(300):
        labels = draw.choices(["O", "B-X", "I-X", "B-Y", "I-Y"], k=draw.randint(0, 12))
        by_borders = {(kind, start, end - 1) for kind, start, end in _spans_by_borders(labels)}
        assert _spans([labels]) == by_borders


def test_a_span_counts_when_type_and_both_ends_are_right() -> None:
    expected = [["B-P", "I-P", "O", "B-L"], ["B-P", "O"]]
    predicted = [["B-P", "I-P", "O", "B-P"], ["B-P", "I-P"]]
    metrics = label_metrics(expected, predicted)
    assert metrics.tokens.accuracy == 4 / 6
    assert (metrics.span_precision, metrics.span_recall) == (1 / 3, 1 / 3)
    assert metrics.span_f1 == pytest.approx(1 / 3)
    assert [(row.label, row.support, row.precision) for row in metrics.per_type] == [
        ("L", 1, 0),
        ("P", 2, 1 / 3),
    ]
    assert list(metrics.scalars())[:3] == ["token_accuracy", "token_f1_macro", "span_f1"]


def test_kinds_of_single_tokens_have_no_spans() -> None:
    metrics = label_metrics([["name", "number"]], [["name", "name"]])
    assert metrics.span_f1 is None
    assert metrics.scalars() == {"token_accuracy": 0.5, "token_f1_macro": pytest.approx(1 / 3)}


def test_other_numbers_of_texts_and_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 texts, found 2"):
        label_metrics([["O"]], [["O"], ["O"]])
    with pytest.raises(ValueError, match="text 1: expected 1 labels, found 2"):
        label_metrics([["O"], ["O"]], [["O"], ["O", "O"]])
