"""Which samples form a batch: a function of seed, epoch and position.

    epoch     = windows, each with a fixed number of batches, so that any batch is found at once
    window    = samples that follow one another in a keyed permutation, grouped by their lengths
    batch     = world_size * batch_size samples or rows over all ranks; rank r takes every world_size-th

What is held in memory is a window or two, at any number of samples. The batches over all ranks depend on
world_size * batch_size alone: one process with 16 and two with 8 see the same ones.
Knows only lengths, never tokens.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.datasets.order import KeyedPermutation, make_key, shuffled
from full_stack_transformer.datasets.packing import pack

# Batches whose samples are sorted by length together. On documents of mean 41 tokens 1.2 % of a batch of
# 16 is padding; with 128 batches 2.4 %, with 64 5 %, in random order 63 %.
_WINDOW_BATCHES = 256
# Samples that are packed together, about. Fills 99.8 % of rows of 256 tokens with documents of mean 40,
# in 8 ms; a fourth of them fills as much, but varies twice as much in its tokens, which takes room.
_PACKED_SAMPLES = 16_384
# Standard deviations of a window's tokens for which it has room: one window in 700 needs more.
_ROOM = 3.0
# An accumulation may reach into the next window.
_CACHED_WINDOWS = 2


class Samples(Protocol):
    """What is known of samples; a `Corpus` is one."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples together."""
        ...

    def __len__(self) -> int: ...

    def spans(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start in the corpus and tokens of each of the samples."""
        ...

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """How many tokens (or labels) of each of the samples with these spans are predicted."""
        ...


def limited(num_batches: int, limit: float) -> int:
    """So many of the batches (`limit` above 1), or this part of them (up to 1), but at least one."""
    # 0.29 of 100 batches is 28.999999999999996 as it is computed.
    number = int(limit) if limit > 1 else int(num_batches * limit + 1e-6)
    return min(num_batches, max(1, number))


@dataclass(frozen=True)
class ConcatenatedSamples:
    """The corpus cut into pieces of one length, whatever samples they begin and end in.

    The rest at the end of the corpus that fills no piece is left out.
    """

    num_corpus_tokens: int
    row_length: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces together."""
        return len(self) * self.row_length

    def __len__(self) -> int:
        return self.num_corpus_tokens // self.row_length

    def spans(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start in the corpus and tokens of each of the pieces."""
        return numbers * self.row_length, np.full(len(numbers), self.row_length)

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """All tokens of a piece but its first."""
        return lengths - 1


@dataclass(frozen=True)
class BatchSpans:
    """What one rank's batch is made of."""

    starts: NDArray[np.int64]
    """(samples,) where each begins in the corpus."""
    lengths: NDArray[np.int64]
    """(samples,) tokens of each."""
    rows: NDArray[np.int64]
    """(samples,) row of the batch that each lies in, ascending."""
    num_rows: int
    """Rows of the batch; the last ones may be empty."""
    epoch: int = 0
    """For what is drawn anew in each epoch."""
    is_filler: bool = False
    """Whether this rank has no sample left and computes one that does not count."""


@dataclass(frozen=True)
class _Window:
    """The samples of one rank in some batches that follow one another."""

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
        samples: what to make batches of.
        batch_size: samples or rows in a batch of one rank.
        rank: which process this is, of `world_size`.
        world_size: processes that share every batch.
    """

    num_batches_per_epoch: int
    """The same on every rank."""
    _min_rows = 0

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
        """Tokens of a batch over all ranks that are predicted: all but the first of each sample."""
        window, place = self._find(epoch, position)
        return window.num_targets[place]

    def _find(self, epoch: int, position: int) -> tuple[_Window, int]:
        number, place = self._locate(position)
        window = self._windows.get((epoch, number))
        if window is None:
            if len(self._windows) >= _CACHED_WINDOWS:
                del self._windows[next(iter(self._windows))]
            window = self._windows[epoch, number] = self._make_window(epoch, number)
        return window, place

    def _locate(self, position: int) -> tuple[int, int]:
        """Number of the window, and the place of the batch in it."""
        return divmod(position, _WINDOW_BATCHES)

    @abstractmethod
    def _make_window(self, epoch: int, number: int) -> _Window: ...

    def _sorted_window(
        self, numbers: NDArray[np.int64], batch_order: NDArray[np.int64] | None
    ) -> _Window:
        """Batches of these samples (n,), sorted by length and cut; the last may be smaller."""
        starts, lengths = self._samples.spans(numbers)
        by_length = np.argsort(lengths, kind="stable")
        starts, lengths = starts[by_length], lengths[by_length]
        cuts = np.arange(0, len(numbers), self._global_size)
        num_targets = np.add.reduceat(self._samples.num_targets(starts, lengths), cuts)
        if batch_order is not None:
            cuts, num_targets = cuts[batch_order], num_targets[batch_order]
        places = cuts[:, None] + np.arange(self._rank, self._global_size, self._world_size)
        are_there = places < len(numbers)
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

    The order is shuffled, cut into windows, each sorted by length and cut into batches, and these are
    shuffled again. The last batch of an epoch may be smaller; with fewer samples than ranks it is left out.
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
        rest = len(samples) % self._global_size
        self._num_used = len(samples) - (rest if rest < world_size else 0)
        self.num_batches_per_epoch = -(-self._num_used // self._global_size)

    def _make_window(self, epoch: int, number: int) -> _Window:
        size = _WINDOW_BATCHES * self._global_size
        first = number * size
        positions = np.arange(first, min(first + size, self._num_used))
        numbers = KeyedPermutation(len(self._samples), self._seed, epoch)[positions]
        num_batches = -(-len(numbers) // self._global_size)
        batch_order = shuffled(num_batches, make_key(self._seed, epoch, number))
        return self._sorted_window(numbers, batch_order)


class SortedBatches(BatchPlan):
    """All samples in the order of their length, in one order for all epochs: for validation.

    Every rank gets equally many batches; one without a sample in the last batch gets the first token of
    one, which nothing is predicted for.

    Args:
        limit: take so many of the batches, or this part of them, spread evenly over all lengths.
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
        start = self._samples.spans(self._numbers(position)[:1])[0]
        one, row = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        return BatchSpans(start, one, row, 1, is_filler=True)

    def num_targets(self, epoch: int, position: int) -> int:
        """Tokens of a batch over all ranks that are predicted: all but the first of each sample."""
        return super().num_targets(0, position)

    def _locate(self, position: int) -> tuple[int, int]:
        return position, 0

    def _make_window(self, epoch: int, number: int) -> _Window:
        return self._sorted_window(self._numbers(number), None)

    def _numbers(self, position: int) -> NDArray[np.int64]:
        """The samples of a batch over all ranks."""
        if self._order is None:
            _, lengths = self._samples.spans(np.arange(len(self._samples)))
            self._order = np.argsort(lengths, kind="stable")
        # The middle of the position's share of all batches.
        number = (2 * position + 1) * self._num_all // (2 * self.num_batches_per_epoch)
        return self._order[number * self._global_size : (number + 1) * self._global_size]


class PackedBatches(BatchPlan):
    """Several samples share a row, by best fit; each sample once an epoch.

    The order is shuffled and cut into windows; the rows of each, shuffled, are dealt out to as many batches
    as such windows need with room for chance, known from the mean length and a trial packing, so that an
    epoch's number of batches is known without reading all lengths. Rows that stay empty fill up every
    batch to `batch_size`. The one window in hundreds with more rows has batches of a row more.
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
        num_batches = max(1, round(size.num_rows(_PACKED_SAMPLES) / self._global_size))
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
        number = min(position // self._window_batches, self._num_windows - 1)
        return number, position - number * self._window_batches

    def _make_window(self, epoch: int, number: int) -> _Window:
        is_last = number == self._num_windows - 1
        first = number * self._window_samples
        end = len(self._samples) if is_last else first + self._window_samples
        numbers = KeyedPermutation(len(self._samples), self._seed, epoch)[np.arange(first, end)]
        starts, lengths = self._samples.spans(numbers)
        packing = pack(lengths, self._row_length)
        starts, lengths = starts[packing.samples], lengths[packing.samples]
        # Dealt out like cards, so that no batch is left without: row by row to one batch after the other.
        places = shuffled(packing.num_rows, make_key(self._seed, epoch, number))
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
    """How many rows some samples need, with room for chance."""

    mean_tokens: float
    """Of a sample."""
    room_tokens: float
    """What one sample adds to the variation of their sum; it grows with the root of their number."""
    tokens_per_row: float
    """That packing gets into a row."""

    @classmethod
    def by_trial(cls, samples: Samples, row_length: int) -> "_WindowSize":
        """Measured on some samples, the same for every seed."""
        order = KeyedPermutation(len(samples), 0, 0)
        _, lengths = samples.spans(order[np.arange(min(_PACKED_SAMPLES, len(samples)))])
        return cls(
            mean_tokens=samples.num_tokens / len(samples),
            room_tokens=_ROOM * float(lengths.std()),
            tokens_per_row=float(lengths.sum()) / pack(lengths, row_length).num_rows,
        )

    def num_rows(self, num_samples: int) -> float:
        """Rows that so many samples need."""
        num_tokens = num_samples * self.mean_tokens + math.sqrt(num_samples) * self.room_tokens
        return num_tokens / self.tokens_per_row

    def num_samples(self, num_rows: int) -> int:
        """The most samples that need no more rows: solved for the root of their number."""
        num_tokens = num_rows * self.tokens_per_row
        discriminant = self.room_tokens**2 + 4 * self.mean_tokens * num_tokens
        root = (math.sqrt(discriminant) - self.room_tokens) / (2 * self.mean_tokens)
        return max(1, int(root**2))
