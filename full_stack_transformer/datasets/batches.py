"""Which samples form a batch: a function of the seed and the epoch alone.

Samples of similar length share a batch, so that little is padding; what is shuffled is the order of the
samples before they are grouped, and the order of the batches. Knows only lengths, never tokens.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

# Batches whose samples are sorted by length together: larger means less padding, smaller more chance.
_WINDOW_BATCHES = 64


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of sample numbers, of similar length; every rank gets equally many.

    Args:
        lengths: tokens of each sample (samples,).
        batch_size: samples in a batch; the last one of an epoch may be smaller.
        seed: decides the order together with the epoch.
        shuffle: false keeps one order for all epochs: that of the lengths.
        rank: which process this is, of `world_size`.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._rank, self._world_size = rank, world_size
        self._epoch = 0
        # Lightning announces the epoch to `.sampler` of a batch sampler, and to nothing else.
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """The order of the next iteration is that of `epoch`."""
        self._epoch = epoch

    def __len__(self) -> int:
        num_batches = -(-len(self._lengths) // self._batch_size)
        if self._shuffle:
            return max(1, num_batches // self._world_size)
        return -(-max(0, num_batches - self._rank) // self._world_size)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._all_batches()
        if self._shuffle:
            # Every rank must take equally many optimizer steps: the rest is left to other epochs.
            batches = batches[: len(self) * self._world_size]
        for batch in batches[self._rank :: self._world_size]:
            yield batch.tolist()

    def _all_batches(self) -> list[NDArray[np.int64]]:
        if not self._shuffle:
            order = np.argsort(self._lengths, kind="stable")
            return self._cut(order, self._batch_size)
        random = np.random.default_rng((self._seed, self._epoch))
        order = random.permutation(len(self._lengths))
        batches: list[NDArray[np.int64]] = []
        for window in self._cut(order, self._batch_size * _WINDOW_BATCHES):
            by_length = window[np.argsort(self._lengths[window], kind="stable")]
            batches += self._cut(by_length, self._batch_size)
        return [batches[index] for index in random.permutation(len(batches))]

    @staticmethod
    def _cut(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
        return [order[start : start + size] for start in range(0, len(order), size)]
