"""Confidence intervals: seeded, as wide as theory says, and of metrics that are no means too."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from full_stack_transformer.evaluation.bootstrap import Interval, bootstrap_intervals
from full_stack_transformer.metrics.classification import classification_metrics


def bootstrap_mean(values: ArrayLike, **options: Any) -> Interval:
    array = np.asarray(values)
    return bootstrap_intervals(
        lambda indices: {"mean": float(array[indices].mean())}, len(array), **options
    )["mean"]


def test_the_interval_of_a_share_is_as_wide_as_theory_says() -> None:
    right = np.repeat([1.0, 0.0], [320, 80])
    interval = bootstrap_mean(right)
    deviation = np.sqrt(0.8 * 0.2 / 400)
    assert interval.low == pytest.approx(0.8 - 1.96 * deviation, abs=0.006)
    assert interval.high == pytest.approx(0.8 + 1.96 * deviation, abs=0.006)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_a_larger_confidence_is_a_wider_interval() -> None:
    values = np.random.default_rng(0).normal(size=50)
    half, most = (bootstrap_mean(values, confidence=share) for share in (0.5, 0.99))
    assert most.low < half.low < half.high < most.high


def test_several_figures_are_drawn_together() -> None:
    generator = np.random.default_rng(0)
    expected = generator.integers(3, size=100)
    predicted = np.where(generator.random(100) < 0.6, expected, 0)

    def metrics(indices: np.ndarray) -> dict[str, float]:
        drawn = classification_metrics(expected[indices], predicted[indices], ["a", "b", "c"])
        return drawn.scalars()

    intervals = bootstrap_intervals(metrics, 100, num_resamples=200)
    for name, value in metrics(np.arange(100)).items():
        assert intervals[name].low < value < intervals[name].high
    assert intervals["accuracy"] == intervals["f1_micro"]


def test_one_example_has_a_point_for_an_interval() -> None:
    assert bootstrap_mean([0.5]) == Interval(0.5, 0.5)


@pytest.mark.parametrize(
    "options",
    [{"num_resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}],
    ids=["no-draw", "certain", "nothing"],
)
def test_what_gives_no_interval_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least one example and one draw"):
        bootstrap_mean([1.0, 2.0], **options)
    with pytest.raises(ValueError, match="at least one example"):
        bootstrap_mean([])
