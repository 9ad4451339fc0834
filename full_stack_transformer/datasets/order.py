"""The order of samples: a keyed permutation of them, and their packing into rows of one length.

Shuffling a billion indices takes a minute and 8 GB. A keyed permutation computes any position in constant
time and memory, so that an epoch starts, or resumes, at once whatever its size. Knows nothing of tokens.

A permutation of all samples reads from every shard in each batch. In the sharded form the shards are
shuffled, and then the samples of a few consecutive shards together, as in MosaicML's streaming (its `py1br`
shuffles blocks of samples after the shards) and WebDataset (a buffer after shuffled shards).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Multipliers of splitmix64: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014.
_INCREMENT = 0x9E3779B97F4A7C15
_FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9
_SECOND_MULTIPLIER = 0x94D049BB133111EB
_64_BITS = (1 << 64) - 1
# Four rounds are enough for large domains (Luby and Rackoff 1988); small ones need more.
_NUM_ROUNDS = 8
# Shards whose samples are mixed: a batch reads from so many, and as many are fetched ahead. Shards hold
# documents in the order of the input, so one alone would be a source or a topic. No option, since a resumed
# training must find the same order.
SHARDS_TOGETHER = 4
# Halves of at least three bits: with fewer, the orders of a few indices are not equally likely.
_MIN_BITS = 6


def make_key(*parts: int) -> int:
    """A key of 64 bits that depends on every part and on their order."""
    key = 0
    for part in parts:
        key = (key + _INCREMENT + part) & _64_BITS
        key = ((key ^ (key >> 30)) * _FIRST_MULTIPLIER) & _64_BITS
        key = ((key ^ (key >> 27)) * _SECOND_MULTIPLIER) & _64_BITS
        key ^= key >> 31
    return key


def shuffled(count: int, key: int) -> NDArray[np.int64]:
    """The indices below `count` in an order given by the key: (count,), for short arrays."""
    return np.argsort(_mix(np.arange(count, dtype=np.uint64), np.uint64(key)), kind="stable")


class KeyedPermutation:
    """The indices below `length`, each once, in an order given by seed and epoch.

    An alternating Feistel network over the bits of the position: each round changes one half by a hash of
    the other, which can be undone for any hash, so no two positions give the same index. A result that is not
    below `length` is permuted again until it is (cycle walking: Black and Rogaway, Ciphers with Arbitrary
    Finite Domains, 2002), less than once on average.
    """

    def __init__(self, length: int, seed: int, epoch: int) -> None:
        self._length = length
        num_bits = max(_MIN_BITS, (length - 1).bit_length())
        self._low_bits = np.uint64(num_bits - num_bits // 2)
        self._masks = (
            np.uint64((1 << (num_bits // 2)) - 1),
            np.uint64((1 << (num_bits - num_bits // 2)) - 1),
        )
        key = make_key(seed, epoch)
        self._keys = [np.uint64(make_key(key, index)) for index in range(_NUM_ROUNDS)]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices at the positions (n,), each below the length."""
        indices = self._permute(positions.astype(np.uint64))
        outside = np.flatnonzero(indices >= self._length)
        while len(outside):
            again = self._permute(indices[outside])
            indices[outside] = again
            outside = outside[again >= self._length]
        return indices.astype(np.int64)

    def _permute(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        halves = [numbers >> self._low_bits, numbers & self._masks[1]]
        for round_index, key in enumerate(self._keys):
            side = round_index % 2
            halves[side] ^= _mix(halves[1 - side], key) & self._masks[side]
        return halves[0] << self._low_bits | halves[1]


@dataclass(frozen=True)
class ShardLayout:
    """Which samples are in which shard."""

    borders: NDArray[np.int64]
    """(shards + 1,) the first sample of each shard, and the number of samples."""
    fetch_ahead: Callable[[Sequence[int]], None]
    """Makes these shards quick to read, without waiting for them."""

    def with_borders(self, borders: NDArray[np.int64]) -> "ShardLayout":
        """The same shards in other samples."""
        return ShardLayout(borders, self.fetch_ahead)


class ShardedPermutation:
    """The indices of all samples, each once, in an order given by seed and epoch, a few shards at a time.

    The shards are shuffled; consecutive `SHARDS_TOGETHER` of them are a group, whose samples are permuted.
    Time and memory of the start grow with the number of shards, not of samples.
    """

    def __init__(self, borders: NDArray[np.int64], seed: int, epoch: int) -> None:
        self._borders = borders
        self._key = make_key(seed, epoch)
        self._shards = shuffled(len(borders) - 1, self._key)
        self._sizes = np.diff(borders)[self._shards]
        ends = np.cumsum(self._sizes)
        last = np.arange(len(ends)) % SHARDS_TOGETHER == SHARDS_TOGETHER - 1
        last[-1:] = True
        self._group_borders = np.concatenate([np.zeros(1, np.int64), ends[last]])

    def __len__(self) -> int:
        return int(self._group_borders[-1])

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices at the positions (n,)."""
        groups = np.searchsorted(self._group_borders, positions, side="right") - 1
        indices = np.empty(len(positions), dtype=np.int64)
        for group in np.unique(groups).tolist():
            here = np.flatnonzero(groups == group)
            shards, sizes = self._of_group(self._shards, group), self._of_group(self._sizes, group)
            ends = np.cumsum(sizes)
            order = KeyedPermutation(int(ends[-1]), self._key, group)
            places = order[positions[here] - self._group_borders[group]]
            member = np.searchsorted(ends, places, side="right")
            indices[here] = self._borders[shards[member]] + places - (ends - sizes)[member]
        return indices

    def shards_from(self, position: int) -> list[int]:
        """The shards of the group at a position, and of the next."""
        group = int(np.searchsorted(self._group_borders, position, side="right")) - 1
        first = group * SHARDS_TOGETHER
        found: list[int] = self._shards[first : first + 2 * SHARDS_TOGETHER].tolist()
        return found

    @staticmethod
    def _of_group(values: NDArray[np.int64], group: int) -> NDArray[np.int64]:
        return values[group * SHARDS_TOGETHER : (group + 1) * SHARDS_TOGETHER]


def order_of(
    num_samples: int, layout: ShardLayout | None, seed: int, epoch: int
) -> KeyedPermutation | ShardedPermutation:
    """The order of the samples of an epoch; `layout` is that of their shards, if there are any."""
    if layout is None:
        return KeyedPermutation(num_samples, seed, epoch)
    return ShardedPermutation(layout.borders, seed, epoch)


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A hash of 64 bits of each value: the end of splitmix64, keyed. Overflow is intended."""
    mixed = (values ^ key) * np.uint64(_FIRST_MULTIPLIER)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(_SECOND_MULTIPLIER)
    mixed ^= mixed >> np.uint64(32)
    return mixed


@dataclass(frozen=True)
class Packing:
    """Which samples share a row."""

    samples: NDArray[np.int64]
    """(samples,) indices into the given lengths, row by row."""
    row_borders: NDArray[np.int64]
    """(rows + 1,) row i holds `samples[row_borders[i] : row_borders[i + 1]]`."""

    @property
    def num_rows(self) -> int:
        """Rows that hold a sample."""
        return len(self.row_borders) - 1


def pack(lengths: NDArray[np.int64], row_length: int) -> Packing:
    """Best fit decreasing: from the longest to the shortest, each into the row that it fills most.

    Uses at most 11/9 of the fewest possible rows (Johnson 1973), and 1 % more than them if many samples are
    short. Samples of one length go into rows of one free length together, so that the time depends more on
    the number of different lengths than on the number of samples.

    Args:
        lengths: (samples,) tokens of each, from 1 to `row_length`.
        row_length: tokens of a row.
    """
    rows = _Rows(row_length)
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    firsts = np.flatnonzero(np.diff(descending, prepend=row_length + 1))
    row_of_sample = [
        rows.place(length, count)
        for length, count in zip(
            descending[firsts].tolist(),
            np.diff(firsts, append=len(lengths)).tolist(),
            strict=True,
        )
    ]
    row_indices = np.concatenate([np.zeros(0, dtype=np.int64), *row_of_sample])
    by_row = np.argsort(row_indices, kind="stable")
    samples_per_row = np.bincount(row_indices, minlength=rows.num_rows)
    row_borders = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(samples_per_row)])
    return Packing(order[by_row], row_borders)


