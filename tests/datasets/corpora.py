"""Corpora of random tokens, and what is known of samples without any tokens."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.datasets.corpus import Corpus, CorpusWriter
from full_stack_transformer.datasets.order import ShardLayout

VOCAB_SIZE = 1000
PAD_ID = 3


def short_lengths(num_samples: int) -> NDArray[np.int64]:
    """Documents of mean 41 tokens, at most 256, as skewed as real ones."""
    lengths = np.random.default_rng(0).lognormal(np.log(33), 0.65, num_samples)
    return np.clip(lengths.astype(np.int64), 2, 256)


def write_corpus(directory: Path, lengths: NDArray[np.int64]) -> Corpus:
    """Samples of these lengths; the pad token occurs in them too."""
    num_tokens = int(lengths.sum())
    with CorpusWriter(directory, VOCAB_SIZE) as writer:
        writer.append(np.random.default_rng(1).integers(0, VOCAB_SIZE, num_tokens), lengths)
    return Corpus(directory, num_samples=len(lengths), num_tokens=num_tokens)


@dataclass(frozen=True)
class SamplesWithoutTokens:
    """One after the other, by their lengths alone."""

    lengths: NDArray[np.int64]
    layout: ShardLayout | None = None

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Unlike for each sample."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples together."""
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def spans(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start and tokens of each of the samples."""
        return self.starts[numbers], self.lengths[numbers]

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """All tokens but the first of each."""
        return lengths - 1


@dataclass(frozen=True)
class ManySamples:
    """Any number of samples, of 2 to 79 tokens in turn, in no memory at all."""

    num_samples: int
    layout: ShardLayout | None = None

    @property
    def num_tokens(self) -> int:
        """About the tokens of all samples together."""
        return self.num_samples * 81 // 2

    def __len__(self) -> int:
        return self.num_samples

    def spans(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A start that names the sample, and tokens of each."""
        return numbers * 80, 2 + numbers % 78

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """All tokens but the first of each."""
        return lengths - 1
