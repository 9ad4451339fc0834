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


def check_sampling(options: object) -> None:
    at_least(options, 1, "max_new_tokens")
    between(options, 0, 100, "temperature")
    between(options, 1e-6, 1, "top_p")
    between(options, 1e-6, 10, "repetition_penalty")


def parsed_logit_bias(words: tuple[str, ...]) -> dict[int, float]:
    """The token ids and values of `ID=VALUE` words.

    Raises:
        UsageError: a word is not ID=VALUE, or a value is not between -100 and 100.
    """
    biases: dict[int, float] = {}
    for word in words:
        token_id, _, value = word.partition("=")
        try:
            biases[int(token_id)] = float(value)
        except ValueError:
            raise UsageError(
                f"--logit_bias must be ID=VALUE, such as 11=-100, found {word!r}"
            ) from None
        if not abs(float(value)) <= 100:
            raise UsageError(f"--logit_bias must be between -100 and 100, found {word!r}")
    return biases
