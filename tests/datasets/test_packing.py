"""Packed rows hold every sample once, and are those of plain best fit decreasing."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from full_stack_transformer.datasets.order import pack
from tests.datasets.corpora import short_lengths


def _rows(lengths: list[int], row_length: int) -> list[list[int]]:
    """The numbers of the samples in each row."""
    packing = pack(np.array(lengths, dtype=np.int64), row_length)
    rows = np.split(packing.samples, packing.row_borders[1:-1])
    return [row.tolist() for row in rows] if packing.num_rows else []


def _free_lengths_of_best_fit_decreasing(lengths: list[int], row_length: int) -> list[int]:
    """One sample at a time, looking at every row."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, left in enumerate(free) if left >= length]
        if fitting:
            free[min(fitting, key=lambda row: free[row])] -= length
        else:
            free.append(row_length - length)
    return sorted(free)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.data())
def test_rows_are_those_of_plain_best_fit_decreasing(row_length: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, row_length), max_size=120))
    rows = _rows(lengths, row_length)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    free = [row_length - sum(lengths[number] for number in row) for row in rows]
    assert sorted(free) == _free_lengths_of_best_fit_decreasing(lengths, row_length)


@pytest.mark.parametrize(
    ("lengths", "num_rows"),
    [([], 0), ([8], 1), ([5, 5, 5], 3), ([4] * 7, 4), ([3, 3, 2, 5, 8, 3], 3), ([1] * 17, 3)],
)
def test_rows_are_as_few_as_can_be_where_it_is_plain(lengths: list[int], num_rows: int) -> None:
    assert len(_rows(lengths, 8)) == num_rows


def test_a_window_of_short_documents_is_packed_full_and_fast() -> None:
    lengths = short_lengths(16_384)
    started = time.perf_counter()
    packing = pack(lengths, 256)
    assert time.perf_counter() - started < 0.5  # 8 ms on an idle machine
    assert lengths.sum() / (packing.num_rows * 256) > 0.995
