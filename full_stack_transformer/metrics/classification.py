"""Metrics of classes, of several labels at once and of labelled words: accuracy, F1, Matthews, confusion.

    n = examples   c = classes

Classes are indices from 0. Compares decisions: probabilities and thresholds belong to the caller.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

OUTSIDE = "O"
# B: begins, I: inside, E: ends, S: a span of one token. Both IOB2 and IOBES are read.
_SPAN_LABEL = re.compile(r"[BIES]-.*", re.DOTALL)


@dataclass(frozen=True)
class ClassRow:
    """Metrics of one class."""

    label: str
    precision: float
    """Share of the predictions of this class that are right; 0 if it was never predicted."""
    recall: float
    """Share of the examples of this class that were found; 0 if there are none."""
    f1: float
    support: int
    """Number of examples of this class."""


@dataclass(frozen=True)
class ClassificationMetrics:
    """Metrics of decisions between classes."""

    accuracy: float
    """Share of right decisions. With several labels an example counts if all of its labels are right."""
    f1_macro: float
    """Mean F1 of the classes that occur or were predicted."""
    f1_micro: float
    """F1 of all decisions together; with one label per example it equals the accuracy."""
    f1_weighted: float
    """Mean F1 of the classes, weighted by support."""
    f1_binary: float | None
    """F1 of class 1, if there are two classes; this is GLUE's F1."""
    matthews: float | None
    """Matthews correlation, -1 to 1; None with several labels."""
    label_accuracy: float | None
    """Share of right yes-or-no decisions, with several labels only."""
    per_class: tuple[ClassRow, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Row: the expected class, column: the predicted one; empty with several labels."""

    def scalars(self) -> dict[str, float]:
        """The single values by name, without those that do not apply."""
        names = ["accuracy", "f1_macro", "f1_micro", "f1_weighted", "f1_binary", "matthews"]
        values = {name: getattr(self, name) for name in [*names, "label_accuracy"]}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class LabelMetrics:
    """Metrics of labelled words."""

    tokens: ClassificationMetrics
    """Each word by itself."""
    span_precision: float | None
    """Over the spans of all texts; None if the labels mark no spans."""
    span_recall: float | None
    span_f1: float | None
    per_type: tuple[ClassRow, ...]
    """Metrics of each type of span."""

    def scalars(self) -> dict[str, float]:
        """The single values by name, without those that do not apply."""
        values = {
            "token_accuracy": self.tokens.accuracy,
            "token_f1_macro": self.tokens.f1_macro,
            "span_f1": self.span_f1,
            "span_precision": self.span_precision,
            "span_recall": self.span_recall,
        }
        return {name: value for name, value in values.items() if value is not None}


def classification_metrics(
    expected: ArrayLike, predicted: ArrayLike, labels: Sequence[str]
) -> ClassificationMetrics:
    """Metrics of one decision for each example.

    Args:
        expected: (n,) indices of the classes.
        predicted: (n,) indices of the classes.
        labels: (c,) names of the classes.

    Raises:
        ValueError: the lengths differ, there are no examples, or an index is no class.
    """
    import sklearn  # a second, and only needed here
    import sklearn.metrics

    wanted, given = _class_indices(expected, predicted, len(labels))
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(confusion, (wanted, given), 1)
    is_seen = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    # A bootstrap calls this 500 times; without scikit-learn's own checks it takes half of the time.
    with sklearn.config_context(skip_parameter_validation=True, assume_finite=True):
        # Of a single class scikit-learn warns, and answers 0 too.
        matthews = sklearn.metrics.matthews_corrcoef(wanted, given) if is_seen.sum() > 1 else 0.0
        per_class = _per_class(wanted, given, labels)
    f1, support = np.array([row.f1 for row in per_class]), confusion.sum(axis=1)
    accuracy = float(np.mean(wanted == given))
    return ClassificationMetrics(
        accuracy=accuracy,
        f1_macro=float(f1[is_seen].mean()),
        f1_micro=accuracy,
        f1_weighted=float(f1 @ support / len(wanted)),
        f1_binary=float(f1[1]) if len(labels) == 2 else None,
        matthews=float(matthews),
        label_accuracy=None,
        per_class=per_class,
        confusion=tuple(tuple(map(int, row)) for row in confusion),
    )


def multi_label_metrics(
    expected: ArrayLike, predicted: ArrayLike, labels: Sequence[str]
) -> ClassificationMetrics:
    """Metrics of a yes-or-no decision for each label of each example.

    Args:
        expected: (n, c) 0 or 1.
        predicted: (n, c) 0 or 1.
        labels: (c,) names of the labels.

    Raises:
        ValueError: the shapes differ or do not fit `labels`, or there are no examples.
    """
    import sklearn.metrics

    wanted, given = np.asarray(expected).astype(bool), np.asarray(predicted).astype(bool)
    if wanted.shape != given.shape or wanted.ndim != 2 or wanted.shape[1] != len(labels):
        raise ValueError(
            f"expected two arrays of (examples, {len(labels)}), found {wanted.shape} and {given.shape}"
        )
    if not len(wanted):
        raise ValueError("there are no examples to measure")
    # With a further label that never occurs: scikit-learn reads a single column as two classes.
    padded = [np.pad(side, ((0, 0), (0, 1))) for side in (wanted, given)]
    f1 = {
        average: sklearn.metrics.f1_score(
            *padded, labels=range(len(labels)), average=average, zero_division=0
        )
        for average in ("macro", "micro", "weighted")
    }
    return ClassificationMetrics(
        accuracy=float((wanted == given).all(axis=1).mean()),
        f1_macro=float(f1["macro"]),
        f1_micro=float(f1["micro"]),
        f1_weighted=float(f1["weighted"]),
        f1_binary=None,
        matthews=None,
        label_accuracy=float((wanted == given).mean()),
        per_class=_per_class(padded[0], padded[1], labels),
        confusion=(),
    )


def label_metrics(
    expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> LabelMetrics:
    """Metrics of the labels of words, and of the spans that they mark.

        words   Guido  van    Rossum  wrote  Python
        labels  B-PER  I-PER  I-PER   O      B-LANG      ->  (PER, 0, 2)  (LANG, 4, 4)

    A span counts if its type and both of its ends are right (Tjong Kim Sang and De Meulder 2003). Labels
    without a prefix mark kinds of single words; they have an accuracy and F1 per kind, and no spans.

    Args:
        expected: the labels of each text, one per word.
        predicted: as many for each text.

    Raises:
        ValueError: the numbers of texts or labels differ, or there are no words.
    """
    if len(expected) != len(predicted):
        raise ValueError(f"expected {len(expected):,} texts, found {len(predicted):,}")
    for index, (wanted, given) in enumerate(zip(expected, predicted, strict=True)):
        if len(wanted) != len(given):
            raise ValueError(f"text {index}: expected {len(wanted)} labels, found {len(given)}")
    tokens = _token_metrics(expected, predicted)
    if not any(_SPAN_LABEL.fullmatch(row.label) for row in tokens.per_class):
        return LabelMetrics(tokens, None, None, None, ())
    total, per_type = _span_metrics(_spans(expected), _spans(predicted))
    return LabelMetrics(tokens, total.precision, total.recall, total.f1, per_type)


def _class_indices(
    expected: ArrayLike, predicted: ArrayLike, num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
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
    return wanted, given


def _per_class(
    wanted: NDArray[Any], given: NDArray[Any], labels: Sequence[str]
) -> tuple[ClassRow, ...]:
    import sklearn.metrics

    columns = sklearn.metrics.precision_recall_fscore_support(
        wanted, given, labels=range(len(labels)), average=None, zero_division=0
    )
    return tuple(
        ClassRow(label, float(precision), float(recall), float(f1), int(support))
        for label, precision, recall, f1, support in zip(labels, *columns, strict=True)
    )


def _token_metrics(
    expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> ClassificationMetrics:
    wanted = [label for labels in expected for label in labels]
    given = [label for labels in predicted for label in labels]
    names = sorted({*wanted, *given})
    index_of = {name: index for index, name in enumerate(names)}
    return classification_metrics(
        [index_of[label] for label in wanted], [index_of[label] for label in given], names
    )


def _spans(texts: Sequence[Sequence[str]]) -> set[tuple[str, int, int]]:
    """Type, first and last position of each span; positions run on from text to text."""
    from seqeval.metrics.sequence_labeling import get_entities

    return set(
        get_entities(
            [
                [label if _SPAN_LABEL.fullmatch(label) else OUTSIDE for label in labels]
                for labels in texts
            ]
        )
    )


def _span_metrics(
    wanted: set[tuple[str, int, int]], given: set[tuple[str, int, int]]
) -> tuple[ClassRow, tuple[ClassRow, ...]]:
    """Metrics of all spans together and of each type.

    Counted here: seqeval's report reads all labels anew for each average, 80 ms instead of 30 for 250 texts
    of 20 words, and a bootstrap needs it 500 times.
    """
    support, num_given, hits = (
        Counter(kind for kind, _, _ in spans) for spans in (wanted, given, wanted & given)
    )
    per_type = tuple(
        _span_row(kind, hits[kind], support[kind], num_given[kind])
        for kind in sorted({*support, *num_given})
    )
    return _span_row("", hits.total(), support.total(), num_given.total()), per_type


def _span_row(label: str, hits: int, support: int, num_given: int) -> ClassRow:
    return ClassRow(
        label=label,
        precision=hits / max(1, num_given),
        recall=hits / max(1, support),
        f1=2 * hits / max(1, num_given + support),
        support=support,
    )
