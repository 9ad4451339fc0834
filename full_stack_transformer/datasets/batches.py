"""Which samples form a batch: a function of seed, epoch and position.

    epoch     = windows, each with a fixed number of batches, so that any batch is found directly
    window    = consecutive samples of a keyed permutation, grouped by their lengths
    batch     = world_size * batch_size samples or rows over all ranks; rank r takes every world_size-th

At most two windows are in memory. The batches over all ranks depend on world_size * batch_size only: one
process with 16 and two with 8 get the same. Knows lengths, never tokens.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.datasets.order import (
    SHARDS_TOGETHER,
    ShardedPermutation,
    ShardLayout,
    make_key,
    order_of,
    pack,
    shuffled,
)

# Batches whose samples are sorted by length together. On documents of mean 41 tokens 1.2 % of a batch of
# 16 is padding; with 128 batches 2.4 %, with 64 5 %, in random order 63 %.
_WINDOW_BATCHES = 256
# About so many samples are packed together. Fills 99.8 % of rows of 256 tokens with documents of mean 40, in
# 8 ms; a fourth of them fills as much, but its number of tokens varies twice as much, which needs more room.
_PACKED_SAMPLES = 16_384
# Standard deviations of a window's number of tokens that it has room for: one window in 700 needs more.
_ROOM = 3.0
# An accumulation may reach into the next window.
_CACHED_WINDOWS = 2


class Samples(Protocol):
    """Lengths and positions of samples; a `Corpus` has them."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples together."""
        ...

    @property
    def layout(self) -> ShardLayout | None:
        """Which samples are in which shard; None where there are no shards."""
        ...

    def __len__(self) -> int: ...

    def spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start in the corpus and tokens of each of the samples."""
        ...

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Predicted tokens (or labels) of each of the samples with these spans."""
        ...


def limited(num_batches: int, limit: float) -> int:
    """`limit` batches if it is above 1, else this fraction of the batches; at least one."""
    # 0.29 * 100 is 28.999999999999996.
    num_wanted = int(limit) if limit > 1 else int(num_batches * limit + 1e-6)
    return min(num_batches, max(1, num_wanted))


@dataclass(frozen=True)
class ConcatenatedSamples:
    """The corpus cut into pieces of one length, across the borders of samples.

    The rest of the corpus that does not fill a piece is left out.
    """

    num_corpus_tokens: int
    row_length: int
    layout: ShardLayout | None = None
    """Of the pieces: one that crosses a border is of the shard where it begins."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces together."""
        return len(self) * self.row_length

    def __len__(self) -> int:
        return self.num_corpus_tokens // self.row_length

    def spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start in the corpus and tokens of each of the pieces."""
        return indices * self.row_length, np.full(len(indices), self.row_length)

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """All tokens of a piece but its first."""
        return lengths - 1


@dataclass(frozen=True)
class BatchSpans:
    """The samples of one rank's batch."""

    starts: NDArray[np.int64]
    """(samples,) where each starts in the corpus."""
    lengths: NDArray[np.int64]
    """(samples,) tokens of each."""
    rows: NDArray[np.int64]
    """(samples,) row of the batch that each is in, ascending."""
    num_rows: int
    """Rows of the batch; the last ones may be empty."""
    epoch: int = 0
    """For random choices that differ between epochs."""
    is_filler: bool = False
    """Whether this rank has no sample left, and computes a batch that does not count."""


