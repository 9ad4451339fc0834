"""How well predicted numbers agree with expected ones: Pearson, Spearman, mean squared and absolute error."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def regression_metrics(expected: ArrayLike, predicted: ArrayLike) -> dict[str, float]:
    """Every metric of this module by name.

    Args:
        expected: (examples,) numbers.
        predicted: (examples,) numbers.

    Raises:
        ValueError: the lengths differ, or there are no examples.
    """
    wanted, given = _pair(expected, predicted)
    return {
        "pearson": pearson(wanted, given),
        "spearman": spearman(wanted, given),
        "mean_squared_error": float(np.mean((wanted - given) ** 2)),
        "mean_absolute_error": float(np.mean(np.abs(wanted - given))),
    }


def pearson(first: ArrayLike, second: ArrayLike) -> float:
    """Linear correlation, -1 to 1; 0 if one side is constant, where it is not defined."""
    import scipy.stats  # half a second, and only needed here

    a, b = _pair(first, second)
    return 0.0 if _is_constant(a, b) else float(scipy.stats.pearsonr(a, b).statistic)


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Correlation of the ranks, -1 to 1; equal numbers share their mean rank."""
    import scipy.stats

    a, b = _pair(first, second)
    return 0.0 if _is_constant(a, b) else float(scipy.stats.spearmanr(a, b).statistic)


def _is_constant(*sides: NDArray[np.float64]) -> bool:
    return any(side.min() == side.max() for side in sides)


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(
            f"expected two sequences of one length, found shapes {a.shape} and {b.shape}"
        )
    if not len(a):
        raise ValueError("there are no examples to measure")
    return a, b
