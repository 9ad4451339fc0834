"""Agreement of numbers: against the definitions, and cases worked by hand."""

import numpy as np
import pytest

from full_stack_transformer.metrics.regression import (
    pearson,
    regression_metrics,
    spearman,
)


def test_pearson_equals_numpys() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 50))
    assert pearson(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert pearson(first, 3 * first - 7) == pytest.approx(1)
    assert pearson(first * 1e-200, -first) == pytest.approx(-1)


def test_ranks_equal_counting_the_smaller_and_the_equal_ones() -> None:
    first, second = np.random.default_rng(1).integers(10, size=(2, 100))  # with equal numbers
    ranks = [
        [(values < one).sum() + ((values == one).sum() + 1) / 2 for one in values]
        for values in (first, second)
    ]
    assert spearman(first, second) == pytest.approx(pearson(*ranks))


def test_spearman_sees_order_only() -> None:
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5).
    assert spearman([5, 6, 6, 7], [0, 2, 1, 3]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_a_constant_side_has_no_correlation() -> None:
    assert pearson([1, 1, 1], [1, 2, 3]) == 0
    assert spearman([1, 2, 3], [4, 4, 4]) == 0


def test_the_errors_are_means() -> None:
    metrics = regression_metrics([1, 2, 3], [1, 4, 2])
    assert metrics["mean_squared_error"] == pytest.approx(5 / 3)
    assert metrics["mean_absolute_error"] == 1


@pytest.mark.parametrize(("first", "second"), [([1], [1, 2]), ([], [])], ids=["lengths", "empty"])
def test_what_is_no_pair_is_refused(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match=r"one length|no examples"):
        regression_metrics(first, second)
