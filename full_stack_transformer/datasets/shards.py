"""The second form of a corpus: shards of bounded size, which read like one array.

    train/corpus-00000.npy                  tokens of the samples of the first shard
    train/sample_start_positions-00000.npy  where each of them starts in that file
    train/learned-00000.npy                 of conversations

A sample is in one shard, and shards follow each other in the order of the samples: concatenated they are the
arrays of the single form, but that positions count from the start of their shard. The description lists the
samples and tokens of each. A shard is opened when something of it is read. Knows nothing of text.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.datasets.files import OpenedArray, Values
from full_stack_transformer.datasets.order import SHARDS_TOGETHER
from full_stack_transformer.errors import DatasetError

# Of one kind of file: a window of samples may be of two groups of shards.
_MAX_OPEN = 2 * SHARDS_TOGETHER


@dataclass(frozen=True)
class ShardCounts:
    """What a shard holds."""

    num_samples: int
    num_tokens: int


def shard_file_name(file_name: str, index: int) -> str:
    """`corpus.npy` of a shard: `corpus-00003.npy`."""
    stem, _, ending = file_name.rpartition(".")
    return f"{stem}-{index:05d}.{ending}"


def described_shards(description: Mapping[str, Any], split: str) -> list[ShardCounts] | None:
    """The shards of a split; None in the single form.

    Raises:
        DatasetError: their counts do not add up to those of the split.
    """
    if "shards" not in description:
        return None
    try:
        shards = [ShardCounts(**counts) for counts in description["shards"][split]]
        is_right = all(
            sum(getattr(shard, f"num_{unit}") for shard in shards)
            == description[f"number_of_{split}_{unit}"]
            for unit in ("samples", "tokens")
        )
    except (KeyError, TypeError) as error:
        raise DatasetError(f"description.json lists no valid {split} shards ({error!r})") from error
    if not is_right:
        raise DatasetError(f"description.json lists {split} shards that do not add up to the split")
    return shards


def borders_of(sizes: Sequence[int]) -> NDArray[np.int64]:
    """(shards + 1,) where each shard begins, and the end of the last."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(sizes, dtype=np.int64))])


class JoinedArray:
    """The arrays of one kind of all shards as one array: what a `Corpus` does with an array of NumPy's.

    Everything is copied out of the files. The least recently used are closed again.

    Args:
        borders: (shards + 1,) where each array begins.
        dtype: of the values.
        open_array: opens that of a shard.
        offsets: (shards,) what is added to the values of each.
    """

    def __init__(
        self,
        borders: NDArray[np.int64],
        dtype: np.dtype[Any],
        open_array: Callable[[int], OpenedArray],
        offsets: NDArray[np.int64] | None = None,
    ) -> None:
        self._borders = borders
        self._open_array = open_array
        self._offsets = offsets
        self._opened: OrderedDict[int, OpenedArray] = OrderedDict()
        self.dtype = dtype
        _ALL.add(self)

    def close(self) -> None:
        """Give all files back; they are opened again when they are read."""
        while self._opened:
            self._opened.popitem(last=False)[1].close()

    def __len__(self) -> int:
        return int(self._borders[-1])

    def take(self, positions: NDArray[np.int64], mode: str = "clip") -> Values:
        """The values at positions, in their shape; those after the end give the last value."""
        flat = np.minimum(positions.ravel(), len(self) - 1)
        found = np.empty(len(flat), dtype=self.dtype)
        shards = np.searchsorted(self._borders, flat, side="right") - 1
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            found[here] = self._values(shard).take(flat[here] - self._borders[shard])
            if self._offsets is not None:
                found[here] += self._offsets[shard]
        return found.reshape(positions.shape)

    def __getitem__(self, part: slice) -> Values:
        """A copy of consecutive values."""
        first, end, step = part.indices(len(self))
        assert step == 1, "consecutive values"
        pieces = [np.empty(0, dtype=self.dtype), *self._parts(first, end)]
        return np.concatenate(pieces)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Values:
        """All values, in memory."""
        return self[:] if dtype is None else self[:].astype(dtype)

    def _parts(self, first: int, end: int) -> Iterator[Values]:
        for shard in range(len(self._borders) - 1):
            start, stop = int(self._borders[shard]), int(self._borders[shard + 1])
            if first < stop and start < end:
                values = self._values(shard)[max(first, start) - start : min(end, stop) - start]
                yield values if self._offsets is None else values + self._offsets[shard]

    def _values(self, shard: int) -> Values:
        opened = self._opened.get(shard)
        if opened is None:
            while len(self._opened) >= _MAX_OPEN:
                self._opened.popitem(last=False)[1].close()
            opened = self._opened[shard] = self._open_array(shard)
        self._opened.move_to_end(shard)
        return opened.values


# Of this process: together they may hold more files than a cache has room for.
_ALL: WeakSet[JoinedArray] = WeakSet()


def close_all() -> None:
    """Give back the files of all arrays."""
    for array in list(_ALL):
        array.close()
