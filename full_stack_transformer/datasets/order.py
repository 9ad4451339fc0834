"""A shuffled order that is computed, not stored: the index at a position, from a key.

Shuffling a billion indices takes a minute and 8 GB. A keyed permutation computes any position in constant
time and memory, so that an epoch starts, or resumes, at once whatever its size. Knows nothing of samples.
"""

import numpy as np
from numpy.typing import NDArray

# Multipliers of splitmix64: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014.
_INCREMENT = 0x9E3779B97F4A7C15
_FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9
_SECOND_MULTIPLIER = 0x94D049BB133111EB
_64_BITS = (1 << 64) - 1
# Four rounds are enough for large domains (Luby and Rackoff 1988); small ones need more.
_NUM_ROUNDS = 8
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


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A hash of 64 bits of each value: the end of splitmix64, keyed. Overflow is intended."""
    mixed = (values ^ key) * np.uint64(_FIRST_MULTIPLIER)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(_SECOND_MULTIPLIER)
    mixed ^= mixed >> np.uint64(32)
    return mixed