class _Rows:
    """Rows by their free length; the bits of an integer tell which free lengths exist."""

    def __init__(self, row_length: int) -> None:
        self.num_rows = 0
        self._row_length = row_length
        self._with_free: dict[int, list[NDArray[np.int64]]] = {}
        self._free_lengths = 0

    def place(self, length: int, count: int) -> NDArray[np.int64]:
        """The rows (count,) of `count` samples of a length; earlier samples are not shorter."""
        placed: list[NDArray[np.int64]] = []
        while count:
            free, rows = self._take_tightest(length, count)
            # After its first sample, a row is still the tightest.
            per_row = free // length
            num_full, rest = divmod(count, per_row)
            if num_full >= len(rows):
                num_full, rest = len(rows), 0
            self._put_back(free - per_row * length, rows[:num_full])
            if rest:
                self._put_back(free - rest * length, rows[num_full : num_full + 1])
            self._put_back(free, rows[num_full + bool(rest) :])
            placed.append(np.repeat(rows[:num_full], per_row))
            placed.append(np.repeat(rows[num_full : num_full + 1], rest))
            count -= num_full * per_row + rest
        return np.concatenate(placed)

    def _take_tightest(self, length: int, count: int) -> tuple[int, NDArray[np.int64]]:
        """The rows of the smallest free length that fits `length`; new rows if there are none."""
        fitting = self._free_lengths >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            self._free_lengths ^= 1 << free
            return free, np.concatenate(self._with_free.pop(free))
        num_new = -(-count // (self._row_length // length))
        self.num_rows += num_new
        return self._row_length, np.arange(self.num_rows - num_new, self.num_rows)

    def _put_back(self, free: int, rows: NDArray[np.int64]) -> None:
        if free and len(rows):
            self._with_free.setdefault(free, []).append(rows)
            self._free_lengths |= 1 << free
