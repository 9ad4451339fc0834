"""Check one array of a dataset directory, block by block: its header and its values.

Knows nothing of descriptions and hashes; `verify` does.
"""

import math
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

Values = NDArray[np.integer[Any]]


class ValueCheck(Protocol):
    """Checks the values of an array block by block."""

    def feed(self, values: Values) -> None: ...

    def problems(self) -> Iterator[str]: ...


class ArrayCheck:
    """Compares header and values of a .npy file with the description."""

    def __init__(self, length: int | None, dtype: str, values: ValueCheck) -> None:
        self._length, self._dtype, self._values = length, dtype, values
        self._found_dtype: np.dtype[Any] | None = None
        self._problems: list[str] = []
        self._promised_bytes = 0
        self._data_bytes = 0

    def take_header(self, file: BinaryIO) -> int:
        """Read the header; return its length, 0 if it is not valid."""
        try:
            version = npy_format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"its version is {version}, expected (1, 0)")
            shape, _, dtype = npy_format.read_array_header_1_0(file)
        except (
            Exception
        ) as error:  # a damaged header raises TokenError, TypeError, SyntaxError, ValueError, …
            reason = " ".join(str(error).split())[:100]
            self._problems.append(f"has no valid NumPy header: {reason}")
            return 0
        if dtype.str != self._dtype:
            swapped = dtype.newbyteorder().str == self._dtype
            self._problems.append(
                f"holds {dtype.str}, expected {self._dtype}"
                + (": the byte order is swapped" if swapped else "")
            )
        if self._length is not None and shape != (self._length,):
            self._problems.append(
                f"has the shape {shape} in its header, but the description has {self._length:,} values"
            )
        if dtype.kind in "iu":
            self._found_dtype = dtype
        self._promised_bytes = math.prod(shape) * dtype.itemsize
        return file.tell()

    def feed(self, block: bytes) -> None:
        """Check the next bytes after the header."""
        self._data_bytes += len(block)
        if self._found_dtype is not None:
            count = len(block) // self._found_dtype.itemsize
            self._values.feed(np.frombuffer(block, self._found_dtype, count))

    def problems(self, is_of_expected_size: bool) -> Iterator[str]:
        """The problems; of a file of another size, which is reported already, only those of the header."""
        yield from self._problems
        if not is_of_expected_size:
            return
        if self._found_dtype and self._promised_bytes != self._data_bytes:
            yield (
                f"should have {self._promised_bytes:,} bytes of values by its header, found "
                f"{self._data_bytes:,}"
            )
        yield from self._values.problems()


class _Faults:
    """Counts faults and remembers the first."""

    def __init__(self) -> None:
        self.num = 0
        self.first = (0, 0)

    def add(self, wrong: NDArray[np.bool_], values: Values, offset: int) -> None:
        """Count the faults where `wrong` (n,) is true; `offset` is the index of its first item."""
        num = int(np.count_nonzero(wrong))
        if num and not self.num:
            index = int(np.argmax(wrong))
            self.first = (offset + index, int(values[index]))
        self.num += num


class Ids:
    """Checks that token ids are below the vocabulary size."""

    def __init__(self, vocab_size: int | None) -> None:
        self._vocab_size = vocab_size
        self._offset = 0
        self._too_large = _Faults()

    def feed(self, values: Values) -> None:
        """Check the next ids (n,)."""
        # The maximum first: comparing every id costs three times as much and is rarely needed.
        if self._vocab_size is not None and len(values) and values.max() >= self._vocab_size:
            self._too_large.add(values >= self._vocab_size, values, self._offset)
        self._offset += len(values)

    def problems(self) -> Iterator[str]:
        """One line if an id was too large."""
        if self._too_large.num:
            place, token_id = self._too_large.first
            yield (
                f"{self._too_large.num:,} token ids are not below the vocab_size {self._vocab_size:,}, "
                f"the first is {token_id:,} at {place:,}"
            )


class Marks:
    """Checks that each token is marked as learned (1) or not (0), and how many are learned."""

    def __init__(self, num_learned: int | None) -> None:
        self._num_expected = num_learned
        self._offset = self._num_learned = 0
        self._others = _Faults()

    def feed(self, values: Values) -> None:
        """Check the next marks (n,)."""
        self._others.add(values > 1, values, self._offset)
        self._num_learned += int(np.count_nonzero(values))
        self._offset += len(values)

    def problems(self) -> Iterator[str]:
        """One line for each kind of fault."""
        if self._others.num:
            place, value = self._others.first
            yield f"{self._others.num:,} marks are not 0 or 1, the first is {value:,} at {place:,}"
        if self._num_expected is not None and self._num_learned != self._num_expected:
            yield (
                f"{self._num_learned:,} tokens are learned, but the description has "
                f"{self._num_expected:,}"
            )


class Positions:
    """Checks that start positions begin at 0, increase, are in the corpus, and that lengths are allowed."""

    def __init__(self, num_tokens: int | None, least: int | None, most: int | None) -> None:
        self._num_tokens, self._least, self._most = num_tokens, least, most
        self._offset = 0
        self._last: NDArray[np.int64] = np.zeros(0, np.int64)
        self._first_position = 0
        self._beyond, self._falling, self._wrong_lengths = _Faults(), _Faults(), _Faults()

    def feed(self, values: Values) -> None:
        """Check the next positions (n,)."""
        if not len(values):
            return
        if not self._offset:
            self._first_position = int(values[0])
        if self._num_tokens is not None:
            self._beyond.add(values >= self._num_tokens, values, self._offset)
        joined = np.concatenate((self._last, values.astype(np.int64)))
        self._measure(np.diff(joined), self._offset - len(self._last))
        self._last = joined[-1:]
        self._offset += len(values)

    def problems(self) -> Iterator[str]:
        """One line for each kind of fault."""
        if self._num_tokens is not None and len(self._last):
            self._measure(self._num_tokens - self._last, self._offset - 1)
        if self._first_position != 0:
            yield f"the first position is {self._first_position:,}, expected 0"
        if self._beyond.num:
            place, position = self._beyond.first
            yield (
                f"{self._beyond.num:,} positions are beyond the {self._num_tokens:,} tokens of the corpus, "
                f"the first is {position:,} at {place:,}"
            )
        if self._falling.num:
            place, step = self._falling.first
            yield (
                f"{self._falling.num:,} positions do not increase, the first after {place:,} by {step:,}"
            )
        if self._wrong_lengths.num:
            place, length = self._wrong_lengths.first
            yield (
                f"{self._wrong_lengths.num:,} samples are not of {self._least:,} to {self._most:,} tokens, "
                f"the first is sample {place:,} with {length:,}"
            )

    def _measure(self, lengths: NDArray[np.int64], offset: int) -> None:
        falling = lengths <= 0
        self._falling.add(falling, lengths, offset)
        if self._least is not None and self._most is not None:
            wrong = ((lengths < self._least) | (lengths > self._most)) & ~falling
            self._wrong_lengths.add(wrong, lengths, offset)
