"""Metrics of texts: overlap with expected ones (BLEU, chrF, ROUGE), repetition, and answers to questions.

    one text ──counts──> one row of a matrix ──sum──> metric of all texts

BLEU and chrF of many texts are computed from summed counts, not as means. The counts of each text are kept,
so that a bootstrap only adds rows. Each text may have several expected ones.

Their own tokenizers know English alone: rouge-score's drops every other letter. The rule here:
- Texts are compared in Unicode's form NFC, so that `é` is the same as one character or as two.
- A word is a run of letters, digits and the marks on them (vowel signs and accents, also of Hindi or Tamil).
- In scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each letter, with its
  marks, counts as a word; also for BLEU.
"""

import itertools
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

_ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")
# Blocks of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
_LONE = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF)),
    *((0x4E00, 0x9FFF), (0xAA60, 0xAA7F), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x20000, 0x323AF)),
)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Overlap:
    """BLEU, chrF2, ROUGE and exact match of texts, or of a selection of them.

    The metrics are those of sacrebleu's defaults (Post 2018) and the mean F1 of rouge-score without stemming.
    """

    def __init__(self, predicted: Sequence[str], expected: Sequence[Sequence[str]]) -> None:
        """Count what each text has in common with the expected ones.

        Args:
            predicted: the texts.
            expected: for each text the expected ones, at least one.

        Raises:
            ValueError: the lengths differ, or there is no text or no expected one.
        """
        from rouge_score.rouge_scorer import RougeScorer  # more than a second, and only needed here
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        _check(predicted, expected)
        scorer = RougeScorer(_ROUGE_NAMES, tokenizer=_Words())
        predicted = [_composed(text) for text in predicted]
        expected = [[_composed(text) for text in several] for several in expected]
        pairs = list(zip(predicted, expected, strict=True))
        scores = [scorer.score_multi(several, text) for text, several in pairs]
        self._rouge = np.array([[row[name].fmeasure for name in _ROUGE_NAMES] for row in scores])
        self._is_equal = np.array(
            [text.strip() in {other.strip() for other in several} for text, several in pairs]
        )
        # `force` turns off advice about texts that look tokenized. sacrebleu has no public way to the counts
        # of each text; its own bootstrap draws other texts than that of the other metrics.
        self._bleu, self._chrf = BLEU(force=True), CHRF()
        self._bleu_counts, self._chrf_counts = (
            np.array(metric._extract_corpus_statistics(texts, [*itertools.zip_longest(*several)]))
            for metric, texts, several in (
                (self._bleu, *_with_lone_characters(predicted, expected)),
                (self._chrf, predicted, expected),
            )
        )

    def metrics(self, indices: NDArray[np.int64] | slice = slice(None)) -> dict[str, float]:
        """The metrics by name.

        Args:
            indices: of the texts; one that is there twice counts twice.
        """
        bleu = self._bleu._compute_score_from_stats(self._bleu_counts[indices].sum(axis=0).tolist())
        chrf = self._chrf._compute_score_from_stats(self._chrf_counts[indices].sum(axis=0).tolist())
        rouge = self._rouge[indices].mean(axis=0).tolist()
        return {
            "bleu": float(bleu.score),
            "chrf": float(chrf.score),
            **dict(zip(_ROUGE_NAMES, rouge, strict=True)),
            "exact_match": float(self._is_equal[indices].mean()),
        }


def distinct(texts: Sequence[Sequence[Hashable]], order: int) -> float:
    """Distinct n-grams of all texts divided by all n-grams, 0 to 1 (Li et al. 2016); low means monotonous.

    Args:
        texts: words or token ids. The value falls with the amount of text: compare equal amounts.
        order: the n.
    """
    counts: Counter[tuple[Hashable, ...]] = Counter()
    for text in texts:
        counts.update(_ngrams(text, order))
    return len(counts) / max(1, counts.total())


def repetition(texts: Sequence[Sequence[Hashable]], order: int) -> float:
    """Share of a text's n-grams that occurred before in it, 0 to 1: the mean of all texts that have any.

    seq-rep-n of Welleck et al. 2019, section 6.
    """
    shares = repetition_of_texts(texts, order)
    return sum(shares) / max(1, len(shares))


def repetition_of_texts(texts: Sequence[Sequence[Hashable]], order: int) -> list[float]:
    """`repetition` of each text that has n-grams."""
    counters = [_ngrams(text, order) for text in texts]
    return [1 - len(counter) / counter.total() for counter in counters if counter]


