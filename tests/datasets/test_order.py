"""A keyed permutation holds every number once, looks random, and is there at once at any length."""

import time

import numpy as np
import pytest

from full_stack_transformer.datasets.order import KeyedPermutation, make_key, shuffled


def _all(length: int, seed: int = 0, epoch: int = 0) -> list[int]:
    order: list[int] = KeyedPermutation(length, seed, epoch)[np.arange(length)].tolist()
    return order


@pytest.mark.parametrize("length", [1, 2, 3, 5, 255, 256, 257, 1000, 4096, 4097, 65_537, 100_003])
def test_every_number_occurs_once(length: int) -> None:
    assert sorted(_all(length)) == list(range(length))


def test_seed_and_epoch_decide_the_order() -> None:
    assert _all(1000, seed=1) == _all(1000, seed=1)
    orders = [_all(1000, seed, epoch) for seed in range(5) for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 25


def test_the_order_does_not_depend_on_how_it_is_asked_for() -> None:
    permutation = KeyedPermutation(5000, 3, 1)
    in_chunks = [permutation[chunk] for chunk in np.array_split(np.arange(5000), 37)]
    assert np.concatenate(in_chunks).tolist() == _all(5000, 3, 1)
    assert permutation[np.array([4999, 0, 7])].tolist() == [
        _all(5000, 3, 1)[index] for index in (4999, 0, 7)
    ]


@pytest.mark.parametrize(("length", "num_seeds"), [(6, 300), (100, 400)])
def test_every_number_is_as_likely_at_every_position(length: int, num_seeds: int) -> None:
    counts = np.zeros((length, length))
    for seed in range(num_seeds):
        counts[np.arange(length), _all(length, seed)] += 1
    expected = num_seeds / length
    # Rows and columns both add up, so that one part in `length` of the deviations is not free.
    chi_square = ((counts - expected) ** 2 / expected).sum() * (length - 1) / length
    freedom = (length - 1) ** 2
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_neighbours_are_not_related() -> None:
    """Distances from one number to the next are as likely as each other."""
    order = np.array(_all(200_000))
    distances = np.diff(order) % len(order)
    counts = np.bincount(distances * 100 // len(order), minlength=100)
    expected = len(distances) / 100
    assert ((counts - expected) ** 2 / expected).sum() < 99 + 4 * np.sqrt(2 * 99)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.01


@pytest.mark.parametrize("length", [10**9, 2**40 + 1])
def test_a_billion_numbers_take_no_time(length: int) -> None:
    started = time.perf_counter()
    numbers = KeyedPermutation(length, 0, 0)[np.arange(length - 1024, length)]
    assert time.perf_counter() - started < 0.5  # 0.3 ms on an idle machine
    assert len(set(numbers.tolist())) == 1024
    assert numbers.min() >= 0
    assert numbers.max() < length
    assert abs(numbers.mean() / length - 0.5) < 0.05


def test_a_key_depends_on_each_part_and_their_order() -> None:
    keys = {make_key(*parts) for parts in [(), (0,), (0, 0), (0, 1), (1, 0), (1, 1), (2**64 - 1,)]}
    assert len(keys) == 7
    assert all(0 <= key < 2**64 for key in keys)


def test_short_arrays_are_shuffled_by_key() -> None:
    assert sorted(shuffled(50, 1).tolist()) == list(range(50))
    assert shuffled(50, 1).tolist() == shuffled(50, 1).tolist() != shuffled(50, 2).tolist()
    assert shuffled(0, 1).tolist() == []
