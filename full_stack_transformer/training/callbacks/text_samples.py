"""Text samples at each validation: into generated.jsonl, TensorBoard and the log.

An error in a sample never ends or changes the training. Sampling has its own random generators, computes no
gradients, and restores the mode of each module.
"""

import contextlib
import json
import logging
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.sampling import (
    FOR_SMALL_MODELS,
    NUMERIC,
    SamplingParameters,
    as_keywords,
    as_number,
    complete,
)
from full_stack_transformer.errors import FullStackTransformerError, InputError
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.modelling.model_directory import OpenedModel
from full_stack_transformer.storage import read_json, write_text
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.module import TrainingModule
from full_stack_transformer.training.sharding import is_sharded

logger = logging.getLogger(__name__)

GENERATED_FILE_NAME = "generated.jsonl"
PARAMETERS_FILE_NAME = "text_generator_params.json"
_MAX_LOGGED_CHARACTERS = 200
_COLUMNS_IN_TENSORBOARD = 100
_MAX_SLOTS = 8

_MAX_SAMPLES = 64
# Sampling parameters in the file to edit and in each sample; others only where they are not neutral.
_SHOWN = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
_DEFAULTS = complete(FOR_SMALL_MODELS, SamplingParameters(seed=0))


@dataclass(frozen=True)
class SampleParameters:
    """The prompts and how they are continued."""

    prompts: tuple[str, ...] = ("",)
    """Beginnings of texts; an empty prompt starts a document."""
    num_samples: int = 2
    """Continuations of each prompt; 0 for none."""
    sampling: SamplingParameters = _DEFAULTS
    """Those of the exported model. The seed is that of the first continuation; the next ones add one each."""

    def shown(self) -> dict[str, Any]:
        """The sampling parameters without the seed."""
        neutral = asdict(SamplingParameters())
        values = asdict(self.sampling)
        return {
            name: value
            for name, value in values.items()
            if name in _SHOWN or (value != neutral[name] and name != "seed")
        }


@dataclass(frozen=True)
class Sample:
    """A continuation with its seed and parameters; with the step a line of generated.jsonl."""

    seed: int
    parameters: dict[str, Any]
    """The prompt, and the sampling parameters."""
    text: str


class SampleTexts(pl.Callback):
    """Continues the prompts of text_generator_params.json, which is read at each validation.

    Args:
        directory: the experiment directory.
        tokenizer: of the dataset.
        defaults: initial content of the file.
    """

    def __init__(
        self, directory: Path, tokenizer: DocumentTokenizer, defaults: SampleParameters
    ) -> None:
        self._parameters_file = directory / PARAMETERS_FILE_NAME
        self._generated_file = directory / GENERATED_FILE_NAME
        self._tokenizer = tokenizer
        self._parameters = defaults
        self._is_active = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file to edit, unless a resumed run has one."""
        self._is_active = trainer.is_global_zero
        if not self._is_active:
            return
        if not self._parameters_file.exists():
            write_parameters(self._parameters_file, self._parameters)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write samples of the current model."""
        assert isinstance(pl_module, TrainingModule)
        backbone = pl_module.whole_backbone() if is_sharded(trainer) else pl_module.backbone
        if not self._is_active or backbone is None:
            return
        self._read_parameters()
        try:
            with evaluating(backbone):
                samples = self._generate(backbone)
            if samples:
                self._write(trainer, samples)
        except Exception as error:  # an error in a sample must not end the training
            logger.warning("no text samples of step %s: %s", f"{trainer.global_step:,}", error)

    def _read_parameters(self) -> None:
        try:
            self._parameters = read_parameters(self._parameters_file)
        except FullStackTransformerError as error:
            logger.warning("%s; the text samples keep the previous parameters", error)

    def _generate(self, backbone: Backbone) -> list[Sample]:
        parameters = self._parameters
        if parameters.num_samples == 0:
            return []
        model = OpenedModel("training", backbone, self._tokenizer, {})
        generator = TextGenerator(model, num_slots=min(parameters.num_samples, _MAX_SLOTS))
        texts = {
            prompt: generator.generate(
                prompt,
                num_return_sequences=parameters.num_samples,
                clips=True,
                **as_keywords(parameters.sampling),
            )
            for prompt in parameters.prompts
        }
        first_seed = parameters.sampling.seed or 0
        return [
            Sample(first_seed + index, {"prompt": prompt, **parameters.shown()}, text)
            for prompt in parameters.prompts
            for index, text in enumerate(texts[prompt])
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
    content = {
        "prompts": parameters.prompts,
        **parameters.shown(),
        "num_samples": parameters.num_samples,
        "seed": parameters.sampling.seed,
    }
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_parameters(path: Path) -> SampleParameters:
    """Read the file; what it does not name has its default.

    Raises:
        InputError: it is missing, no JSON object, or holds an unknown name or an invalid value.
    """
    content = read_json(path)
    known = ["prompts", "num_samples", *NUMERIC]
    unknown = sorted(content.keys() - set(known))
    if unknown:
        raise InputError(f"{path}: unknown name {unknown[0]!r}; expected one of {', '.join(known)}")
    default = SampleParameters()
    try:
        numbers = {name: as_number(name, content[name]) for name in NUMERIC if name in content}
        return SampleParameters(
            prompts=_checked_prompts(content.get("prompts", list(default.prompts))),
            num_samples=_checked_count(content.get("num_samples", default.num_samples)),
            sampling=replace(default.sampling, **numbers),
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _checked_prompts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(prompt, str) for prompt in value):
        raise ValueError(f"prompts must be a list of texts, found {value!r}")
    return tuple(value)


def _checked_count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_SAMPLES:
        raise ValueError(
            f"num_samples must be a whole number from 0 to {_MAX_SAMPLES}, found {value!r}"
        )
    return value


def as_markdown(sample: Sample) -> str:
    """A sample for TensorBoard, with long lines wrapped."""
    text = sample.parameters["prompt"] + sample.text
    broken = [
        part for line in text.splitlines() for part in textwrap.wrap(line, _COLUMNS_IN_TENSORBOARD) or [""]
    ]  # fmt: skip
    # Four spaces: Markdown shows it as it is.
    return "\n".join(f"    {line}" for line in broken)


def drop_lines_after(file: Path, step: int) -> None:
    """Remove lines of steps after `step` from generated.jsonl, and an incomplete last line.

    A training that resumes from `step` writes them again. Does nothing if the file is missing.
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
    """Evaluation mode inside the `with`; then each module has its former mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
