"""Accuracy, F1, Matthews, the table of classes and the confusion matrix.

    n = examples   c = classes

Classes are numbers from 0. Knows nothing of probabilities or thresholds: it compares decisions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class ClassRow:
    """One row of the table of classes."""

    label: str
    precision: float
    """Share of the predictions of this class that are right; 0 where it was never predicted."""
    recall: float
    """Share of this class that was found; 0 where it never occurs."""
    f1: float
    support: int
    """Examples that are of this class."""


@dataclass(frozen=True)
class ClassificationFigures:
    """What decisions between classes are worth."""

    num_examples: int
    accuracy: float
    """Share of right decisions. With several labels an example counts when all of its labels are right."""
    f1_macro: float
    """Mean F1 of the classes that occur or were predicted."""
    f1_micro: float
    """F1 of all decisions together; with one label each it equals the accuracy."""
    f1_weighted: float
    """Mean F1 of the classes, weighted by how often each occurs."""
    f1_binary: float | None
    """F1 of class 1, where there are two classes; this is GLUE's F1."""
    matthews: float | None
    """Matthews correlation, -1 to 1; None with several labels."""
    label_accuracy: float
    """Share of right yes-or-no decisions; differs from `accuracy` with several labels only."""
    majority: float
    """Accuracy of always answering the commonest class (with several labels: set of labels)."""
    per_class: tuple[ClassRow, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Row: the expected class, column: the predicted one; empty with several labels."""

    def scalars(self) -> dict[str, float]:
        """The single figures by name, without those that do not apply."""
        names = ["accuracy", "f1_macro", "f1_micro", "f1_weighted", "f1_binary", "matthews"]
        if not self.confusion:
            names.append("label_accuracy")
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def table(self) -> str:
        """The table of classes as text, for a terminal."""
        width = max(5, *(len(row.label) for row in self.per_class))
        lines = [f"{'class':<{width}}  precision  recall      f1  support"]
        lines += [
            f"{row.label:<{width}}  {row.precision:9.3f}  {row.recall:6.3f}  {row.f1:6.3f}  {row.support:7,}"
            for row in self.per_class
        ]
        return "\n".join(lines)


def classification_metrics(
    expected: ArrayLike, predicted: ArrayLike, labels: Sequence[str]
) -> ClassificationFigures:
    """Figures of one decision for each example.

    Args:
        expected: (n,) numbers of the classes.
        predicted: (n,) numbers of the classes.
        labels: (c,) names of the classes.

    Raises:
        ValueError: the lengths differ, nothing is there, or a number is no class.
    """
    confusion = confusion_matrix(expected, predicted, num_classes=len(labels))
    hits = np.diag(confusion)
    support, num_predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    num_examples = int(confusion.sum())
    f1 = _ratio(2 * hits, support + num_predicted)
    seen = (support + num_predicted) > 0
    accuracy = float(hits.sum() / num_examples)
    return ClassificationFigures(
        num_examples=num_examples,
        accuracy=accuracy,
        f1_macro=float(f1[seen].mean()),
        f1_micro=accuracy,
        f1_weighted=float(f1 @ support / num_examples),
        f1_binary=float(f1[1]) if len(labels) == 2 else None,
        matthews=_matthews(confusion),
        label_accuracy=accuracy,
        majority=float(support.max() / num_examples),
        per_class=_rows(labels, hits, support, num_predicted),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
    )


def multi_label_metrics(
    expected: ArrayLike, predicted: ArrayLike, labels: Sequence[str]
) -> ClassificationFigures:
    """Figures of a yes-or-no decision for each label of each example.

    Args:
        expected: (n, c) 0 or 1.
        predicted: (n, c) 0 or 1.
        labels: (c,) names of the labels.

    Raises:
        ValueError: the shapes differ or do not fit `labels`, or nothing is there.
    """
    wanted = np.asarray(expected).astype(bool)
    given = np.asarray(predicted).astype(bool)
    if wanted.shape != given.shape or wanted.ndim != 2 or wanted.shape[1] != len(labels):
        raise ValueError(
            f"expected two arrays of (examples, {len(labels)}), found {wanted.shape} and {given.shape}"
        )
    if not len(wanted):
        raise ValueError("there are no examples to measure")
    hits = (wanted & given).sum(axis=0)
    support, num_predicted = wanted.sum(axis=0), given.sum(axis=0)
    f1 = _ratio(2 * hits, support + num_predicted)
    _, counts = np.unique(wanted, axis=0, return_counts=True)
    return ClassificationFigures(
        num_examples=len(wanted),
        accuracy=float((wanted == given).all(axis=1).mean()),
        f1_macro=float(f1.mean()),
        f1_micro=float(_ratio(2 * hits.sum(), support.sum() + num_predicted.sum())),
        f1_weighted=float(_ratio(f1 @ support, support.sum())),
        f1_binary=None,
        matthews=None,
        label_accuracy=float((wanted == given).mean()),
        majority=float(counts.max() / len(wanted)),
        per_class=_rows(labels, hits, support, num_predicted),
        confusion=(),
    )


def confusion_matrix(
    expected: ArrayLike, predicted: ArrayLike, *, num_classes: int
) -> NDArray[np.int64]:
    """How often each class (row) was taken for each (column): (c, c).

    Raises:
        ValueError: the lengths differ, nothing is there, or a number is no class.
    """
    wanted, given = np.asarray(expected), np.asarray(predicted)
    if wanted.shape != given.shape or wanted.ndim != 1:
        raise ValueError(
            f"expected two sequences of one length, found shapes {wanted.shape} and {given.shape}"
        )
    if not len(wanted):
        raise ValueError("there are no examples to measure")
    both = np.concatenate([wanted, given])
    if both.dtype.kind not in "iu" or both.min() < 0 or both.max() >= num_classes:
        raise ValueError(
            f"expected classes 0 to {num_classes - 1}, found {both.min()!r} to {both.max()!r}"
        )
    cells = np.bincount(
        wanted.astype(np.int64) * num_classes + given, minlength=num_classes * num_classes
    )
    return cells.reshape(num_classes, num_classes)


def _matthews(confusion: NDArray[np.int64]) -> float:
    """Correlation of two partitions (Gorodkin 2004, R_K); 0 where one of them is constant."""
    # Python's integers: products of counts pass 2^63 from some millions of examples on.
    support = [int(count) for count in confusion.sum(axis=1)]
    num_predicted = [int(count) for count in confusion.sum(axis=0)]
    total, hits = sum(support), int(np.diag(confusion).sum())
    chance = sum(a * b for a, b in zip(support, num_predicted, strict=True))
    spread = (total**2 - sum(count**2 for count in support)) * (
        total**2 - sum(count**2 for count in num_predicted)
    )
    return (hits * total - chance) / math.sqrt(spread) if spread else 0.0


def _rows(
    labels: Sequence[str],
    hits: NDArray[np.int64],
    support: NDArray[np.int64],
    num_predicted: NDArray[np.int64],
) -> tuple[ClassRow, ...]:
    columns = (
        _ratio(hits, num_predicted),
        _ratio(hits, support),
        _ratio(2 * hits, support + num_predicted),
    )
    return tuple(
        ClassRow(label, float(precision), float(recall), float(f1), int(count))
        for label, precision, recall, f1, count in zip(labels, *columns, support, strict=True)
    )


def _ratio(above: ArrayLike, below: ArrayLike) -> NDArray[Any]:
    """above / below, and 0 where `below` is 0."""
    numerator, denominator = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
