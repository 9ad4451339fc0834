"""Metrics of texts and answers: cases worked by hand, and slow obvious versions."""

import math
import random
import unicodedata
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from full_stack_transformer.metrics.texts import (
    Overlap,
    answer_f1,
    distinct,
    exact_match,
    normalized_answer,
    repetition,
    span_metrics,
    words,
)


def bleu(predicted: Sequence[str], expected: Sequence[Sequence[str]]) -> float:
    return Overlap(predicted, expected).metrics()["bleu"]


def chrf(predicted: Sequence[str], expected: Sequence[Sequence[str]]) -> float:
    return Overlap(predicted, expected).metrics()["chrf"]


def rouge(predicted: Sequence[str], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    metrics = Overlap(predicted, expected).metrics()
    return {name: metrics[name] for name in ("rouge1", "rouge2", "rougeL")}


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
    # 4 + 1 of 6 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours; 6 words given, 5 expected.
    expected = 100 * (5 / 6 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert bleu(given, wanted) == pytest.approx(expected)
    overlap = Overlap(given, wanted)
    assert overlap.metrics(np.array([0, 0])) == pytest.approx(
        Overlap(given[:1] * 2, wanted[:1] * 2).metrics()
    )


@pytest.mark.parametrize(
    ("given", "wanted", "score"),
    [("", "one two three four", 0), ("one", "one", 0), ("x y z u", "a b c d", 0)],
    ids=["empty", "short", "no-hit"],
)
def test_texts_without_fours_or_hits_have_bleu_zero(given: str, wanted: str, score: float) -> None:
    assert bleu([given], [[wanted]]) == score


def test_the_words_of_bleu_are_mteval_13as_and_each_ideograph() -> None:
    text = 'It\'s "3.5, 1,000 or 5-6" &amp; well-known (a_b).\n语言'
    parted = 'It\'s " 3.5 , 1,000 or 5 - 6 " & well-known ( a _ b ) . 语 言'
    assert bleu([text], [[parted]]) == pytest.approx(100)
    # 4 of 5 characters, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours.
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert bleu(["一二三四五"], [["一二三四六"]]) == pytest.approx(expected)


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
    assert chrf(["ab"], [["ab"]]) == pytest.approx(100)


def test_rouge_worked_by_hand() -> None:
    given, wanted = "The cat sat on the mat.", "the Cat was on a mat"
    metrics = rouge([given], [[wanted]])
    assert metrics["rouge1"] == pytest.approx(2 * 4 / 12)  # the cat on mat
    assert metrics["rouge2"] == pytest.approx(2 * 1 / 10)  # the cat
    assert metrics["rougeL"] == pytest.approx(2 * 4 / 12)
    assert rouge(["on cat"], [["cat on"]])["rougeL"] == pytest.approx(2 * 1 / 4)
    assert set(rouge([""], [[""]]).values()) == {0}


def test_the_words_of_rouge_are_of_any_language() -> None:
    assert words("Über a_b: 3.5 语言!") == ["über", "a", "b", "3", "5", "语", "言"]


def test_the_longest_common_subsequence_equals_trying_all() -> None:
    draw = random.Random(0)
    for _ in range(100):
        first, second = (draw.choices("abc", k=draw.randint(1, 8)) for _ in range(2))
        everything = (
            len(one)
            for size in range(len(first) + 1)
            for one in combinations(first, size)
            if _is_subsequence(one, second)
        )
        found = rouge([" ".join(first)], [[" ".join(second)]])["rougeL"]
        assert found == pytest.approx(2 * max(everything) / (len(first) + len(second)))


def _is_subsequence(one: tuple[str, ...], text: list[str]) -> bool:
    rest = iter(text)
    return all(character in rest for character in one)


def test_exact_match_overlooks_white_space_at_the_ends() -> None:
    overlap = Overlap([" yes\n", "No", ""], [["no", "yes"], ["no"], [" "]])
    assert overlap.metrics()["exact_match"] == 2 / 3


def test_distinct_counts_over_all_texts_and_repetition_within_each() -> None:
    texts = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(texts, 1) == 3 / 7
    assert distinct(texts, 2) == 3 / 5
    assert repetition(texts, 2) == pytest.approx((1 / 3 + 0) / 2)
    assert repetition([[1], *texts], 2) == repetition(texts, 2)  # one word has no pair
    assert distinct([[]], 1) == repetition([[]], 1) == 0


def test_texts_without_expected_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="as many texts"):
        Overlap(["a"], [])
    with pytest.raises(ValueError, match="as many texts"):
        Overlap([], [])
    with pytest.raises(ValueError, match="at least one expected text"):
        Overlap(["a"], [[]])


def test_the_metrics_of_equal_texts_are_perfect() -> None:
    texts = ["a longer text of words", "and another one, with 3 points..."]
    expected = [[text] for text in texts]
    assert np.isclose([bleu(texts, expected), chrf(texts, expected)], 100).all()
    assert set(rouge(texts, expected).values()) == {1}


def test_case_punctuation_articles_and_spaces_do_not_count() -> None:
    assert normalized_answer(" The  Dog's,\n an apple-pie! ") == "dogs applepie"
    assert normalized_answer("Theatre a") == "theatre"


@pytest.mark.parametrize(
    ("expected", "predicted", "is_exact", "f1"),
    [
        (["the list"], "List.", 1, 1),
        (["a new list"], "the list", 0, 2 / 3),
        (["a tuple", "new tuple of items"], "new tuple", 0, 2 / 3),
        (["one two"], "three", 0, 0),
        (["to be to"], "to to to", 0, 2 / 3),
        ([], "", 1, 1),
        ([""], "something", 0, 0),
        (["something"], "", 0, 0),
        (["the"], "", 1, 1),
    ],
    ids=[
        "normalised",
        "part",
        "best-of-several",
        "nothing-in-common",
        "repeated-word-counts-as-often-as-expected",
        "rightly-no-answer",
        "wrongly-an-answer",
        "wrongly-no-answer",
        "nothing-but-an-article",
    ],
)
def test_one_answer(expected: list[str], predicted: str, is_exact: float, f1: float) -> None:
    assert exact_match(expected, predicted) == is_exact
    assert answer_f1(expected, predicted) == pytest.approx(f1)


def test_questions_with_and_without_an_answer_are_counted_apart() -> None:
    metrics = span_metrics([["new list"], ["x"], [], [""]], ["list", "x", "", "wrong"])
    assert metrics.exact_match == 2 / 4
    assert metrics.f1 == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)
    assert metrics.has_answer_exact_match == 1 / 2
    assert metrics.has_answer_f1 == pytest.approx(5 / 6)
    assert metrics.no_answer_accuracy == 1 / 2


