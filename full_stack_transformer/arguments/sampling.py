"""The sampling parameters: names, bounds, neutral values and meaning, declared here and nowhere else.

    what a request gives     SamplingKeywords   command line, HTTP, bot, training, Python
      else what the model's generation_config.json names
      else the neutral value
    -> all of them           SamplingParameters, what the engine follows

Standard library only: the command line and the bot import it.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypedDict, cast

from full_stack_transformer.errors import RequestError, UsageError

MAX_SEED = 2**63 - 1
MAX_LOGIT_BIAS = 100.0
# What of its parameters a model's generation_config.json may name; vLLM takes the same from there.
_SAMPLING_BY_MODELS = frozenset(("temperature", "top_k", "top_p", "min_p", "typical_p"))
_NAMED_BY_MODELS = ("max_new_tokens", *sorted(_SAMPLING_BY_MODELS), "repetition_penalty")


def _number(neutral: Any, meaning: str, *, least: float, most: float, above: bool = False) -> Any:
    """A numeric field; `above`: the least value itself is not allowed."""
    bounds = {"least": least, "most": most, "above": above}
    return field(default=neutral, metadata={"help": meaning, **bounds})


def _words(meaning: str) -> Any:
    return field(default=(), metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """How to continue a text; the defaults are neutral."""

    max_new_tokens: int = _number(128, "Maximum number of new tokens.", least=1, most=131_072)
    min_new_tokens: int = _number(
        0, "Number of new tokens before an end token may end the text.", least=0, most=131_072
    )
    temperature: float = _number(
        1.0,
        "Randomness: 0 always takes the most likely token, 1 follows the model's probabilities.",
        least=0,
        most=100,
    )
    top_k: int = _number(
        0, "Sample from the k most likely tokens; 0 for all.", least=0, most=1_000_000
    )
    top_p: float = _number(
        1.0,
        "Sample from the most likely tokens whose probabilities add up to this value; 1 for all.",
        least=0,
        most=1,
        above=True,
    )
    min_p: float = _number(
        0.0,
        "Sample from tokens with at least this fraction of the highest probability; 0 for all.",
        least=0,
        most=1,
    )
    typical_p: float = _number(
        1.0,
        "Sample from the tokens whose surprise is closest to the expected one and whose probabilities add "
        "up to this value; 1 for all.",
        least=0,
        most=1,
        above=True,
    )
    repetition_penalty: float = _number(
        1.0,
        "Divides the scores of tokens that occurred in the prompt or the new text; 1 for none.",
        least=0.01,
        most=10,
    )
    presence_penalty: float = _number(
        0.0, "Subtracted from the scores of tokens that occurred in the new text.", least=-2, most=2
    )
    frequency_penalty: float = _number(
        0.0,
        "Subtracted from the score of a token once for each time it occurred in the new text.",
        least=-2,
        most=2,
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"help": "Token ids and what is added to their scores."}
    )
    stop: tuple[str, ...] = _words("The text ends before any of these strings.")
    ignored_words: tuple[str, ...] = _words("Strings that never appear in the text.")
    seed: int | None = _number(
        None,
        "The same seed gives the same text; a random one without it.",
        least=0,
        most=MAX_SEED,
    )


class SamplingKeywords(TypedDict, total=False):
    """What a request gives; what it leaves out, or gives as None, the model decides."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: tuple[str, ...] | None
    ignored_words: tuple[str, ...] | None
    seed: int | None


# What training writes into generation_config.json: a small model left to its own probabilities makes many
# mistakes and repeats itself.
FOR_SMALL_MODELS: SamplingKeywords = {
    "temperature": 0.7,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
}
# An answer in a chat, where the model names nothing of the kind: it runs to its end, and says what is likely.
# Of 36 answers to three simple questions 17 of SmolLM2-135M-Instruct were right at temperature 1, 33 with
# these.
FOR_CHATS: SamplingKeywords = {"max_new_tokens": 2048, "temperature": 0.2, "top_p": 0.9}
DECLARED: Mapping[str, Field[Any]] = {one.name: one for one in fields(SamplingParameters)}
NUMERIC = tuple(name for name, one in DECLARED.items() if "least" in one.metadata)


