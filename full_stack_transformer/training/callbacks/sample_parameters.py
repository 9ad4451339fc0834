"""text_generator_params.json: how the text samples of a training are drawn, to be edited while it runs."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from full_stack_transformer.errors import InputError
from full_stack_transformer.generation.sampling import SamplingParameters
from full_stack_transformer.generation.text_generator import GenerationOptions
from full_stack_transformer.storage import read_json, write_text

PARAMETERS_FILE_NAME = "text_generator_params.json"

# name -> smallest and largest value; whole numbers where the smallest is one
_BOUNDS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 1_000_000),
    "temperature": (0.0, 100.0),
    "top_k": (0, 10_000_000),
    "top_p": (1e-6, 1.0),
    "repetition_penalty": (1e-6, 10.0),
    "num_samples": (0, 64),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True)
class SampleParameters:
    """What is continued, and how."""

    prompts: tuple[str, ...] = ("",)
    """Beginnings of texts; the empty one begins a document."""
    max_new_tokens: int = 128
    """Tokens to add, at most; fewer where the model's context has less room."""
    temperature: float = 0.7
    """Randomness: 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the so many likeliest tokens; 0 for all."""
    top_p: float = 0.95
    """Choose among the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.1
    """Divides the scores of tokens that already occurred; 1 for none."""
    num_samples: int = 2
    """Continuations of each prompt; 0 for none."""
    seed: int = 0
    """Seed of the first continuation; the next ones follow it."""

    def generation_options(self) -> GenerationOptions:
        """As the generator takes them."""
        return GenerationOptions(
            max_new_tokens=self.max_new_tokens,
            sampling=SamplingParameters(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                repetition_penalty=self.repetition_penalty,
            ),
            seed=self.seed,
            over_length="clip",
        )


def write_parameters(path: Path, parameters: SampleParameters) -> None:
    """Write the file that a person then edits."""
    write_text(path, json.dumps(asdict(parameters), indent=2, ensure_ascii=False) + "\n")


def read_parameters(path: Path) -> SampleParameters:
    """Read the file; what it does not name has its default.

    Raises:
        InputError: it is missing, no JSON object, or holds a name or value that cannot be.
    """
    content = read_json(path)
    known = [field.name for field in fields(SampleParameters)]
    unknown = sorted(content.keys() - set(known))
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is none of {', '.join(known)}")
    try:
        checked = {name: _checked(name, value) for name, value in content.items()}
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return SampleParameters(**checked)


def _checked(name: str, value: object) -> Any:
    if name == "prompts":
        if not isinstance(value, list) or not all(isinstance(prompt, str) for prompt in value):
            raise ValueError(f"prompts must be a list of texts, found {value!r}")
        return tuple(value)
    least, most = _BOUNDS[name]
    is_whole = isinstance(least, int)
    kind = "a whole number" if is_whole else "a number"
    is_kind = isinstance(value, int if is_whole else (int, float)) and not isinstance(value, bool)
    # Not by `math.isfinite`, which an integer beyond all floats breaks: NaN is not between either.
    if not is_kind or not least <= value <= most:  # type: ignore[operator]
        raise ValueError(f"{name} must be {kind} from {least:g} to {most:g}, found {value!r}")
    return value if is_whole else float(value)  # type: ignore[arg-type]
