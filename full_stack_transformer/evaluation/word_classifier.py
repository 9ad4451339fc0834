"""Bags of words: TF-IDF vectors, and a logistic regression on them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

# Strength of the penalty on the sum of squared weights, for each row: scikit-learn's default, C = 1, is one
# over the number of rows; on docstrings a tenth of it was best.
_PENALTY = 0.1
_MAX_STEPS = 100


@dataclass(frozen=True)
class TfIdf:
    """Term frequency times inverse document frequency, of length 1 (Sparck Jones 1972).

    Smoothed as scikit-learn does: idf = 1 + log((1 + n) / (1 + documents with the word)).
    """

    number_of_word: dict[str, int]
    weights: NDArray[np.float64]
    """(words,) the inverse document frequency of each."""

    def vector(self, words: Sequence[str]) -> dict[int, float]:
        """Weights by the number of the word; words that are not known are left out."""
        counts = Counter(self.number_of_word[word] for word in words if word in self.number_of_word)
        values = {number: count * self.weights[number] for number, count in counts.items()}
        norm = math.sqrt(sum(value * value for value in values.values())) or 1.0
        return {number: float(value / norm) for number, value in values.items()}

    def matrix(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """Sparse (texts, words)."""
        rows, columns, values = [], [], []
        for row, words in enumerate(texts):
            for column, value in self.vector(words).items():
                rows.append(row)
                columns.append(column)
                values.append(value)
        size = (len(texts), len(self.number_of_word))
        return torch.sparse_coo_tensor(
            torch.tensor([rows, columns], dtype=torch.int64).reshape(2, -1),
            torch.tensor(values, dtype=torch.float32),
            size,
            check_invariants=False,
        ).coalesce()

    def cosines(
        self, firsts: Sequence[Sequence[str]], seconds: Sequence[Sequence[str]]
    ) -> NDArray[np.float64]:
        """(pairs,) of the vectors of both."""
        found = []
        for first, second in zip(firsts, seconds, strict=True):
            left, right = self.vector(first), self.vector(second)
            found.append(sum(value * right.get(number, 0.0) for number, value in left.items()))
        return np.array(found)


def tf_idf(texts: Sequence[Sequence[str]]) -> TfIdf:
    """Count the words of texts."""
    counts = Counter(word for words in texts for word in set(words))
    number_of_word = {word: number for number, word in enumerate(sorted(counts))}
    weights = [1 + math.log((1 + len(texts)) / (1 + counts[word])) for word in number_of_word]
    return TfIdf(number_of_word, np.array(weights))


@dataclass(frozen=True)
class WordClassifier:
    """Multinomial logistic regression on TF-IDF vectors."""

    vectors: TfIdf
    weights: Tensor
    """(words, classes)"""
    bias: Tensor
    """(classes,)"""

    @classmethod
    def learn(
        cls, texts: Sequence[Sequence[str]], classes: Sequence[int], *, num_classes: int
    ) -> Self:
        """The optimum, by L-BFGS; deterministic.

        Args:
            texts: words of each.
            classes: the class of each.
            num_classes: how many there are.
        """
        vectors = tf_idf(texts)
        matrix, targets = vectors.matrix(texts), torch.tensor(classes)
        weights = torch.zeros(len(vectors.number_of_word), num_classes, requires_grad=True)
        bias = torch.zeros(num_classes, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights, bias], max_iter=_MAX_STEPS, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(torch.sparse.mm(matrix, weights) + bias, targets)
            loss = loss + _PENALTY / len(texts) * weights.square().sum() / 2
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return cls(vectors, weights.detach(), bias.detach())

    def probabilities(self, texts: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """(texts, classes)"""
        logits = torch.sparse.mm(self.vectors.matrix(texts), self.weights) + self.bias
        found: NDArray[np.float64] = logits.softmax(-1).double().numpy()
        return found
