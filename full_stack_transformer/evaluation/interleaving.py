"""Many texts with one engine: streams that take turns, some at once. Knows nothing of what they yield."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def interleaved(
    starts: Sequence[Callable[[], Iterator[Item]]], *, at_once: int
) -> Iterator[tuple[int, Item]]:
    """What all streams yield, each with the index of its stream; streams start as others end.

    Where streams share an engine, each step of one is a step of all.
    """
    waiting = list(range(len(starts)))[::-1]
    running: dict[int, Iterator[Item]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            index = waiting.pop()
            running[index] = starts[index]()
        for index, stream in list(running.items()):
            try:
                yield index, next(stream)
            except StopIteration:
                del running[index]
