"""Generated texts beside expected ones (BLEU, chrF, ROUGE, exact match) and by themselves (distinct-n,
repetition).

    one text ──counts──> one row of a matrix ──sum──> the figure of all texts

BLEU and chrF of many texts are figures of summed counts, not means of figures; the counts of each text
are had by themselves so that a bootstrap only adds rows. Each text may have several expected ones.
The numbers equal those of sacrebleu 2.6 (its defaults) and rouge-score 0.1.2 without stemming, but that
each Chinese or Japanese character counts as a word and letters beyond ASCII count in ROUGE.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

_BLEU_ORDER = 4
_CHRF_ORDER = 6
# Recall weighs twice as much as precision: chrF2, the default of WMT since 2016.
_CHRF_BETA = 2
_ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")

_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
# mteval-v13a's rules: every ASCII symbol but ' , - . is a word; , and . unless between digits; and a
# dash after a digit.
_SYMBOL = re.compile(r"([{-~\[-` -&(-+:-@/])")
_POINT_AFTER_LETTER = re.compile(r"([^0-9])([.,])")
_POINT_BEFORE_LETTER = re.compile(r"([.,])([^0-9])")
_DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")
# Scripts without spaces between words: each character counts as one.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
_LONE_CHARACTER = re.compile(f"([{_IDEOGRAPH}])")
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+")

References = Sequence[Sequence[str]]
"""For each text the expected ones, one at least."""


def bleu(predicted: Sequence[str], expected: References) -> float:
    """BLEU of all texts, 0 to 100 (Papineni et al. 2002; words and smoothing as in Post 2018)."""
    return bleu_of_counts(_sum(bleu_counts(predicted, expected)))


def bleu_counts(predicted: Sequence[str], expected: References) -> NDArray[np.int64]:
    """A row per text: words given, words expected, then for each order of n-grams hits and totals."""
    _check(predicted, expected)
    rows = [_bleu_row(text, several) for text, several in zip(predicted, expected, strict=True)]
    return np.array(rows, np.int64)


def bleu_of_counts(counts: NDArray[np.int64]) -> float:
    """BLEU of a summed row of `bleu_counts`, 0 to 100."""
    num_given, num_expected = int(counts[0]), int(counts[1])
    hits, totals = counts[2::2].tolist(), counts[3::2].tolist()
    if not any(hits) or not totals[-1]:
        return 0.0  # texts that are all shorter than four words have no BLEU
    log_sum, smoothing = 0.0, 1.0
    for num_hits, total in zip(hits, totals, strict=True):
        if not num_hits:  # Chen and Cherry 2014, method 3
            smoothing *= 2
        log_sum += math.log((num_hits or 1 / smoothing) / total)
    brevity = min(0.0, 1 - num_expected / num_given)
    return 100 * math.exp(brevity + log_sum / _BLEU_ORDER)


def chrf(predicted: Sequence[str], expected: References) -> float:
    """chrF2 of all texts, 0 to 100: n-grams of up to 6 characters without white space (Popović 2015)."""
    return chrf_of_counts(_sum(chrf_counts(predicted, expected)))


def chrf_counts(predicted: Sequence[str], expected: References) -> NDArray[np.int64]:
    """A row per text: for each order of n-grams those given, those expected and the hits.

    Of several expected texts the one with the best figure counts.
    """
    _check(predicted, expected)
    rows = []
    for text, several in zip(predicted, expected, strict=True):
        given = _character_ngrams(text)
        candidates = [_chrf_row(given, _character_ngrams(reference)) for reference in several]
        rows.append(max(candidates, key=chrf_of_counts))
    return np.array(rows, np.int64)


def chrf_of_counts(counts: NDArray[np.int64]) -> float:
    """chrF2 of a summed row of `chrf_counts`, 0 to 100; orders longer than the texts do not count."""
    rows = [row for row in counts.reshape(-1, 3).tolist() if row[0] and row[1]]
    if not rows:
        return 0.0
    precision = sum(hits / given for given, _, hits in rows) / len(rows)
    recall = sum(hits / wanted for _, wanted, hits in rows) / len(rows)
    if not precision + recall:
        return 0.0
    factor = _CHRF_BETA**2
    return 100 * (1 + factor) * precision * recall / (factor * precision + recall)


def rouge(predicted: Sequence[str], expected: References) -> dict[str, float]:
    """Mean F1 of each text: rouge1 and rouge2 (n-grams), rougeL (longest common subsequence); Lin 2004."""
    _check(predicted, expected)
    means = np.array(rouge_of_texts(predicted, expected)).mean(axis=0)
    return dict(zip(_ROUGE_NAMES, map(float, means), strict=True))


def rouge_of_texts(
    predicted: Sequence[str], expected: References
) -> list[tuple[float, float, float]]:
    """rouge1, rouge2 and rougeL of each text; of several expected ones the best counts for each.

    Words are runs of letters and digits, lower-cased. rouge-score drops all letters but English ones;
    here they count.
    """
    rows = []
    for text, several in zip(predicted, expected, strict=True):
        given = words(text)
        scores = [_rouge_scores(given, words(reference)) for reference in several]
        best = [max(column) for column in zip(*scores, strict=True)]
        rows.append((best[0], best[1], best[2]))
    return rows


def exact_match(predicted: Sequence[str], expected: References) -> float:
    """Share of the texts that equal an expected one but for white space at the ends."""
    _check(predicted, expected)
    pairs = zip(predicted, expected, strict=True)
    hits = [text.strip() in {one.strip() for one in several} for text, several in pairs]
    return sum(hits) / len(hits)


def distinct(texts: Sequence[Sequence[Hashable]], order: int) -> float:
    """Distinct n-grams of all texts over all of them, 0 to 1 (Li et al. 2016); low says monotonous.

    Args:
        texts: words or token ids. The figure falls with the amount of text: compare equal amounts.
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
    """Runs of letters and digits in lower case; each ideograph by itself."""
    return _WORD.findall(text.lower())


