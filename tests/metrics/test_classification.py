"""Decisions between classes: against counting one by one, and cases worked by hand."""

import math

import numpy as np
import pytest

from full_stack_transformer.metrics.classification import (
    classification_metrics,
    confusion_matrix,
    multi_label_metrics,
)

# A: 3 of 4 found; B: 2 of 3; C: 0 of 1, and once predicted wrongly; D never occurs.
EXPECTED = [0, 0, 0, 0, 1, 1, 1, 2]
PREDICTED = [0, 0, 0, 1, 1, 1, 2, 0]


def test_a_case_worked_by_hand() -> None:
    figures = classification_metrics(EXPECTED, PREDICTED, ["A", "B", "C", "D"])
    assert figures.num_examples == 8
    assert figures.accuracy == figures.f1_micro == 5 / 8
    assert [(row.label, row.support) for row in figures.per_class] == [
        ("A", 4),
        ("B", 3),
        ("C", 1),
        ("D", 0),
    ]
    assert [row.precision for row in figures.per_class] == [3 / 4, 2 / 3, 0, 0]
    assert [row.recall for row in figures.per_class] == [3 / 4, 2 / 3, 0, 0]
    assert figures.f1_macro == pytest.approx((3 / 4 + 2 / 3 + 0) / 3)  # D is not there to be found
    assert figures.f1_weighted == pytest.approx((4 * 3 / 4 + 3 * 2 / 3) / 8)
    assert figures.majority == 1 / 2
    assert figures.confusion == ((3, 1, 0, 0), (0, 2, 1, 0), (1, 0, 0, 0), (0, 0, 0, 0))
    # (5*8 - (4*4 + 3*3 + 1*1)) / sqrt((64 - 26) * (64 - 26))
    assert figures.matthews == pytest.approx(14 / 38)
    assert "f1_binary" not in figures.scalars()
    assert figures.table().splitlines()[1].split() == ["A", "0.750", "0.750", "0.750", "4"]


def test_two_classes_have_glues_f1_and_the_correlation_of_the_two_sides() -> None:
    generator = np.random.default_rng(0)
    expected = generator.integers(2, size=200)
    predicted = np.where(generator.random(200) < 0.7, expected, 1 - expected)
    figures = classification_metrics(expected, predicted, ["no", "yes"])
    both = int(((expected == 1) & (predicted == 1)).sum())
    assert figures.f1_binary == pytest.approx(2 * both / int(expected.sum() + predicted.sum()))
    # For two classes Matthews' figure is Pearson's correlation.
    assert figures.matthews == pytest.approx(np.corrcoef(expected, predicted)[0, 1])


def test_a_constant_answer_has_no_correlation() -> None:
    figures = classification_metrics([0, 1, 1], [1, 1, 1], ["no", "yes"])
    assert figures.matthews == 0
    assert figures.accuracy == figures.majority == 2 / 3


def test_matthews_of_many_examples_does_not_overflow() -> None:
    expected = np.repeat([0, 1], 100_000)  # whose products of four pass 2^63
    assert classification_metrics(expected, expected, ["no", "yes"]).matthews == 1


def test_the_confusion_matrix_equals_counting_pair_by_pair() -> None:
    generator = np.random.default_rng(1)
    expected, predicted = generator.integers(5, size=(2, 300))
    counted = np.zeros((5, 5), int)
    for wanted, given in zip(expected, predicted, strict=True):
        counted[wanted, given] += 1
    assert np.array_equal(confusion_matrix(expected, predicted, num_classes=5), counted)


def test_several_labels_worked_by_hand() -> None:
    expected = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]
    predicted = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]]
    figures = multi_label_metrics(expected, predicted, ["a", "b", "c"])
    assert figures.accuracy == 2 / 4
    assert figures.label_accuracy == 10 / 12
    assert [row.f1 for row in figures.per_class] == [1, 0, 0]
    assert figures.f1_macro == pytest.approx(1 / 3)
    assert figures.f1_micro == pytest.approx(2 * 3 / (4 + 4))
    assert figures.f1_weighted == pytest.approx(3 / 4)
    assert figures.majority == 2 / 4
    assert figures.matthews is None
    assert math.isclose(figures.scalars()["label_accuracy"], 10 / 12)


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
