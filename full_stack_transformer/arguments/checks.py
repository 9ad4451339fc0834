"""Checks shared by the options of several commands; all raise UsageError."""

import math

from full_stack_transformer.errors import UsageError


def at_least(options: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not (value >= least and math.isfinite(value)):
            raise UsageError(f"--{name} must be at least {least:g}, found {value!r}")


def between(options: object, least: float, most: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not least <= value <= most:
            raise UsageError(f"--{name} must be between {least:g} and {most:g}, found {value!r}")
