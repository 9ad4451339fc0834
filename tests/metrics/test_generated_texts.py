"""Figures of generated texts: cases worked by hand, and slow obvious versions."""

import math
import random
from itertools import combinations

import numpy as np
import pytest

from full_stack_transformer.metrics import generated_texts
from full_stack_transformer.metrics.generated_texts import (
    bleu,
    bleu_counts,
    bleu_of_counts,
    bleu_words,
    chrf,
    chrf_counts,
    distinct,
    exact_match,
    repetition,
    rouge,
    words,
)


def test_bleu_worked_by_hand() -> None:
    given, wanted = "the cat sat on the mat today", "the cat sat on a mat"
    # Words: 5 of 7 ("the" once), pairs: 3 of 6, triples 2 of 5, fours 1 of 4; not too short.
    expected = 100 * (5 / 7 * 3 / 6 * 2 / 5 * 1 / 4) ** (1 / 4)
    assert bleu([given], [[wanted]]) == pytest.approx(expected)
    # The other way round: hits out of 6, 5, 4 and 3, and a word too short.
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4) * math.exp(1 - 7 / 6)
    assert bleu([wanted], [[given]]) == pytest.approx(expected)


def test_orders_without_a_hit_are_smoothed_by_halves() -> None:
    # 4 of 5 words, 1 of 4 pairs; for 3 triples and 2 fours 1/2 and 1/4 of a hit.
    expected = 100 * (4 / 5 * 1 / 4 * (1 / 2) / 3 * (1 / 4) / 2) ** (1 / 4)
    assert bleu(["a b x d c"], [["a b c d e"]]) == pytest.approx(expected)


def test_bleu_of_texts_is_that_of_the_summed_counts() -> None:
    given = ["one two three four five", "six"]
    wanted = [["one two three four"], ["seven", "six eight"]]
    counts = bleu_counts(given, wanted)
    assert counts.tolist() == [[5, 4, 4, 5, 3, 4, 2, 3, 1, 2], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert bleu(given, wanted) == bleu_of_counts(counts[0] + counts[1])


@pytest.mark.parametrize(
    ("given", "wanted", "figure"),
    [("", "one two three four", 0), ("one", "one", 0), ("x y z u", "a b c d", 0)],
    ids=["empty", "short", "no-hit"],
)
def test_texts_without_fours_or_hits_have_bleu_zero(given: str, wanted: str, figure: float) -> None:
    assert bleu([given], [[wanted]]) == figure


def test_the_words_of_bleu_are_mteval_13as() -> None:
    text = 'It\'s "3.5, 1,000 or 5-6" &amp; well-known (a_b).\n语言'
    expected = 'It\'s " 3.5 , 1,000 or 5 - 6 " & well-known ( a _ b ) . 语 言'
    assert bleu_words(text) == expected.split()


def test_chrf_worked_by_hand() -> None:
    # Without spaces "abcd" and "abce": singles 3 of 4, pairs 2 of 3, triples 1 of 2, fours 0 of 1.
    share = (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4
    assert chrf(["ab cd"], [["a bce"]]) == pytest.approx(100 * share)
    # Recall weighs four times: "ab" of "abcd" is all right, but half of it.
    recall = (2 / 4 + 1 / 3) / 2
    assert chrf(["ab"], [["abcd"]]) == pytest.approx(100 * 5 * recall / (4 + recall))


def test_the_nearest_expected_text_counts_for_chrf() -> None:
    assert chrf(["abc"], [["xyz", "abc", "abd"]]) == pytest.approx(100)
    assert chrf([""], [["abc"]]) == 0
    assert chrf_counts(["ab"], [["ab"]]).tolist() == [[2, 2, 2, 1, 1, 1, *[0] * 12]]


def test_rouge_worked_by_hand() -> None:
    given, wanted = "The cat sat on the mat.", "the Cat was on a mat"
    figures = rouge([given], [[wanted]])
    assert figures["rouge1"] == pytest.approx(2 * 4 / 12)  # the cat on mat
    assert figures["rouge2"] == pytest.approx(2 * 1 / 10)  # the cat
    assert figures["rougeL"] == pytest.approx(2 * 4 / 12)
    assert rouge(["on cat"], [["cat on"]])["rougeL"] == pytest.approx(2 * 1 / 4)
    assert set(rouge([""], [[""]]).values()) == {0}


def test_the_words_of_rouge_are_of_any_language() -> None:
    assert words("Über a_b: 3.5 语言!") == ["über", "a", "b", "3", "5", "语", "言"]


def test_the_longest_common_subsequence_equals_trying_all() -> None:
    draw = random.Random(0)
    for _ in range(100):
        first, second = ("".join(draw.choices("abc", k=draw.randint(0, 8))) for _ in range(2))
        everything = (
            len(one)
            for size in range(len(first) + 1)
            for one in combinations(first, size)
            if _is_subsequence(one, second)
        )
        found = generated_texts._longest_common_subsequence(list(first), list(second))
        assert found == max(everything)


def _is_subsequence(one: tuple[str, ...], text: str) -> bool:
    rest = iter(text)
    return all(character in rest for character in one)


def test_exact_match_overlooks_white_space_at_the_ends() -> None:
    assert exact_match([" yes\n", "No", ""], [["no", "yes"], ["no"], [" "]]) == 2 / 3


def test_distinct_counts_over_all_texts_and_repetition_within_each() -> None:
    texts = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(texts, 1) == 3 / 7
    assert distinct(texts, 2) == 3 / 5
    assert repetition(texts, 2) == pytest.approx((1 / 3 + 0) / 2)
    assert repetition([[1], *texts], 2) == repetition(texts, 2)  # one word has no pair
    assert distinct([[]], 1) == repetition([[]], 1) == 0


@pytest.mark.parametrize("figure", [bleu, chrf, rouge, exact_match])
def test_texts_without_expected_ones_are_refused(figure: object) -> None:
    assert callable(figure)
    with pytest.raises(ValueError, match="as many texts"):
        figure(["a"], [])
    with pytest.raises(ValueError, match="as many texts"):
        figure([], [])
    with pytest.raises(ValueError, match="at least one expected text"):
        figure(["a"], [[]])


def test_the_figures_of_equal_texts_are_perfect() -> None:
    texts = ["a longer text of words", "and another one, with 3 points..."]
    expected = [[text] for text in texts]
    assert np.isclose([bleu(texts, expected), chrf(texts, expected)], 100).all()
    assert set(rouge(texts, expected).values()) == {1}
