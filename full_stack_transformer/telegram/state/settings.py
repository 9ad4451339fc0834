"""The sampling settings of a chat: values, bounds, presets. Knows neither Telegram nor the service."""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from full_stack_transformer.arguments.sampling import DECLARED, MAX_SEED, problem_with

Mode = Literal["auto", "continue", "chat"]
MODES: tuple[Mode, ...] = ("auto", "continue", "chat")
MAX_VARIANTS = 4
# What the service takes; it ends a text at the end of the model's context.
MAX_LENGTH = int(DECLARED["max_new_tokens"].metadata["most"])


@dataclass(frozen=True)
class Settings:
    """The settings of a chat, or of one topic of a forum."""

    mode: Mode = "auto"
    """auto: chat if the model has a chat template, else continue."""
    # None: the model's generation_config.json decides.
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    length: int | None = None
    """Maximum number of new tokens in a text."""
    variants: int = 1
    seed: int | None = None
    """None: a random one for each text."""
    system: str | None = None
    """System prompt of conversations; None for that of the bot's operator."""
    model: str | None = None
    """None, and a model that is not served any more: the first one."""

    def as_json(self) -> str:
        """As the database stores them."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, content: str) -> "Settings":
        """From the database; unknown fields, of another version, are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in json.loads(content).items() if name in known})


NUMERIC_FIELDS = ("temperature", "top_k", "top_p", "repetition_penalty", "length", "variants")

# Values that the buttons of /settings step through; /settings NAME VALUE sets any value in between.
_STEPS: dict[str, tuple[float, ...]] = {
    "temperature": (0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0),
    "top_k": (0, 5, 10, 20, 40, 80, 160),
    "top_p": (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0),
    "repetition_penalty": (1.0, 1.05, 1.1, 1.2, 1.3, 1.5),
    "length": (20, 40, 80, 120, 160, 240, 320, 480, 640, 1024, 2048, 4096, 8192),
    "variants": tuple(range(1, MAX_VARIANTS + 1)),
}
# Stricter than the bounds of `SamplingParameters`, or not part of it.
_OWN_BOUNDS = {"temperature": (0, 2), "length": (1, MAX_LENGTH), "variants": (1, MAX_VARIANTS)}
# Shown, and typed by users, for values that the model decides.
AUTO = "auto"
# What the buttons step from while the model decides.
_TYPICAL: dict[str, float] = {
    "temperature": 0.7,
    "top_k": 0,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "length": 80,
}
_INTEGERS = ("top_k", "length", "variants")

# Presets change only how random the sampling is.
PRESETS: dict[str, dict[str, Any]] = {
    "precise": {"temperature": 0.2, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.1},
    "balanced": {"temperature": None, "top_k": None, "top_p": None, "repetition_penalty": None},
    "creative": {"temperature": 1.1, "top_k": 0, "top_p": 0.98, "repetition_penalty": 1.05},
}


def preset_of(settings: Settings) -> str | None:
    """Name of the preset that the settings match."""
    for name, values in PRESETS.items():
        if all(getattr(settings, field) == value for field, value in values.items()):
            return name
    return None


def number_as_text(value: float | None) -> str:
    """A number of the settings as text."""
    return AUTO if value is None else f"{value:g}"


def stepped(settings: Settings, name: str, direction: int) -> Settings:
    """The settings with the next value up (1) or down (-1); unchanged at either end."""
    value = getattr(settings, name)
    if value is None:
        value = _TYPICAL[name]
    beyond = [step for step in _STEPS[name] if (step - value) * direction > 0]
    if not beyond:
        return settings
    step = min(beyond) if direction > 0 else max(beyond)
    return _with_number(settings, name, step)


def with_value(settings: Settings, name: str, text: str) -> Settings | str:
    """The settings with a value that a user typed, or a text that names the valid values."""
    if name in PRESETS and not text:
        return replace(settings, **PRESETS[name])
    if name == "mode":
        return replace(settings, mode=text) if text in MODES else " | ".join(MODES)
    if name == "seed":
        return _with_seed(settings, text)
    if name not in NUMERIC_FIELDS:
        return " | ".join((*NUMERIC_FIELDS, "seed", "mode", *PRESETS))
    if text == AUTO and name != "variants":
        removed: dict[str, Any] = {name: None}
        return replace(settings, **removed)
    expected = f"{name} {_bounds_as_text(name)}"
    try:
        value = float(text.replace(",", ".")[:20])
    except ValueError:
        return expected
    if not math.isfinite(value) or (name in _INTEGERS and value != int(value)):
        return expected
    changed = _with_number(settings, name, value)
    if name in _OWN_BOUNDS:
        low, high = _OWN_BOUNDS[name]
        return changed if low <= value <= high else expected
    return expected if problem_with(name, getattr(changed, name)) else changed


def _bounds_as_text(name: str) -> str:
    if name in _OWN_BOUNDS:
        low, high = _OWN_BOUNDS[name]
        return f"{low:g} … {high:g}"
    bounds = DECLARED[name].metadata
    return f"{'> ' if bounds['above'] else ''}{bounds['least']:g} … {bounds['most']:g}"


def _with_number(settings: Settings, name: str, value: float) -> Settings:
    changed: dict[str, Any] = {name: int(value) if name in _INTEGERS else value}
    return replace(settings, **changed)


def _with_seed(settings: Settings, text: str) -> Settings | str:
    if text in ("random", "off"):
        return replace(settings, seed=None)
    if text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_SEED:
        return replace(settings, seed=int(text))
    return "seed random | 0 … 2^63-1"
