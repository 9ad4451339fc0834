"""BERT-whitening: an affine map after which embeddings have no mean and no preferred direction.

Su, Cao, Liu and Ou 2021 (arXiv 2103.15316), section 3. With the mean m and the covariance C = U L U^T of
the embeddings of some texts

    x  ->  (x - m) W        W = the first k columns of U L^(-1/2), largest eigenvalues first

so that the cosine of two embeddings, which assumes orthonormal axes, means something; fewer columns cost
little and often help. The paper's C divides by the number of texts, as here. Different from it: k is at
most the rank of C, since fewer texts than dimensions leave directions of no variance, through which W
would blow up rounding errors; and a small epsilon is added to the eigenvalues.

    n texts   d dimensions before   k after

Knows nothing of models: numpy in, numpy out.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Variances below this part of the largest one are rounding errors of fp32 embeddings.
_LEAST_VARIANCE = 1e-10
EPSILON = 1e-12


@dataclass(frozen=True)
class Whitening:
    """The map: x -> (x - mean) @ kernel."""

    mean: NDArray[np.float64]
    """(d,)"""
    kernel: NDArray[np.float64]
    """(d, k) W."""
    num_texts: int
    """How many it was fitted on."""

    def transform(self, embeddings: ArrayLike) -> NDArray[np.float64]:
        """(n, d) -> (n, k)."""
        moved: NDArray[np.float64] = (np.asarray(embeddings, np.float64) - self.mean) @ self.kernel
        return moved


class CovarianceSum:
    """Mean and covariance of embeddings that come in batches, in the memory of one d x d matrix."""

    def __init__(self) -> None:
        self.num_texts = 0
        self._mean: NDArray[np.float64] | Any = 0.0
        self._scatter: NDArray[np.float64] | Any = 0.0

    def add(self, embeddings: ArrayLike) -> Self:
        """Add (n, d) embeddings."""
        batch = np.asarray(embeddings, np.float64)
        if not len(batch):
            return self
        mean = batch.mean(axis=0)
        centred, difference = batch - mean, mean - self._mean
        total = self.num_texts + len(batch)
        # Chan, Golub and LeVeque 1979: the sums of squares of two groups about their common mean.
        between = np.outer(difference, difference) * (self.num_texts * len(batch) / total)
        self._scatter = self._scatter + centred.T @ centred + between
        self._mean = self._mean + difference * (len(batch) / total)
        self.num_texts = total
        return self

    def whitening(
        self, *, num_dimensions: int | None = None, epsilon: float = EPSILON
    ) -> Whitening:
        """The map that whitens what was added.

        Args:
            num_dimensions: k, at most; without it as many as there are, in both cases at most the rank.
            epsilon: part of the largest variance that is added to each.

        Raises:
            ValueError: there are fewer than two different embeddings.
        """
        if self.num_texts < 2 or not np.any(self._scatter):
            raise ValueError("whitening needs at least two texts with different embeddings")
        variances, directions = np.linalg.eigh(self._scatter / self.num_texts)
        variances, directions = variances[::-1], directions[:, ::-1]  # largest first
        largest = variances[0]
        rank = min(self.num_texts - 1, int((variances > _LEAST_VARIANCE * largest).sum()))
        num_kept = rank if num_dimensions is None else min(rank, num_dimensions)
        kernel = directions[:, :num_kept] / np.sqrt(variances[:num_kept] + epsilon * largest)
        # An eigenvector's sign is arbitrary: the largest entry is made positive, on every machine.
        peaks = kernel[np.abs(kernel).argmax(axis=0), np.arange(num_kept)]
        return Whitening(self._mean, kernel * np.sign(peaks), self.num_texts)


def fit_whitening(
    embeddings: ArrayLike, *, num_dimensions: int | None = None, epsilon: float = EPSILON
) -> Whitening:
    """The map that whitens (n, d) embeddings; see `CovarianceSum.whitening`."""
    return CovarianceSum().add(embeddings).whitening(num_dimensions=num_dimensions, epsilon=epsilon)
