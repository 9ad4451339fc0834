"""Text samples at each validation: into generated.jsonl, TensorBoard and the log.

A sample is an ornament: nothing that goes wrong with it ends or disturbs the training. It draws from
generators of its own, computes no gradients and leaves every module in the mode in which it was.
"""

import contextlib
import json
import logging
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from full_stack_transformer.errors import FullStackTransformerError, InputError
from full_stack_transformer.generation.sampling import SamplingParameters
from full_stack_transformer.generation.text_generator import GenerationOptions, TextGenerator
from full_stack_transformer.modelling.model_directory import OpenedModel
from full_stack_transformer.storage import read_json, write_text
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.module import TrainingModule

logger = logging.getLogger(__name__)

GENERATED_FILE_NAME = "generated.jsonl"
PARAMETERS_FILE_NAME = "text_generator_params.json"
_MAX_LOGGED_CHARACTERS = 200
_COLUMNS_IN_TENSORBOARD = 100
_MAX_SLOTS = 8
# Each process holds a part of each weight, so that one alone would wait for the others for ever.
_SHARDED_STRATEGIES = (FSDPStrategy, ModelParallelStrategy)

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


@dataclass(frozen=True)
class Sample:
    """A continuation and what it was drawn with: one line of generated.jsonl, beside the step."""

    seed: int
    parameters: dict[str, Any]
    """The prompt, and the sampling parameters."""
    text: str


class SampleTexts(pl.Callback):
    """Continues the prompts of text_generator_params.json, which is read anew each time.

    Args:
        directory: the experiment directory.
        tokenizer: the one of the dataset.
        defaults: what the file holds at the start.
    """

    def __init__(
        self, directory: Path, tokenizer: DocumentTokenizer, defaults: SampleParameters
    ) -> None:
        self._parameters_file = directory / PARAMETERS_FILE_NAME
        self._generated_file = directory / GENERATED_FILE_NAME
        self._tokenizer = tokenizer
        self._parameters = defaults
        self._is_active = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file to edit, unless a run that is resumed has one."""
        self._is_active = trainer.is_global_zero
        if not self._is_active:
            return
        if isinstance(trainer.strategy, _SHARDED_STRATEGIES):
            logger.warning("there are no text samples: no device has all weights of the model")
            self._is_active = False
        elif not self._parameters_file.exists():
            write_parameters(self._parameters_file, self._parameters)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write samples of the model as it is now."""
        if not self._is_active:
            return
        assert isinstance(pl_module, TrainingModule)
        self._read_parameters()
        try:
            with evaluating(pl_module):
                samples = self._generate(pl_module)
            if samples:
                self._write(trainer, samples)
        except Exception as error:  # whatever it is: a training is worth more than its samples
            logger.warning("no text samples of step %s: %s", f"{trainer.global_step:,}", error)

    def _read_parameters(self) -> None:
        try:
            self._parameters = read_parameters(self._parameters_file)
        except FullStackTransformerError as error:
            logger.warning("%s; the text samples keep the parameters of before", error)

    def _generate(self, module: TrainingModule) -> list[Sample]:
        parameters = self._parameters
        if parameters.num_samples == 0:
            return []
        model = OpenedModel("training", module.backbone, self._tokenizer, {})
        generator = TextGenerator(model, num_slots=min(parameters.num_samples, _MAX_SLOTS))
        shown = asdict(parameters)
        for name in ("prompts", "num_samples", "seed"):
            del shown[name]
        return [
            Sample(parameters.seed + index, {"prompt": prompt, **shown}, text)
            for prompt in parameters.prompts
            for index, text in enumerate(
                generator.generate(
                    prompt,
                    parameters.generation_options(),
                    num_return_sequences=parameters.num_samples,
                )
            )
        ]

    def _write(self, trainer: pl.Trainer, samples: Sequence[Sample]) -> None:
        step = trainer.global_step
        lines = [
            json.dumps({"step": step, **asdict(sample)}, ensure_ascii=False) + "\n"
            for sample in samples
        ]
        with self._generated_file.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        if isinstance(trainer.logger, TensorBoardLogger):
            for index, sample in enumerate(samples):
                tag = f"{metric_names.SAMPLE_TEXT}/{index}"
                trainer.logger.experiment.add_text(tag, as_markdown(sample), step)
        text = samples[0].parameters["prompt"] + samples[0].text
        logger.info("sample: %s", " ".join(text.split())[:_MAX_LOGGED_CHARACTERS])


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


def as_markdown(sample: Sample) -> str:
    """A sample for TensorBoard: as it is, but for lines that would run out of the picture."""
    text = sample.parameters["prompt"] + sample.text
    broken = [
        part for line in text.splitlines() for part in textwrap.wrap(line, _COLUMNS_IN_TENSORBOARD) or [""]
    ]  # fmt: skip
    # Four spaces: Markdown shows it as it is.
    return "\n".join(f"    {line}" for line in broken)


def drop_lines_after(file: Path, step: int) -> None:
    """Take lines of steps after `step` out of generated.jsonl, and a line that a kill cut short.

    A training that is resumed from `step` writes them again. A missing file is left missing.
    """
    if not file.is_file():
        return
    # Not by `splitlines`, which also breaks at separators that JSON leaves in a text.
    with file.open(encoding="utf-8", errors="replace", newline="\n") as opened:
        lines = list(opened)
    kept = [line for line in lines if _is_up_to(line, step)]
    if len(kept) < len(lines):
        write_text(file, "".join(kept))


def _is_up_to(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the `with`; every part is then in its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
