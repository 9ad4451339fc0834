"""Values of options that several commands share."""

import pytest

from full_stack_transformer.arguments.checks import num_bytes
from full_stack_transformer.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GB", 2_000_000_000),
        ("2g", 2_000_000_000),
        ("1.5 GiB", 3 << 29),
        ("500MiB", 500 << 20),
        ("64kB", 64_000),
        ("1T", 10**12),
        ("800000000", 800_000_000),
        ("7B", 7),
    ],
)
def test_bytes_are_read_with_their_unit(text: str, expected: int) -> None:
    assert num_bytes(text, "kv_memory") == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2XB", "1e9", "2 G B", "nan", "0x10"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--kv_memory must be a number of bytes such as 2GB"):
        num_bytes(text, "kv_memory")