@dataclass(frozen=True)
class _Window:
    """The samples of one rank in consecutive batches."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rows: NDArray[np.int64]
    borders: list[int]
    """(batches + 1,) batch i holds the samples borders[i] to borders[i + 1]."""
    num_targets: list[int]
    """(batches,) over all ranks."""


class BatchPlan(ABC):
    """Batches by epoch and position.

    Args:
        samples: the samples to batch.
        batch_size: samples or rows in a batch of one rank.
        rank: index of this process.
        world_size: number of processes that share every batch.
    """

    num_batches_per_epoch: int
    """The same on every rank."""
    _min_rows = 0
    _window_batches = _WINDOW_BATCHES

    def __init__(
        self, samples: Samples, *, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self._samples = samples
        self._batch_size = batch_size
        self._rank, self._world_size = rank, world_size
        self._global_size = batch_size * world_size
        self._windows: dict[tuple[int, int], _Window] = {}

    def batch(self, epoch: int, position: int) -> BatchSpans:
        """This rank's part of a batch; `position` counts from 0 in each epoch."""
        window, place = self._find(epoch, position)
        part = slice(window.borders[place], window.borders[place + 1])
        rows = window.rows[part]
        num_used = int(rows[-1]) + 1 if len(rows) else 0
        return BatchSpans(
            window.starts[part], window.lengths[part], rows, max(self._min_rows, num_used), epoch
        )

    def num_targets(self, epoch: int, position: int) -> int:
        """Predicted tokens of a batch over all ranks: all but the first of each sample."""
        window, place = self._find(epoch, position)
        return window.num_targets[place]

    def _find(self, epoch: int, position: int) -> tuple[_Window, int]:
        index, place = self._locate(position)
        window = self._windows.get((epoch, index))
        if window is None:
            if len(self._windows) >= _CACHED_WINDOWS:
                del self._windows[next(iter(self._windows))]
            window = self._windows[epoch, index] = self._make_window(epoch, index)
        return window, place

    def _locate(self, position: int) -> tuple[int, int]:
        """Index of the window, and of the batch in it."""
        return divmod(position, self._window_batches)

    def _at_once(self, most: int) -> int:
        """Samples of a window: at most those of a group of shards, so that it is of two groups at most."""
        layout = self._samples.layout
        if layout is None:
            return most
        num_groups = max(1, (len(layout.borders) - 1) / SHARDS_TOGETHER)
        return max(1, min(most, int(len(self._samples) / num_groups)))

    @abstractmethod
    def _make_window(self, epoch: int, index: int) -> _Window: ...

    def _indices(self, seed: int, epoch: int, first: int, end: int) -> NDArray[np.int64]:
        """The samples at positions [first, end) of an epoch; the shards that follow are fetched ahead."""
        layout = self._samples.layout
        order = order_of(len(self._samples), layout, seed, epoch)
        indices = order[np.arange(first, end)]
        if layout is not None and isinstance(order, ShardedPermutation):
            if end == len(order):
                order, end = ShardedPermutation(layout.borders, seed, epoch + 1), 0
            layout.fetch_ahead(order.shards_from(end))
        return indices

    def _filler(self, index: NDArray[np.int64], epoch: int) -> BatchSpans:
        """The first token of a sample, given by its index (1,)."""
        start = self._samples.spans(index)[0]
        length, row = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        return BatchSpans(start, length, row, 1, epoch, is_filler=True)

    def _sorted_window(
        self, indices: NDArray[np.int64], batch_order: NDArray[np.int64] | None
    ) -> _Window:
        """Batches of these samples (n,), sorted by length and cut; the last may be smaller."""
        starts, lengths = self._samples.spans(indices)
        by_length = np.argsort(lengths, kind="stable")
        starts, lengths = starts[by_length], lengths[by_length]
        cuts = np.arange(0, len(indices), self._global_size)
        num_targets = np.add.reduceat(self._samples.num_targets(starts, lengths), cuts)
        if batch_order is not None:
            cuts, num_targets = cuts[batch_order], num_targets[batch_order]
        places = cuts[:, None] + np.arange(self._rank, self._global_size, self._world_size)
        are_there = places < len(indices)
        chosen = places[are_there]
        return _Window(
            starts=starts[chosen],
            lengths=lengths[chosen],
            rows=np.nonzero(are_there)[1],
            borders=[0, *np.cumsum(are_there.sum(axis=1)).tolist()],
            num_targets=num_targets.tolist(),
        )


