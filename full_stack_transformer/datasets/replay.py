"""Documents that are read beside the batches of a training, so that the model does not forget general text.

    batch number n ──> its own samples, by the plan of `batches`
                   └─> samples floor(n * rate) to floor((n + 1) * rate) of each source, in an order of its own

The rate makes the targets of a source the wished share of all targets, averaged over an epoch. Which samples
come with a batch depends on the seed and its number alone: not on the number of processes, which share them
as they share a batch, and not on what came before.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from full_stack_transformer.datasets.batches import Samples
from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.datasets.order import make_key, order_of, pack
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL

_PREFIX = "replay_"
# Samples whose targets are counted together: 8 MB a column.
_SAMPLES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class ReplaySource:
    """Documents to replay."""

    name: str
    """Of the dataset."""
    corpus: Corpus
    """Its training samples."""
    share: float
    """Part of all targets that are to be of this source; above 0, below 1."""

    @property
    def targets_per_sample(self) -> float:
        """On average: all tokens of a sample but the first."""
        return max(1, self.corpus.num_tokens - len(self.corpus)) / len(self.corpus)


class Replay:
    """What one rank reads beside each batch of a training.

    Args:
        sources: where it comes from; their shares add up to less than 1.
        targets_per_batch: of the training's own samples, on average, over all ranks.
        pad_id: fills rows.
        seed: of the order.
        row_length: samples are packed into rows of so many tokens; None gives each sample a row.
        rank: index of this process.
        world_size: number of processes that share every batch.

    Attributes:
        rates: samples of each source beside a batch, over all ranks.
    """

    def __init__(
        self,
        sources: Sequence[ReplaySource],
        *,
        targets_per_batch: float,
        pad_id: int,
        seed: int,
        row_length: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sources = sources
        own_share = 1 - sum(source.share for source in sources)
        self.rates = [
            source.share / own_share * targets_per_batch / source.targets_per_sample
            for source in sources
        ]
        self._pad_id = pad_id
        self._keys = [make_key(seed, 1 + index) for index in range(len(sources))]
        self._row_length = row_length
        self._mine = slice(rank, None, world_size)

    def words(self) -> list[str]:
        """What is replayed, a sentence for each source."""
        return [
            f"replaying {source.name}: {source.share:.1%} of the learned tokens, {rate:.2f} samples beside "
            f"each batch, all {len(source.corpus):,} once in {math.ceil(len(source.corpus) / rate):,} batches"
            for source, rate in zip(self._sources, self.rates, strict=True)
        ]

    def num_targets(self, number: int) -> int:
        """Targets beside the batch with this number, counted from the first epoch on, over all ranks."""
        return sum(
            int((source.corpus.spans(indices)[1] - 1).sum())
            for source, indices in zip(self._sources, self._drawn(number), strict=True)
        )

    def batch(self, number: int) -> tuple[Batch, int]:
        """What this rank reads beside the batch with this number, and how many tokens that is.

        Names of tensors begin with `replay_`. There are none where no rank has a sample; a rank without one
        where others have any gets a row without targets, since with sharded weights all compute together.
        """
        samples = [
            sample
            for source, indices in zip(self._sources, self._drawn(number), strict=True)
            for sample in source.corpus.gather(indices.tolist())
        ]
        if not samples:
            return {}, 0
        mine = samples[self._mine]
        num_tokens = sum(map(len, mine))
        return self._collated(mine or [np.full(1, self._pad_id, dtype=np.int64)]), num_tokens

    def _drawn(self, number: int) -> list[NDArray[np.int64]]:
        """The samples of each source."""
        return [
            _in_order(math.floor(number * rate), math.floor((number + 1) * rate), source, key)
            for rate, source, key in zip(self.rates, self._sources, self._keys, strict=True)
        ]

    def _collated(self, samples: list[NDArray[np.int64]]) -> Batch:
        """Padded on the right; see `collators` for the names."""
        if self._row_length is None:
            rows = [[sample] for sample in samples]
        else:
            packing = pack(np.array([len(sample) for sample in samples]), self._row_length)
            borders = packing.row_borders.tolist()
            rows = [
                [samples[index] for index in packing.samples[start:end]]
                for start, end in itertools.pairwise(borders)
            ]
        shape = len(rows), max(sum(map(len, row)) for row in rows)
        input_ids, labels = np.full(shape, self._pad_id), np.full(shape, IGNORED_LABEL)
        position_ids, document_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for place, row in enumerate(rows):
            end = 0
            for document, sample in enumerate(row):
                start, end = end, end + len(sample)
                input_ids[place, start:end] = sample
                labels[place, start + 1 : end] = sample[1:]
                position_ids[place, start:end] = np.arange(len(sample))
                document_ids[place, start:end] = document
            position_ids[place, end:] = np.arange(shape[1] - end)
            document_ids[place, end:] = len(row)
        found = {"input_ids": input_ids, "labels": labels}
        if self._row_length is not None:
            found |= {"position_ids": position_ids, "document_ids": document_ids}
        return {f"{_PREFIX}{name}": torch.from_numpy(array) for name, array in found.items()}


def _in_order(first: int, end: int, source: ReplaySource, key: int) -> NDArray[np.int64]:
    """The samples at positions [first, end) of all epochs of a source, one after the other."""
    num_samples = len(source.corpus)
    found = [np.zeros(0, dtype=np.int64)]
    while first < end:
        epoch, start = divmod(first, num_samples)
        count = min(end - first, num_samples - start)
        order = order_of(num_samples, source.corpus.layout, key, epoch)
        found.append(order[np.arange(start, start + count)])
        first += count
    return np.concatenate(found)


def replayed_part(batch: Batch) -> Batch | None:
    """The batch that was read beside a batch; None where there is none."""
    found = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in batch.items()
        if name.startswith(_PREFIX)
    }
    return found or None


def num_targets_of(samples: Samples) -> int:
    """Targets of all samples."""
    total = 0
    for first in range(0, len(samples), _SAMPLES_AT_ONCE):
        indices = np.arange(first, min(first + _SAMPLES_AT_ONCE, len(samples)))
        total += int(samples.num_targets(*samples.spans(indices)).sum())
    return total