def test_a_kind_that_is_not_there_has_no_metric() -> None:
    assert set(span_metrics([["x"]], ["x"]).scalars()) == {
        "exact_match",
        "f1",
        "has_answer_exact_match",
        "has_answer_f1",
    }


@pytest.mark.parametrize(("expected", "predicted"), [([["x"]], []), ([], [])])
def test_answers_without_questions_are_refused(
    expected: list[list[str]], predicted: list[str]
) -> None:
    with pytest.raises(ValueError, match="as many answers as questions"):
        span_metrics(expected, predicted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी में लिखा", ["हिन्दी", "में", "लिखा"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("ที่นี่ ๑๒ abc", ["ที่", "นี่", "๑๒", "abc"]),
        ("ປະເທດ", ["ປ", "ະ", "ເ", "ທ", "ດ"]),
        ("Việt déjà-vu", ["việt", "déjà", "vu"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("עִבְרִית", ["עִבְרִית"]),
        ("한국어 データ", ["한국어", "デ", "ー", "タ"]),
        ("\u0301 the_end", ["the", "end"]),
        ("𑀅𑀁𑀓 \U00020000x", ["𑀅𑀁𑀓", "\U00020000", "x"]),
    ],
    ids=[
        *("Hindi", "Tamil", "Thai", "Lao", "Latin", "Persian", "Hebrew", "Korean and Japanese"),
        *("a lone mark", "above U+FFFF"),
    ],
)
def test_marks_belong_to_their_letters_in_every_form(text: str, expected: list[str]) -> None:
    expected = [unicodedata.normalize("NFC", word) for word in expected]
    for form in ("NFC", "NFD"):
        assert words(unicodedata.normalize(form, text)) == expected


def test_words_that_differ_in_a_vowel_sign_differ() -> None:
    assert rouge(["कि"], [["का"]])["rouge1"] == 0
    # Two words of three.
    assert rouge(["கல் நல்ல பால்"], [["கல் நல்ல பல்"]])["rouge1"] == pytest.approx(2 / 3)
    # ฉั น กิ น in common, of 9 and 8 letters.
    assert rouge(["ฉันกินข้าว"], [["ฉันกินปลา"]])["rouge1"] == pytest.approx(5 / 7)


def test_the_normal_form_makes_no_difference() -> None:
    composed = ["à la carte, voilà le café", "データ"]
    decomposed = [unicodedata.normalize("NFD", text) for text in composed]
    assert decomposed != composed
    expected = Overlap(composed, [[text] for text in composed]).metrics()
    assert Overlap(decomposed, [[text] for text in composed]).metrics() == expected
    assert normalized_answer(decomposed[0]) == normalized_answer(composed[0])
