"""Confidence intervals by drawing the examples again (Efron and Tibshirani 1993, chapter 13).

The percentile interval: the figure is computed on as many examples drawn with replacement, many times
over, and the middle 95 % of what comes out is the interval. It says how far the figure depends on which
examples the test set happens to hold, and nothing of the randomness of training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Interval:
    """The bounds of a figure."""

    low: float
    high: float


def bootstrap_intervals(
    figures: Callable[[NDArray[np.int64]], Mapping[str, float]],
    num_examples: int,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """The interval of each figure, from the same draws for all of them.

    Args:
        figures: the figures by name of the examples at these positions, of which some are there twice
            and some not at all.
        num_examples: positions run from 0 to this.
        num_resamples: how many times to draw.
        confidence: share of the draws inside the interval.
        seed: of the draws; the same seed gives the same intervals.

    Raises:
        ValueError: there is nothing to draw from, or the confidence is no share.
    """
    if num_examples < 1 or num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            "expected at least one example and one draw and a confidence between 0 and 1; found "
            f"{num_examples}, {num_resamples} and {confidence}"
        )
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(num_resamples):
        for name, value in figures(generator.integers(num_examples, size=num_examples)).items():
            found.setdefault(name, []).append(value)
    tail = 50 * (1 - confidence)
    return {
        name: Interval(*(float(bound) for bound in np.percentile(values, [tail, 100 - tail])))
        for name, values in found.items()
    }


def bootstrap_mean(
    values: ArrayLike, *, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The interval of the mean of one number per example, such as 1 for right and 0 for wrong."""
    array = np.asarray(values, np.float64)
    intervals = bootstrap_intervals(
        lambda positions: {"mean": float(array[positions].mean())},
        len(array),
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )
    return intervals["mean"]