def option(name: str) -> Any:
    """A field of a dataclass of options: the parameter of this name, left out unless it is typed."""
    return field(default=None, metadata={"help": DECLARED[name].metadata["help"]})


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling (default: the model's generation_config.json)."""

    max_new_tokens: int | None = option("max_new_tokens")
    temperature: float | None = option("temperature")
    top_k: int | None = option("top_k")
    top_p: float | None = option("top_p")
    repetition_penalty: float | None = option("repetition_penalty")

    def sampling(self) -> SamplingKeywords:
        """The sampling parameters that were typed.

        Raises:
            UsageError: one is out of its bounds.
        """
        return _given_by(self)


@dataclass(frozen=True, kw_only=True)
class MoreSamplingOptions:
    """More sampling."""

    min_new_tokens: int | None = option("min_new_tokens")
    min_p: float | None = option("min_p")
    typical_p: float | None = option("typical_p")
    presence_penalty: float | None = option("presence_penalty")
    frequency_penalty: float | None = option("frequency_penalty")
    logit_bias: tuple[str, ...] = ()
    """ID=VALUE: added to the score of this token id; may be repeated."""
    stop: tuple[str, ...] = ()
    """The text ends before this string; may be repeated."""
    ignored_words: tuple[str, ...] = ()
    """String that never appears in the text; may be repeated."""
    seed: int | None = None
    """Seed of the first continuation, the next ones add one each. Default: a random seed, which is logged."""


def problem_with(name: str, value: object) -> str | None:
    """What is wrong with the value of a numeric parameter; none where nothing is."""
    bounds = DECLARED[name].metadata
    is_whole = not isinstance(DECLARED[name].default, float)
    is_kind = isinstance(value, int if is_whole else (int, float)) and not isinstance(value, bool)
    least, most = bounds["least"], bounds["most"]
    # Not by `math.isfinite`, which an integer beyond all floats breaks: NaN is not between either.
    if is_kind and least <= value <= most and not (bounds["above"] and value == least):
        return None
    start = "above" if bounds["above"] else "from"
    kind = "a whole number" if is_whole else "a number"
    return f"must be {kind} {start} {least:g} to {most:g}, found {value!r}"


def _given_by(options: object) -> SamplingKeywords:
    """The parameters that typed options give.

    Raises:
        UsageError: one is out of its bounds.
    """
    given: dict[str, Any] = {}
    for name in DECLARED:
        value = getattr(options, name, None)
        if name == "logit_bias" and value:
            given[name] = _parsed_logit_bias(value)
        elif value is not None and value != ():
            if name in NUMERIC and (problem := problem_with(name, value)):
                raise UsageError(f"--{name} {problem}")
            given[name] = value
    if given.get("min_new_tokens", 0) > given.get("max_new_tokens", math.inf):
        raise UsageError(
            f"--min_new_tokens {given['min_new_tokens']} is above --max_new_tokens {given['max_new_tokens']}"
        )
    return cast(SamplingKeywords, given)


def as_number(name: str, value: object) -> Any:
    """The value of a numeric parameter from a file of a person.

    Raises:
        ValueError: it is out of bounds.
    """
    if problem := problem_with(name, value):
        raise ValueError(f"{name} {problem}")
    return float(value) if isinstance(DECLARED[name].default, float) else value  # type: ignore[arg-type]


def complete(given: SamplingKeywords, defaults: SamplingParameters) -> SamplingParameters:
    """All parameters of a request: what it gives, else the model's.

    Raises:
        RequestError: one is out of its bounds.
    """
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name in NUMERIC:
        if name in chosen and (problem := problem_with(name, chosen[name])):
            raise RequestError(f"{name} {problem}")
    parameters = replace(defaults, **chosen)
    if parameters.min_new_tokens > parameters.max_new_tokens:
        parameters = replace(parameters, min_new_tokens=parameters.max_new_tokens)
    return parameters


def as_keywords(parameters: SamplingParameters) -> SamplingKeywords:
    """All parameters, as a request gives them."""
    return cast(SamplingKeywords, {name: getattr(parameters, name) for name in DECLARED})


def named_by_model(settings: object, *, is_chat: bool = False) -> SamplingParameters:
    """A model's defaults: what its generation_config.json names, else the neutral values.

    Args:
        settings: a `GenerationConfig` of transformers, or none.
        is_chat: for answers of a model that is made to chat: else the values of `FOR_CHATS`, those of the
            sampling only where the model names none of its own.
    """
    named: dict[str, Any] = {name: getattr(settings, name, None) for name in _NAMED_BY_MODELS}
    if getattr(settings, "do_sample", None) is False:
        named["temperature"] = 0.0
    # A foreign file may hold anything.
    usable = {name: value for name, value in named.items() if problem_with(name, value) is None}
    others: dict[str, Any] = dict(FOR_CHATS) if is_chat else {}
    if usable.keys() & _SAMPLING_BY_MODELS:
        others = {name: value for name, value in others.items() if name not in _SAMPLING_BY_MODELS}
    return replace(SamplingParameters(), **(others | usable))


def _parsed_logit_bias(words: tuple[str, ...]) -> dict[int, float]:
    """The token ids and values of `ID=VALUE` words.

    Raises:
        UsageError: a word has another form, or a value is out of bounds.
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
        if not abs(float(value)) <= MAX_LOGIT_BIAS:
            raise UsageError(f"--logit_bias must be between -100 and 100, found {word!r}")
    return biases