def bleu_words(text: str) -> list[str]:
    """The words that BLEU counts: mteval-v13a's, and each ideograph by itself."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = _SYMBOL.sub(r" \1 ", f" {text} ")
    text = _POINT_AFTER_LETTER.sub(r"\1 \2 ", text)
    text = _POINT_BEFORE_LETTER.sub(r" \1 \2", text)
    text = _DASH_AFTER_DIGIT.sub(r"\1 \2 ", text)
    return _LONE_CHARACTER.sub(r" \1 ", text).split()


def _bleu_row(text: str, several: Sequence[str]) -> list[int]:
    given, references = bleu_words(text), [bleu_words(reference) for reference in several]
    # The expected length nearest to the given one; of two the shorter.
    length = min((abs(len(one) - len(given)), len(one)) for one in references)[1]
    row = [len(given), length]
    for order in range(1, _BLEU_ORDER + 1):
        allowed: Counter[tuple[Hashable, ...]] = Counter()
        for reference in references:
            allowed |= _ngrams(reference, order)
        grams = _ngrams(given, order)
        row += [(grams & allowed).total(), grams.total()]
    return row


def _character_ngrams(text: str) -> list[Counter[str]]:
    joined = "".join(text.split())
    return [
        Counter(joined[start : start + order] for start in range(len(joined) - order + 1))
        for order in range(1, _CHRF_ORDER + 1)
    ]


def _chrf_row(given: list[Counter[str]], wanted: list[Counter[str]]) -> NDArray[np.int64]:
    row: list[int] = []
    for ours, theirs in zip(given, wanted, strict=True):
        row += [ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()]
    return np.array(row, np.int64)


def _rouge_scores(given: list[str], wanted: list[str]) -> tuple[float, float, float]:
    unigrams, bigrams = (_overlap_f1(given, wanted, order) for order in (1, 2))
    common = _longest_common_subsequence(given, wanted)
    return unigrams, bigrams, 2 * common / max(1, len(given) + len(wanted))


def _overlap_f1(given: list[str], wanted: list[str], order: int) -> float:
    ours, theirs = _ngrams(given, order), _ngrams(wanted, order)
    return 2 * (ours & theirs).total() / max(1, ours.total() + theirs.total())


def _longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Its length, by one long integer per step instead of a row of a table (Hyyrö 2004)."""
    positions: dict[str, int] = {}
    for position, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << position
    everything = (1 << len(first)) - 1
    row = everything
    for word in second:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(first) - row.bit_count()


def _ngrams(sequence: Sequence[Hashable], order: int) -> Counter[tuple[Hashable, ...]]:
    shifted = (sequence[start:] for start in range(order))
    return Counter(zip(*shifted, strict=False))


def _sum(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    total: NDArray[np.int64] = counts.sum(axis=0)
    return total


def _check(predicted: Sequence[str], expected: References) -> None:
    if len(predicted) != len(expected) or not predicted:
        raise ValueError(
            f"expected as many texts as lists of expected ones, and one at least; found "
            f"{len(predicted):,} and {len(expected):,}"
        )
    if not all(expected):
        raise ValueError("each text needs at least one expected text")
