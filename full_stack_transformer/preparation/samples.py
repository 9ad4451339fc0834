"""Framed documents -> samples of bounded length, appended to a corpus.

A document is cut into consecutive samples of `max_sample_length` tokens, the last one shorter; samples
shorter than `min_sample_length` are dropped and counted. A document may arrive in several pieces.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.datasets.corpus import CorpusWriter


@dataclass
class SampleCounts:
    """What became of the tokens."""

    num_samples: int = 0
    num_tokens: int = 0
    num_dropped_samples: int = 0
    num_dropped_tokens: int = 0


@dataclass
class OpenDocument:
    """A document whose end has not arrived."""

    rest: list[int] = field(default_factory=list)
    """Its last tokens, fewer than a sample."""
    counts_before: SampleCounts = field(default_factory=SampleCounts)
    """What there was before it began."""


class SampleWriter:
    """Cuts documents into samples and appends them to a corpus."""

    def __init__(
        self,
        corpus: CorpusWriter,
        *,
        min_sample_length: int,
        max_sample_length: int,
        counts: SampleCounts | None = None,
        open_document: OpenDocument | None = None,
    ) -> None:
        self._corpus = corpus
        self._min_length, self._max_length = min_sample_length, max_sample_length
        self.counts = counts or SampleCounts()
        self.open_document = open_document

    def add(
        self,
        token_ids: NDArray[np.unsignedinteger],
        lengths: NDArray[np.int64],
        *,
        continues: bool = False,
        unfinished: bool = False,
    ) -> None:
        """Append the samples of documents.

        Args:
            token_ids: (tokens,) of all of them, one after the other.
            lengths: (documents,) tokens of each.
            continues: the first one is a piece of the open document.
            unfinished: the last one stays open.
        """
        counts_before = SampleCounts(**vars(self.counts))
        if continues:
            assert self.open_document is not None, "a piece belongs to an open document"
            counts_before = self.open_document.counts_before
            rest = np.array(self.open_document.rest, dtype=token_ids.dtype)
            token_ids = np.concatenate((rest, token_ids))
            lengths = lengths.copy()
            lengths[0] += len(rest)
            self.open_document = None
        if unfinished:
            num_rest = int(lengths[-1]) % self._max_length
            rest_ids = token_ids[len(token_ids) - num_rest :].tolist()
            token_ids = token_ids[: len(token_ids) - num_rest]
            lengths = lengths.copy()
            lengths[-1] -= num_rest
            is_new = not (continues and len(lengths) == 1)
        self._append(token_ids, lengths)
        if unfinished:
            if is_new:
                # Only whole samples of it have been appended, so what there was before is known.
                num_own = int(lengths[-1])
                counts_before = SampleCounts(**vars(self.counts))
                counts_before.num_tokens -= num_own
                counts_before.num_samples -= num_own // self._max_length
            self.open_document = OpenDocument(rest_ids, counts_before)

    def drop_open_document(self) -> None:
        """Forget the open document and all of its samples."""
        assert self.open_document is not None, "only an open document can be dropped"
        self.counts = self.open_document.counts_before
        self._corpus.cut(num_tokens=self.counts.num_tokens, num_samples=self.counts.num_samples)
        self.open_document = None

    def _append(self, token_ids: NDArray[np.unsignedinteger], lengths: NDArray[np.int64]) -> None:
        sample_lengths = split_lengths(lengths, self._max_length)
        is_short = sample_lengths < self._min_length
        if is_short.any():
            self.counts.num_dropped_samples += int(is_short.sum())
            self.counts.num_dropped_tokens += int(sample_lengths[is_short].sum())
            token_ids = token_ids[~np.repeat(is_short, sample_lengths)]
            sample_lengths = sample_lengths[~is_short]
        self._corpus.append(token_ids, sample_lengths)
        self.counts.num_samples += len(sample_lengths)
        self.counts.num_tokens += len(token_ids)


def split_lengths(lengths: NDArray[np.int64], max_sample_length: int) -> NDArray[np.int64]:
    """Lengths (samples,) of the samples of documents of `lengths` (documents,)."""
    num_full, rest = np.divmod(lengths, max_sample_length)
    num_samples = num_full + (rest > 0)
    sample_lengths = np.full(int(num_samples.sum()), max_sample_length, dtype=np.int64)
    last_samples = np.cumsum(num_samples) - 1
    sample_lengths[last_samples[rest > 0]] = rest[rest > 0]
    return sample_lengths
