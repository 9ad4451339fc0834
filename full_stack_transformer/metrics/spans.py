"""SQuAD's exact match and F1 of answers, on normalised text (Rajpurkar et al. 2016 and 2018).

An answer is a string; the empty string says that the text holds no answer.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class SpanFigures:
    """What answers are worth; None where there is no question of a kind."""

    num_examples: int
    exact_match: float
    f1: float
    has_answer_exact_match: float | None
    """Over the questions that have an answer."""
    has_answer_f1: float | None
    no_answer_accuracy: float | None
    """Share of the questions without an answer to which none was given."""

    def scalars(self) -> dict[str, float]:
        """The single figures by name, without those that do not apply."""
        figures = asdict(self)
        del figures["num_examples"]
        return {name: value for name, value in figures.items() if value is not None}


def normalized_answer(answer: str) -> str:
    """Lower case, without punctuation, English articles and doubled white space."""
    plain = answer.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", plain).split())


def exact_match(expected: Sequence[str], predicted: str) -> float:
    """1 when the answer equals an expected one; no expected one means that none is right."""
    return max(
        float(normalized_answer(one) == normalized_answer(predicted)) for one in expected or ("",)
    )


def answer_f1(expected: Sequence[str], predicted: str) -> float:
    """F1 of the words in common with the nearest expected answer."""
    return max(_word_f1(one, predicted) for one in expected or ("",))


def span_metrics(expected: Sequence[Sequence[str]], predicted: Sequence[str]) -> SpanFigures:
    """Figures over all questions.

    Args:
        expected: for each question the answers that are right; none, or only the empty one, where the
            text does not answer it.
        predicted: for each question one answer, empty for none.

    Raises:
        ValueError: the lengths differ, or nothing is there.
    """
    if len(expected) != len(predicted) or not expected:
        raise ValueError(
            f"expected as many answers as questions, and one at least; found {len(predicted):,} and "
            f"{len(expected):,}"
        )
    matches = [exact_match(*pair) for pair in zip(expected, predicted, strict=True)]
    f1s = [answer_f1(*pair) for pair in zip(expected, predicted, strict=True)]
    answered = [any(map(normalized_answer, answers)) for answers in expected]
    return SpanFigures(
        num_examples=len(matches),
        exact_match=sum(matches) / len(matches),
        f1=sum(f1s) / len(f1s),
        has_answer_exact_match=_mean_where(matches, answered, True),
        has_answer_f1=_mean_where(f1s, answered, True),
        no_answer_accuracy=_mean_where(matches, answered, False),
    )


def _word_f1(expected: str, predicted: str) -> float:
    wanted, given = normalized_answer(expected).split(), normalized_answer(predicted).split()
    if not wanted or not given:
        return float(wanted == given)
    num_common = sum((Counter(wanted) & Counter(given)).values())
    return 2 * num_common / (len(wanted) + len(given))


def _mean_where(values: list[float], kinds: list[bool], kind: bool) -> float | None:
    chosen = [value for value, is_kind in zip(values, kinds, strict=True) if is_kind is kind]
    return sum(chosen) / len(chosen) if chosen else None
