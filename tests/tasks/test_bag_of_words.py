"""Baselines that count words: against the definitions, and where there is little to count."""

import math

import numpy as np
import pytest

from full_stack_transformer.tasks.bag_of_words import class_probabilities, cosines, words


def test_the_cosine_is_that_of_tf_idf_vectors() -> None:
    known = [["a", "b"], ["a", "c"], ["a"]]
    often, rare = 1 + math.log(4 / 4), 1 + math.log(4 / 2)
    expected = often * often / math.hypot(often, rare) ** 2
    assert cosines(known, [["a", "b"]], [["a", "c"]]) == pytest.approx(expected)
    assert cosines(known, [["a"], ["b"], ["d"]], [["a"], ["c"], ["d"]]).tolist() == [1, 0, 0]


def test_words_tell_classes_apart() -> None:
    known = [words(f"{kind} {index}") for index in range(20) for kind in ("Yes!", "no", "maybe")]
    found = class_probabilities(known, [0, 1, 2] * 20, [["yes"], ["no"], ["maybe"]], num_classes=4)
    assert found.argmax(axis=1).tolist() == [0, 1, 2]
    assert found.sum(axis=1) == pytest.approx(1)
    assert not found[:, 3].any()


def test_without_words_or_classes_to_tell_apart_the_shares_decide() -> None:
    assert class_probabilities([["a"]], [1], [["b"]], num_classes=2).tolist() == [[0, 1]]
    found = class_probabilities([[], [], [], []], [0, 0, 0, 1], [["a"]], num_classes=2)
    assert found[0] == pytest.approx(np.array([3 / 4, 1 / 4]), abs=1e-3)
    assert cosines([[]], [["a"]], [["a"]]).tolist() == [0]
