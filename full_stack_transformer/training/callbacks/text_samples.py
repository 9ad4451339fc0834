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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from full_stack_transformer.errors import FullStackTransformerError
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.modelling.model_directory import OpenedModel
from full_stack_transformer.storage import write_text
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks.sample_parameters import (
    PARAMETERS_FILE_NAME,
    SampleParameters,
    read_parameters,
    write_parameters,
)
from full_stack_transformer.training.tasks import CausalLanguageModelling

logger = logging.getLogger(__name__)

GENERATED_FILE_NAME = "generated.jsonl"
_MAX_LOGGED_CHARACTERS = 200
_COLUMNS_IN_TENSORBOARD = 100
_MAX_SLOTS = 8
# Each process holds a part of each weight, so that one alone would wait for the others for ever.
_SHARDED_STRATEGIES = (FSDPStrategy, ModelParallelStrategy)


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
        assert isinstance(pl_module, CausalLanguageModelling)
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

    def _generate(self, task: CausalLanguageModelling) -> list[Sample]:
        parameters = self._parameters
        if parameters.num_samples == 0:
            return []
        model = OpenedModel("training", task.backbone, self._tokenizer, {})
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
