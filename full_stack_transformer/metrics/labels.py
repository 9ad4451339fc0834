"""Labels of tokens: accuracy, and F1 of the spans that they mark, as conlleval and seqeval count them.

    words   Guido  van    Rossum  wrote  Python
    labels  B-PER  I-PER  I-PER   O      B-LANG      ->  (PER, 0, 3)  (LANG, 4, 5)

A span counts when its type and both of its ends are right (Tjong Kim Sang and De Meulder 2003). Labels
without a prefix mark kinds of single tokens; they have an accuracy and F1 per kind, and no spans.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from full_stack_transformer.metrics.classification import (
    ClassificationFigures,
    ClassRow,
    classification_metrics,
)

OUTSIDE = "O"
# B: begins, I: goes on, E: ends, S: a span of one token. Both IOB2 and IOBES are read.
_LABEL = re.compile(r"([BIES])-(.*)", re.DOTALL)

Span = tuple[str, int, int]
"""Type, first token, token after the last."""


@dataclass(frozen=True)
class LabelFigures:
    """What labels of tokens are worth."""

    tokens: ClassificationFigures
    """Each token by itself."""
    span_precision: float | None
    """Over all spans of all texts; None where the labels mark no spans."""
    span_recall: float | None
    span_f1: float | None
    per_type: tuple[ClassRow, ...]
    """The table of the types of spans."""

    def scalars(self) -> dict[str, float]:
        """The single figures by name, without those that do not apply."""
        spans = {
            "span_f1": self.span_f1,
            "span_precision": self.span_precision,
            "span_recall": self.span_recall,
        }
        return {
            "token_accuracy": self.tokens.accuracy,
            "token_f1_macro": self.tokens.f1_macro,
            **{name: value for name, value in spans.items() if value is not None},
        }


def label_metrics(
    expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> LabelFigures:
    """Figures over all texts.

    Args:
        expected: the labels of each text, one per word.
        predicted: as many for each text.

    Raises:
        ValueError: the numbers of texts or labels differ, or nothing is there.
    """
    if len(expected) != len(predicted):
        raise ValueError(f"expected {len(expected):,} texts, found {len(predicted):,}")
    for number, (wanted, given) in enumerate(zip(expected, predicted, strict=True)):
        if len(wanted) != len(given):
            raise ValueError(f"text {number}: expected {len(wanted)} labels, found {len(given)}")
    tokens = _token_figures(expected, predicted)
    names = {label for labels in (*expected, *predicted) for label in labels}
    if not any(_LABEL.fullmatch(label) for label in names):
        return LabelFigures(tokens, None, None, None, ())
    wanted_spans, given_spans = _all_spans(expected), _all_spans(predicted)
    per_type = _types(wanted_spans, given_spans)
    hits, num_wanted, num_given = (
        len(wanted_spans & given_spans),
        len(wanted_spans),
        len(given_spans),
    )
    return LabelFigures(
        tokens=tokens,
        span_precision=hits / num_given if num_given else 0.0,
        span_recall=hits / num_wanted if num_wanted else 0.0,
        span_f1=2 * hits / (num_wanted + num_given) if num_wanted + num_given else 0.0,
        per_type=per_type,
    )


def spans_of_labels(labels: Iterable[str]) -> list[Span]:
    """The spans that the labels of one text mark, in order.

    An I or E that follows nothing of its type begins a span, as conlleval reads it: a model's labels
    need not be well-formed.
    """
    spans: list[Span] = []
    # The span that the next label may go on with.
    current: tuple[str, int] | None = None
    position = -1
    for position, label in enumerate(labels):
        match = _LABEL.fullmatch(label)
        prefix, kind = match.groups() if match else (OUTSIDE, "")
        if current and not (prefix in "IE" and kind == current[0]):
            spans.append((*current, position))
            current = None
        if match and current is None:
            current = (kind, position)
        if current and prefix in "ES":
            spans.append((*current, position + 1))
            current = None
    if current:
        spans.append((*current, position + 1))
    return spans


def _token_figures(
    expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> ClassificationFigures:
    wanted = [label for labels in expected for label in labels]
    given = [label for labels in predicted for label in labels]
    names = sorted({*wanted, *given})
    numbers = {name: number for number, name in enumerate(names)}
    return classification_metrics(
        [numbers[label] for label in wanted], [numbers[label] for label in given], names
    )


def _all_spans(texts: Sequence[Sequence[str]]) -> set[tuple[int, Span]]:
    return {
        (number, span) for number, labels in enumerate(texts) for span in spans_of_labels(labels)
    }


def _types(wanted: set[tuple[int, Span]], given: set[tuple[int, Span]]) -> tuple[ClassRow, ...]:
    support, num_given, hits = (
        Counter(span[0] for _, span in spans) for spans in (wanted, given, wanted & given)
    )
    return tuple(
        ClassRow(
            label=kind,
            precision=hits[kind] / num_given[kind] if num_given[kind] else 0.0,
            recall=hits[kind] / support[kind] if support[kind] else 0.0,
            f1=2 * hits[kind] / (num_given[kind] + support[kind]),
            support=support[kind],
        )
        for kind in sorted({*support, *num_given})
    )
