"""Time that was spent, by two clocks: that of the wall, and that of the processor.

Where other work shares the cores only the second one tells what a command needs.
"""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Spent:
    """Seconds; they are added, and multiplied by numbers."""

    seconds: float = 0.0
    processor_seconds: float = 0.0
    """Of all threads of this process."""

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.seconds + other.seconds, self.processor_seconds + other.processor_seconds)

    def __sub__(self, other: "Spent") -> "Spent":
        """Nothing is below zero: what is measured in turns may seem so."""
        return Spent(
            max(0.0, self.seconds - other.seconds),
            max(0.0, self.processor_seconds - other.processor_seconds),
        )

    def __mul__(self, factor: float) -> "Spent":
        return Spent(self.seconds * factor, self.processor_seconds * factor)

    def __truediv__(self, number: float) -> "Spent":
        return self * (1 / number)


def now() -> Spent:
    """Both clocks; differences count."""
    return Spent(time.perf_counter(), time.process_time())
