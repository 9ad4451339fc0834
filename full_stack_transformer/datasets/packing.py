"""Samples of many lengths -> rows of one length, nearly full. Knows only lengths."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
