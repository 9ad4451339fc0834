"""Labels of tokens: spans as conlleval and seqeval read them, and figures worked by hand."""

import itertools
import random

import pytest

from full_stack_transformer.metrics.labels import Span, label_metrics, spans_of_labels


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ("B-P I-P O B-L", [("P", 0, 2), ("L", 3, 4)]),
        ("B-P B-P I-P", [("P", 0, 1), ("P", 1, 3)]),
        ("I-P I-P O I-L", [("P", 0, 2), ("L", 3, 4)]),
        ("B-P I-L", [("P", 0, 1), ("L", 1, 2)]),
        ("S-P S-P B-L I-L E-L I-L", [("P", 0, 1), ("P", 1, 2), ("L", 2, 5), ("L", 5, 6)]),
        ("B-P E-P E-P", [("P", 0, 2), ("P", 2, 3)]),
        ("B-a-b I-a-b B-", [("a-b", 0, 2), ("", 2, 3)]),
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
    assert spans_of_labels(labels.split()) == spans


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
        assert spans_of_labels(labels) == _spans_by_borders(labels)


def test_a_span_counts_when_type_and_both_ends_are_right() -> None:
    expected = [["B-P", "I-P", "O", "B-L"], ["B-P", "O"]]
    predicted = [["B-P", "I-P", "O", "B-P"], ["B-P", "I-P"]]
    figures = label_metrics(expected, predicted)
    assert figures.tokens.accuracy == 4 / 6
    assert (figures.span_precision, figures.span_recall) == (1 / 3, 1 / 3)
    assert figures.span_f1 == pytest.approx(1 / 3)
    assert [(row.label, row.support, row.precision) for row in figures.per_type] == [
        ("L", 1, 0),
        ("P", 2, 1 / 3),
    ]
    assert list(figures.scalars())[:3] == ["token_accuracy", "token_f1_macro", "span_f1"]


def test_kinds_of_single_tokens_have_no_spans() -> None:
    figures = label_metrics([["name", "number"]], [["name", "name"]])
    assert figures.span_f1 is None
    assert figures.scalars() == {"token_accuracy": 0.5, "token_f1_macro": pytest.approx(1 / 3)}


def test_texts_and_labels_of_other_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 texts, found 2"):
        label_metrics([["O"]], [["O"], ["O"]])
    with pytest.raises(ValueError, match="text 1: expected 1 labels, found 2"):
        label_metrics([["O"], ["O"]], [["O"], ["O", "O"]])