class LengthBatches(BatchPlan):
    """Samples of similar length share a batch; each sample once an epoch.

    The shuffled samples are cut into windows; each is sorted by length and cut into batches, which are
    shuffled again. The last batch of an epoch may be smaller; a rank without a sample in it gets a filler.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(samples, batch_size=batch_size, rank=rank, world_size=world_size)
        self._seed = seed
        self._window_batches = max(
            1, self._at_once(_WINDOW_BATCHES * self._global_size) // self._global_size
        )
        self.num_batches_per_epoch = -(-len(samples) // self._global_size)

    def batch(self, epoch: int, position: int) -> BatchSpans:
        """This rank's part of a batch."""
        spans = super().batch(epoch, position)
        return spans if len(spans.starts) else self._filler(np.zeros(1, dtype=np.int64), epoch)

    def _make_window(self, epoch: int, index: int) -> _Window:
        size = self._window_batches * self._global_size
        first = index * size
        end = min(first + size, len(self._samples))
        indices = self._indices(self._seed, epoch, first, end)
        num_batches = -(-len(indices) // self._global_size)
        batch_order = shuffled(num_batches, make_key(self._seed, epoch, index))
        return self._sorted_window(indices, batch_order)


class SortedBatches(BatchPlan):
    """All samples in the order of their length, the same in all epochs: for validation.

    Every rank gets the same number of batches; a rank without a sample in the last batch gets the first token
    of a sample, for which nothing is predicted.

    Args:
        limit: number or fraction of the batches to take, spread evenly over all lengths.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        limit: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(samples, batch_size=batch_size, rank=rank, world_size=world_size)
        self._num_all = -(-len(samples) // self._global_size)
        self.num_batches_per_epoch = limited(self._num_all, limit)
        self._order: NDArray[np.int64] | None = None

    def batch(self, epoch: int, position: int) -> BatchSpans:
        """This rank's part of a batch, the same in every epoch."""
        window, _ = self._find(0, position)
        if len(window.starts):
            return super().batch(0, position)
        return self._filler(self._sample_indices(position)[:1], 0)

    def num_targets(self, epoch: int, position: int) -> int:
        """Predicted tokens of a batch over all ranks: all but the first of each sample."""
        return super().num_targets(0, position)

    def _locate(self, position: int) -> tuple[int, int]:
        return position, 0

    def _make_window(self, epoch: int, index: int) -> _Window:
        return self._sorted_window(self._sample_indices(index), None)

    def _sample_indices(self, position: int) -> NDArray[np.int64]:
        """The samples of a batch over all ranks."""
        if self._order is None:
            _, lengths = self._samples.spans(np.arange(len(self._samples)))
            self._order = np.argsort(lengths, kind="stable")
        # The middle of the position's share of all batches.
        index = (2 * position + 1) * self._num_all // (2 * self.num_batches_per_epoch)
        return self._order[index * self._global_size : (index + 1) * self._global_size]


class PackedBatches(BatchPlan):
    """Several samples share a row, by best fit; each sample once an epoch.

    The shuffled samples are cut into windows, whose rows are shuffled and dealt out to a fixed number of
    batches. That number comes from the mean length and a trial packing, with room for chance, so that the
    number of batches of an epoch is known without reading all lengths. Empty rows fill every batch to
    `batch_size`; a window with more rows, one in hundreds, has batches of one row more.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        row_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(samples, batch_size=batch_size, rank=rank, world_size=world_size)
        self._min_rows = batch_size
        self._row_length = row_length
        self._seed = seed
        size = _WindowSize.by_trial(samples, row_length)
        num_rows_at_once = size.num_rows(self._at_once(_PACKED_SAMPLES))
        num_batches = max(1, round(num_rows_at_once / self._global_size))
        self._window_samples = size.num_samples(num_batches * self._global_size)
        # The last window takes the rest too, so that no window is small.
        self._num_windows = max(1, len(samples) // self._window_samples)
        num_last = len(samples) - (self._num_windows - 1) * self._window_samples
        if self._num_windows == 1:
            _, lengths = samples.spans(np.arange(len(samples)))
            num_rows: float = pack(lengths, row_length).num_rows
        else:
            num_rows = size.num_rows(num_last)
        self._window_batches = num_batches
        self._last_window_batches = math.ceil(num_rows / self._global_size)
        self.num_batches_per_epoch = (
            self._num_windows - 1
        ) * num_batches + self._last_window_batches

    def _locate(self, position: int) -> tuple[int, int]:
        index = min(position // self._window_batches, self._num_windows - 1)
        return index, position - index * self._window_batches

    def _make_window(self, epoch: int, index: int) -> _Window:
        is_last = index == self._num_windows - 1
        first = index * self._window_samples
        end = len(self._samples) if is_last else first + self._window_samples
        indices = self._indices(self._seed, epoch, first, end)
        starts, lengths = self._samples.spans(indices)
        packing = pack(lengths, self._row_length)
        starts, lengths = starts[packing.samples], lengths[packing.samples]
        # Dealt out like cards, so that every batch has rows.
        places = shuffled(packing.num_rows, make_key(self._seed, epoch, index))
        places = np.repeat(places, np.diff(packing.row_borders))
        num_batches = self._last_window_batches if is_last else self._window_batches
        rows, batches = np.divmod(places, num_batches)
        mine = np.flatnonzero(rows % self._world_size == self._rank)
        mine = mine[np.lexsort((rows[mine], batches[mine]))]
        samples_per_batch = np.bincount(batches[mine], minlength=num_batches)
        targets = self._samples.num_targets(starts, lengths)
        num_targets = np.bincount(batches, weights=targets, minlength=num_batches)
        return _Window(
            starts=starts[mine],
            lengths=lengths[mine],
            rows=rows[mine] // self._world_size,
            borders=[0, *np.cumsum(samples_per_batch).tolist()],
            num_targets=[int(count) for count in num_targets],
        )


@dataclass(frozen=True)
class _WindowSize:
    """Number of rows that samples need, with room for chance."""

    mean_tokens: float
    """Of a sample."""
    room_tokens: float
    """Room per root of the number of samples, for the variation of their sum."""
    tokens_per_row: float
    """Mean tokens that packing fits into a row."""

    @classmethod
    def by_trial(cls, samples: Samples, row_length: int) -> "_WindowSize":
        """Measured on some samples, the same for every seed; of shards only a few are read."""
        order = order_of(len(samples), samples.layout, 0, 0)
        _, lengths = samples.spans(order[np.arange(min(_PACKED_SAMPLES, len(samples)))])
        return cls(
            mean_tokens=samples.num_tokens / len(samples),
            room_tokens=_ROOM * float(lengths.std()),
            tokens_per_row=float(lengths.sum()) / pack(lengths, row_length).num_rows,
        )

    def num_rows(self, num_samples: int) -> float:
        """Rows that `num_samples` samples need."""
        num_tokens = num_samples * self.mean_tokens + math.sqrt(num_samples) * self.room_tokens
        return num_tokens / self.tokens_per_row

    def num_samples(self, num_rows: int) -> int:
        """The most samples that fit: the equation above, solved for the root of their number."""
        num_tokens = num_rows * self.tokens_per_row
        discriminant = self.room_tokens**2 + 4 * self.mean_tokens * num_tokens
        root = (math.sqrt(discriminant) - self.room_tokens) / (2 * self.mean_tokens)
        return max(1, int(root**2))
