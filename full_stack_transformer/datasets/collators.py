"""Spans of a corpus -> a batch of tensors. Knows nothing of models.

input_ids     (batch, tokens)  padded on the right
labels        (batch, tokens)  the same, not shifted yet; -100 where nothing is to be predicted: padding,
                               the first token of a sample, which no token of its own comes before, and in
                               conversations what is no answer
position_ids  (batch, tokens)  packed only: from 0 in each sample
document_ids  (batch, tokens)  packed only: number of the sample in its row; padding counts as one more
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from full_stack_transformer.datasets.batches import BatchSpans
from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL

Batch = dict[str, Tensor]
Collator = Callable[[BatchSpans], Batch]


class PaddedCollator:
    """A sample a row, as wide as the longest.

    A causal model never looks to the right, so the padding changes nothing and needs no attention mask.
    """

    def __init__(self, corpus: Corpus, *, pad_id: int) -> None:
        self._corpus = corpus
        self._pad_id = pad_id

    def __call__(self, spans: BatchSpans) -> dict[str, Tensor]:
        """`input_ids` and `labels`."""
        width = int(spans.lengths.max())
        input_ids = self._corpus.windows(spans.starts, width)
        labels = input_ids.copy()
        if int(spans.lengths.min()) < width:
            is_padding = np.arange(width) >= spans.lengths[:, None]
            np.copyto(input_ids, self._pad_id, where=is_padding)
            np.copyto(labels, IGNORED_LABEL, where=is_padding)
        if (ignored := self._corpus.ignored(spans.starts[:, None] + np.arange(width))) is not None:
            np.copyto(labels, IGNORED_LABEL, where=ignored)
        labels[:, 0] = IGNORED_LABEL
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


class PackedCollator:
    """Several samples a row, one after the other; all rows of one length.

    Attention must be kept inside a sample by `document_ids`: positions alone do not.
    """

    def __init__(self, corpus: Corpus, *, pad_id: int, row_length: int) -> None:
        self._corpus = corpus
        self._pad_id = pad_id
        self._row_length = row_length

    def __call__(self, spans: BatchSpans) -> dict[str, Tensor]:
        """`input_ids`, `labels`, `position_ids` and `document_ids`."""
        starts, lengths, documents, is_padding = self._with_padding(spans)
        begins = np.cumsum(lengths) - lengths
        slots = np.arange(spans.num_rows * self._row_length)
        position_ids = slots - np.repeat(begins, lengths)
        positions = position_ids + np.repeat(starts, lengths)
        input_ids = self._corpus.take(positions)
        padding = np.repeat(is_padding, lengths)
        np.copyto(input_ids, self._pad_id, where=padding)
        labels = input_ids.copy()
        np.copyto(labels, IGNORED_LABEL, where=padding | (position_ids == 0))
        if (ignored := self._corpus.ignored(positions)) is not None:
            np.copyto(labels, IGNORED_LABEL, where=ignored)
        return {
            "input_ids": self._in_rows(input_ids),
            "labels": self._in_rows(labels),
            "position_ids": self._in_rows(position_ids),
            "document_ids": self._in_rows(np.repeat(documents, lengths)),
        }

    def _with_padding(
        self, spans: BatchSpans
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """The spans with one of padding at the end of each row, so that together they are all slots.

        Returns:
            Start, length, number in its row, and whether it is padding, each (samples + rows,).
        """
        num_rows = spans.num_rows
        used = np.bincount(spans.rows, weights=spans.lengths, minlength=num_rows).astype(np.int64)
        per_row = np.bincount(spans.rows, minlength=num_rows) + 1
        ends = np.cumsum(per_row)
        is_padding = np.zeros(int(ends[-1]), dtype=np.bool_)
        is_padding[ends - 1] = True
        starts, lengths = np.zeros((2, len(is_padding)), dtype=np.int64)
        starts[~is_padding], lengths[~is_padding] = spans.starts, spans.lengths
        lengths[is_padding] = self._row_length - used
        documents = np.arange(len(is_padding)) - np.repeat(ends - per_row, per_row)
        return starts, lengths, documents, is_padding

    def _in_rows(self, slots: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(slots.reshape(-1, self._row_length))
