"""How well numbers agree with numbers: Pearson, Spearman, mean squared and absolute error."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def regression_metrics(expected: ArrayLike, predicted: ArrayLike) -> dict[str, float]:
    """Every figure of this module by name.

    Args:
        expected: (examples,) numbers.
        predicted: (examples,) numbers.

    Raises:
        ValueError: the lengths differ, or nothing is there.
    """
    wanted, given = _pair(expected, predicted)
    return {
        "pearson": pearson(wanted, given),
        "spearman": spearman(wanted, given),
        "mean_squared_error": float(np.mean((wanted - given) ** 2)),
        "mean_absolute_error": float(np.mean(np.abs(wanted - given))),
    }


def pearson(first: ArrayLike, second: ArrayLike) -> float:
    """Linear correlation, -1 to 1; 0 where one side is constant, which says nothing of the other."""
    a, b = _pair(first, second)
    # Scaled by the largest, or squares of tiny differences would vanish.
    a, b = (_scaled(side - side.mean()) for side in (a, b))
    spread = np.sqrt((a @ a) * (b @ b))
    return float(np.clip((a @ b) / spread, -1, 1)) if spread > 0 else 0.0


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Correlation of the ranks, -1 to 1; equal numbers share their mean rank."""
    a, b = _pair(first, second)
    return pearson(average_ranks(a), average_ranks(b))


def average_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """The rank of each number from 1; equal numbers share the mean of their ranks."""
    array = np.asarray(values, np.float64)
    _, group, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[group]
    return ranks


def _scaled(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    largest = float(np.abs(centred).max())
    return centred / largest if largest > 0 else centred


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(
            f"expected two sequences of one length, found shapes {a.shape} and {b.shape}"
        )
    if not len(a):
        raise ValueError("there are no examples to measure")
    return a, b
