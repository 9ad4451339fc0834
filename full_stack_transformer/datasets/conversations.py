"""Conversations and preferences, cut to a length for training; they are whole in the dataset directory.

    conversation  system, user, answer 1, user, answer 2, user, answer 3
    cut           system, user, answer 1, user, answer 2          the last answer that fits is the end

Half an answer is never learned: what comes after the cut is left out and counted. A conversation whose first
answer does not fit is left out as a whole. Which samples form a batch is decided as for documents: `batches`.
"""

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.datasets.batches import BatchSpans
from full_stack_transformer.datasets.collators import Batch, PaddedCollator
from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.datasets.cuts import cut_after_answers
from full_stack_transformer.datasets.order import ShardLayout
from full_stack_transformer.errors import DatasetError


class Conversations:
    """The conversations of a corpus, each cut after the last answer that fits; `Samples` for a batch plan.

    Args:
        corpus: of a dataset directory of conversations.
        max_length: tokens of the longest sample.

    Raises:
        DatasetError: no answer fits.
    """

    def __init__(self, corpus: Corpus, max_length: int) -> None:
        lengths, num_targets, self.left_out = cut_after_answers(corpus, max_length)
        kept = np.flatnonzero(num_targets)
        if not len(kept):
            raise DatasetError(
                f"{corpus.directory}: no conversation has an answer that ends within {max_length:,} tokens; "
                "train with a longer context"
            )
        self._starts, self._lengths = corpus.start_positions.take(kept), lengths[kept]
        self._num_targets = num_targets[kept]
        self.layout = layout_of(corpus, kept)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples together."""
        return int(self._lengths.sum())

    def __len__(self) -> int:
        return len(self._starts)

    def spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start in the corpus and tokens of each of the samples (n,)."""
        return self._starts[indices], self._lengths[indices]

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Learned tokens of each of the samples with these spans; never the first of a sample."""
        return self._num_targets[np.searchsorted(self._starts, starts)]


class PreferencePairs:
    """Pairs of a preferred and a rejected answer, of which both fit; `Samples` for a batch plan.

    A span is a whole pair: sample 2i, which was chosen, and sample 2i + 1 after it, which was rejected.

    Args:
        corpus: of a dataset directory of preferences.
        max_length: tokens of the longest sample of a pair.

    Raises:
        DatasetError: no pair fits.
    """

    def __init__(self, corpus: Corpus, max_length: int) -> None:
        if len(corpus) % 2:
            raise DatasetError(
                f"{corpus.directory} holds {len(corpus):,} samples, which are no pairs; prepare the dataset "
                "again"
            )
        lengths = corpus.lengths().reshape(-1, 2)
        self._corpus = corpus
        self._kept = np.flatnonzero(lengths.max(axis=1, initial=0) <= max_length)
        if not len(self._kept):
            raise DatasetError(
                f"{corpus.directory}: no pair of answers ends within {max_length:,} tokens; train with a "
                "longer context"
            )
        self.num_left_out = len(lengths) - len(self._kept)
        self.layout = layout_of(corpus, 2 * self._kept)

    @property
    def num_tokens(self) -> int:
        """Tokens of all pairs together."""
        return int(self.spans(np.arange(len(self)))[1].sum())

    def __len__(self) -> int:
        return len(self._kept)

    def spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start in the corpus and tokens of each of the pairs (n,)."""
        first = 2 * self._kept[indices]
        starts, chosen = self._corpus.spans(first)
        return starts, chosen + self._corpus.spans(first + 1)[1]

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """One for each pair: the mean of a loss is over pairs."""
        return np.ones(len(starts), dtype=np.int64)


class PairCollator:
    """The chosen samples of the pairs of a batch, then the rejected ones in the same order.

    `input_ids` and `labels` are (2 * pairs, tokens), padded on the right.
    """

    def __init__(self, corpus: Corpus, *, pad_id: int) -> None:
        self._corpus = corpus
        self._padded = PaddedCollator(corpus, pad_id=pad_id)

    def __call__(self, spans: BatchSpans) -> Batch:
        """`input_ids` and `labels`; a filler has a single token of one sample, twice."""
        if spans.is_filler:
            both = np.concatenate([spans.starts, spans.starts]), np.ones(2, dtype=np.int64)
        else:
            chosen = self._corpus.samples_at(spans.starts)
            both = self._corpus.spans(np.concatenate([chosen, chosen + 1]))
        rows = np.arange(len(both[0]))
        return self._padded(BatchSpans(*both, rows, len(rows), spans.epoch, spans.is_filler))


def layout_of(corpus: Corpus, kept: NDArray[np.int64]) -> ShardLayout | None:
    """The shards of a corpus in those samples that are kept, by their ascending indices (n,)."""
    layout = corpus.layout
    return layout and layout.with_borders(np.searchsorted(kept, layout.borders))
