"""Confidence intervals by resampling the examples (Efron and Tibshirani 1993, chapter 13).

The percentile interval: the metric is computed on as many examples drawn with replacement, many times, and
the interval holds the middle 95 % of the results. It shows how much a metric depends on the examples that the
test set happens to have, and nothing about the randomness of training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interval:
    """The bounds of a metric."""

    low: float
    high: float


def bootstrap_intervals(
    metrics: Callable[[NDArray[np.int64]], Mapping[str, float]],
    num_examples: int,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """The interval of each metric, from the same draws for all of them.

    Not scipy.stats.bootstrap: it takes one metric at a time, and refuses a single example and metrics that
    some draws do not have.

    Args:
        metrics: the metrics by name of the examples at these indices, some of which occur twice
            and some not at all.
        num_examples: indices are below this.
        num_resamples: number of draws.
        confidence: share of the draws inside the interval.
        seed: of the draws; the same seed gives the same intervals.

    Raises:
        ValueError: there are no examples or no draws, or the confidence is not between 0 and 1.
    """
    if num_examples < 1 or num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            "expected at least one example and one draw and a confidence between 0 and 1; found "
            f"{num_examples}, {num_resamples} and {confidence}"
        )
    generator = np.random.default_rng(seed)
    values: dict[str, list[float]] = {}
    for _ in range(num_resamples):
        for name, value in metrics(generator.integers(num_examples, size=num_examples)).items():
            values.setdefault(name, []).append(value)
    tail = 50 * (1 - confidence)
    return {
        name: Interval(*(float(bound) for bound in np.percentile(drawn, [tail, 100 - tail])))
        for name, drawn in values.items()
    }