def words(text: str) -> list[str]:
    """The words in lower case, by the rule of the module."""
    word, _ = _patterns()
    return word.findall(_composed(text.lower()))


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A word, and a letter that is one by itself, each with its marks, of which Python's \\w has none."""
    letters = [code for first, last in _LONE for code in range(first, last + 1) if _is(code, "L")]
    # And the joiners inside words of Persian or Hindi.
    marks = [0x200C, 0x200D, *(code for code in range(sys.maxunicode + 1) if _is(code, "M"))]
    # A class of rare characters above U+FFFF is slow, so it is looked at only where such a character is.
    rare_letters, rare_marks = (
        f"(?=[\U00010000-\U0010ffff])[{_ranges(code for code in codes if code > 0xFFFF)}]"
        for codes in (letters, marks)
    )
    usual_letters = _ranges(code for code in letters if code <= 0xFFFF)
    usual_marks = _ranges(code for code in marks if code <= 0xFFFF)
    mark = f"(?:[{usual_marks}]|{rare_marks})"
    lone = f"(?:[{usual_letters}]|{rare_letters}){mark}*"
    run = rf"(?:(?!{rare_letters})[^\W_{usual_letters}])+"
    fast_run = rf"[a-z0-9]+(?![^\W_]|{mark})"
    return re.compile(f"{fast_run}|{run}(?:{mark}+(?:{run})*)*|{lone}"), re.compile(f"({lone})")


def _is(code: int, category: str) -> bool:
    return unicodedata.category(chr(code)).startswith(category)


def _ranges(codes: Iterable[int]) -> str:
    """The characters for a class of a pattern, as ranges."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class AnswerMetrics:
    """SQuAD's metrics of answers; None if there is no question of a kind."""

    exact_match: float
    f1: float
    has_answer_exact_match: float | None
    """Over the questions that have an answer."""
    has_answer_f1: float | None
    no_answer_accuracy: float | None
    """Share of the questions without an answer for which none was predicted."""

    def scalars(self) -> dict[str, float]:
        """The single values by name, without those that do not apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def span_metrics(expected: Sequence[Sequence[str]], predicted: Sequence[str]) -> AnswerMetrics:
    """Exact match and F1 of answers, on normalised text (Rajpurkar et al. 2016 and 2018).

    Written here: torchmetrics' takes three seconds to import, computes in float32 and knows no questions
    without an answer.

    Args:
        expected: for each question the right answers; none, or only the empty string, if the text does not
            answer it.
        predicted: for each question one answer, empty for none.

    Raises:
        ValueError: the lengths differ, or there are no questions.
    """
    if len(expected) != len(predicted) or not expected:
        raise ValueError(
            f"expected as many answers as questions, and at least one; found {len(predicted):,} and "
            f"{len(expected):,}"
        )
    matches = [exact_match(*pair) for pair in zip(expected, predicted, strict=True)]
    f1s = [answer_f1(*pair) for pair in zip(expected, predicted, strict=True)]
    is_answered = [any(map(normalized_answer, answers)) for answers in expected]
    return AnswerMetrics(
        exact_match=sum(matches) / len(matches),
        f1=sum(f1s) / len(f1s),
        has_answer_exact_match=_mean_where(matches, is_answered, True),
        has_answer_f1=_mean_where(f1s, is_answered, True),
        no_answer_accuracy=_mean_where(matches, is_answered, False),
    )


def normalized_answer(answer: str) -> str:
    """Lower case, without punctuation, English articles and doubled white space."""
    plain = _composed(answer.lower()).translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", plain).split())


def exact_match(expected: Sequence[str], predicted: str) -> float:
    """1 if the answer equals an expected one; without expected ones the empty answer is right."""
    answer = normalized_answer(predicted)
    return float(any(normalized_answer(other) == answer for other in expected or ("",)))


def answer_f1(expected: Sequence[str], predicted: str) -> float:
    """F1 of the words in common with the most similar expected answer."""
    return max(_word_f1(other, predicted) for other in expected or ("",))


class _Words:
    """The form of a tokenizer that rouge-score takes; its own drops all but English letters."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _with_lone_characters(
    predicted: Sequence[str], expected: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The texts with spaces around each lone letter, which sacrebleu's default tokenizer does not part."""
    _, lone = _patterns()
    parted = [lone.sub(r" \1 ", text) for text in predicted]
    return parted, [[lone.sub(r" \1 ", text) for text in several] for several in expected]


def _check(predicted: Sequence[str], expected: Sequence[Sequence[str]]) -> None:
    if len(predicted) != len(expected) or not predicted:
        raise ValueError(
            f"expected as many texts as lists of expected ones, and at least one; found "
            f"{len(predicted):,} and {len(expected):,}"
        )
    if not all(expected):
        raise ValueError("each text needs at least one expected text")


def _ngrams(sequence: Sequence[Hashable], order: int) -> Counter[tuple[Hashable, ...]]:
    shifted = (sequence[start:] for start in range(order))
    return Counter(zip(*shifted, strict=False))


def _word_f1(expected: str, predicted: str) -> float:
    wanted, given = normalized_answer(expected).split(), normalized_answer(predicted).split()
    if not wanted or not given:
        return float(wanted == given)
    num_common = sum((Counter(wanted) & Counter(given)).values())
    return 2 * num_common / (len(wanted) + len(given))


def _mean_where(values: list[float], kinds: list[bool], kind: bool) -> float | None:
    chosen = [value for value, is_kind in zip(values, kinds, strict=True) if is_kind is kind]
    return sum(chosen) / len(chosen) if chosen else None
