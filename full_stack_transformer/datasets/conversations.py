"""Conversations and preferences, cut to a length for training; they are whole in the dataset directory.

    conversation  system, user, answer 1, user, answer 2, user, answer 3
    cut           system, user, answer 1, user, answer 2          the last answer that fits is the end

Half an answer is never learned: what comes after the cut is left out and counted. A conversation whose first
answer does not fit is left out as a whole. Which samples form a batch is decided as for documents: `batches`.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.datasets.batches import BatchSpans
from full_stack_transformer.datasets.collators import Batch, PaddedCollator
from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.errors import DatasetError

# Tokens that are looked at together.
_TOKENS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class LeftOut:
    """What a length leaves out of a corpus."""

    num_samples: int = 0
    """Conversations (or pairs) without an answer that fits."""
    num_cut_samples: int = 0
    """Conversations of which the end is left out."""
    num_answers: int = 0
    """Answers left out, with those of whole conversations."""
    num_learned_tokens: int = 0
    """Tokens of these answers."""

    def __str__(self) -> str:
        """For a log line; empty if nothing is left out."""
        if not self.num_answers:
            return ""
        return (
            f"{self.num_answers:,} answers ({self.num_learned_tokens:,} tokens) do not fit: "
            f"{self.num_cut_samples:,} conversations end earlier, {self.num_samples:,} are left out"
        )


class Conversations:
    """The conversations of a corpus, each cut after the last answer that fits; `Samples` for a batch plan.

    Args:
        corpus: of a dataset directory of conversations.
        max_length: tokens of the longest sample.

    Raises:
        DatasetError: no answer fits.
    """

    def __init__(self, corpus: Corpus, max_length: int) -> None:
        lengths, num_targets, self.left_out = _cut(corpus, max_length)
        kept = np.flatnonzero(num_targets)
        if not len(kept):
            raise DatasetError(
                f"{corpus.directory}: no conversation has an answer that ends within {max_length:,} tokens; "
                "train with a longer context"
            )
        self._starts, self._lengths = corpus.start_positions[kept], lengths[kept]
        self._num_targets = num_targets[kept]

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
            chosen = np.searchsorted(self._corpus.start_positions, spans.starts)
            both = self._corpus.spans(np.concatenate([chosen, chosen + 1]))
        rows = np.arange(len(both[0]))
        return self._padded(BatchSpans(*both, rows, len(rows), spans.epoch, spans.is_filler))


def _cut(corpus: Corpus, max_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], LeftOut]:
    """Tokens (samples,) and learned ones (samples,) of each conversation up to its cut; what is left out."""
    assert corpus.learned is not None, "a corpus of conversations"
    starts, lengths = corpus.start_positions, corpus.lengths()
    cut_lengths, num_targets = np.zeros_like(lengths), np.zeros_like(lengths)
    num_cut = num_answers = num_tokens = 0
    for first, end in _parts(lengths):
        offset = int(starts[first])
        learned = corpus.learned[offset : int(starts[end - 1] + lengths[end - 1])].astype(bool)
        begins = starts[first:end] - offset
        learned[begins] = False  # nothing comes before it
        # An answer ends at a learned token behind which none is; also at the end of its sample.
        is_end = learned.copy()
        is_end[:-1] &= ~learned[1:]
        ends = np.flatnonzero(is_end)
        sample_of_end = np.searchsorted(begins, ends, side="right") - 1
        fits = ends - begins[sample_of_end] < max_length
        np.maximum.at(
            cut_lengths, first + sample_of_end[fits], (ends - begins[sample_of_end] + 1)[fits]
        )
        # A short conversation stays whole, also what comes after its last answer.
        whole = first + np.flatnonzero(lengths[first:end] <= max_length)
        cut_lengths[whole] = lengths[whole]
        before = np.concatenate([[0], np.cumsum(learned)])
        num_targets[first:end] = before[begins + cut_lengths[first:end]] - before[begins]
        left = ends[~fits]
        num_answers += len(left)
        num_tokens += int(before[-1] - num_targets[first:end].sum())
        num_cut += int(
            np.count_nonzero(
                (cut_lengths[first:end] > 0) & (cut_lengths[first:end] < lengths[first:end])
            )
        )
    left_out = LeftOut(int(np.count_nonzero(cut_lengths == 0)), num_cut, num_answers, num_tokens)
    return cut_lengths, num_targets, left_out


def _parts(lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Consecutive samples that are looked at together, as [first, end)."""
    groups = np.cumsum(lengths) // _TOKENS_AT_ONCE
    borders = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(lengths)]
    return [(first, end) for first, end in itertools.pairwise(borders) if end > first]
