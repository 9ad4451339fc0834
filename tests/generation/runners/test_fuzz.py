"""The first cases of the fuzz of the C++ decoder; `make test-sanitizers` runs it for minutes."""

import pytest

from tests.generation.runners.fuzz import check_case


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_texts_that_are_read_together_have_the_bits_of_each_alone(first: int) -> None:
    for seed in range(first, first + 10):
        check_case(seed)
