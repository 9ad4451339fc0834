"""Bags of words: similarity of TF-IDF vectors, and a logistic regression on them, by scikit-learn."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")
# Inverse strength of the penalty on squared weights: ten times scikit-learn's default was best on docstrings.
_INVERSE_PENALTY = 10.0
_MAX_STEPS = 1000


def words(text: str) -> list[str]:
    """Words of a text in lower case."""
    return _WORD.findall(text.lower())


def class_probabilities(
    known: Sequence[Sequence[str]],
    classes: Sequence[int],
    texts: Sequence[Sequence[str]],
    *,
    num_classes: int,
) -> NDArray[np.float64]:
    """(texts, classes) of a logistic regression.

    Args:
        known: words of each text to learn from.
        classes: the class of each of them.
        texts: words of each text to classify.
        num_classes: how many there are; those without a text have the probability 0.
    """
    from sklearn.linear_model import LogisticRegression  # a second, and only needed here

    probabilities = np.zeros((len(texts), num_classes))
    seen = sorted(set(classes))
    if len(seen) == 1:
        probabilities[:, seen] = 1.0
        return probabilities
    vectors = _tf_idf(known)
    # For two classes scikit-learn learns one vector of weights; the optimum of two has twice the penalty.
    strength = _INVERSE_PENALTY * (2 if len(seen) == 2 else 1)
    model = LogisticRegression(C=strength, max_iter=_MAX_STEPS)
    model.fit(vectors.transform(known), classes)
    probabilities[:, seen] = model.predict_proba(vectors.transform(texts))
    return probabilities


def cosines(
    known: Sequence[Sequence[str]],
    firsts: Sequence[Sequence[str]],
    seconds: Sequence[Sequence[str]],
) -> NDArray[np.float64]:
    """(pairs,) cosines of the TF-IDF vectors of two texts; `known` tells how rare a word is."""
    vectors = _tf_idf(known)
    products = vectors.transform(firsts).multiply(vectors.transform(seconds))
    return np.asarray(products.sum(axis=1), np.float64).reshape(-1)


def similarities(
    train_rows: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> list[float]:
    """`cosines` of the fields `text` and `text_pair` of rows; 0 for one text alone."""
    known = [
        words(row[name]) for row in train_rows for name in ("text", "text_pair") if name in row
    ]
    firsts = [words(row["text"]) for row in rows]
    seconds = [words(row.get("text_pair") or "") for row in rows]
    return [float(cosine) for cosine in cosines(known, firsts, seconds)]


def _tf_idf(texts: Sequence[Sequence[str]]) -> Any:
    """Term frequency times inverse document frequency, of length 1 (Sparck Jones 1972)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # A vocabulary must not be empty; the empty word stands in no text.
    vocabulary = sorted(set(itertools.chain.from_iterable(texts))) or [""]
    return TfidfVectorizer(analyzer=list, vocabulary=vocabulary).fit(texts)
