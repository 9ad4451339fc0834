"""Which options this process's command line gave, and which of them were typed.

Options that Python code made have no command line: the program gave them all.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CommandLine:
    """Names of options, noted while the command line is parsed."""

    words: tuple[str, ...] = ()
    """As they were typed, with the name of the command."""
    typed: set[str] = field(default_factory=set)
    """Those of the command line itself."""
    given: set[str] = field(default_factory=set)
    """The same, and those of the --config file."""
    started: float = field(default_factory=time.monotonic)
    """When the command began, by time.monotonic()."""


_current: CommandLine | None = None


@contextlib.contextmanager
def running(line: CommandLine) -> Iterator[None]:
    """Make a command line known while its command runs."""
    global _current
    before, _current = _current, line
    try:
        yield
    finally:
        _current = before


def command_words() -> tuple[str, ...]:
    """The words of the command line; none where Python code made the options."""
    return () if _current is None else _current.words


def is_typed(name: str) -> bool:
    """Whether an option stands in the command line itself, or Python code made the options."""
    return _current is None or name in _current.typed


def command_started() -> float:
    """When the command that runs began, before its imports; now, if Python code runs it."""
    return time.monotonic() if _current is None else _current.started


def given_options(options: Any) -> frozenset[str]:
    """Names of the options that somebody chose; those of Python code that differ from the default."""
    if _current is not None:
        return frozenset(_current.given)
    return frozenset(
        option.name
        for option in dataclasses.fields(options)
        if getattr(options, option.name) != option.default
    )
