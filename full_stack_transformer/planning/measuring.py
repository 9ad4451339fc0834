"""Measures this machine: a short preparation, training and generation by the real code, in a temporary
folder.

    documents ──prepare_dataset──> dataset ──train──> model directory ──TextGenerator──> text

The commands' own functions run, so that what they do besides arithmetic (imports, validations, text samples,
checkpoints) is in it. A model that is too large to be tried is replaced by a smaller one, and the plan says
so. The heavy libraries are imported while it measures, since a command imports them too.
"""

import contextlib
import importlib
import itertools
import json
import logging
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from full_stack_transformer import machine
from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.arguments.planning import PlanArguments
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.arguments.typed import CommandLine, running
from full_stack_transformer.errors import MachineError
from full_stack_transformer.planning.shapes import Shape, shape_of_size
from full_stack_transformer.planning.spent import Spent, now

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_END_OF_DOCUMENT = "[END_OF_DOCUMENT]"
# Of the documents that are measured with. A tokenizer is trained on it and a validation part of it set aside.
_SAMPLE_CHARACTERS = 2_500_000
_VALIDATION_FRACTION = 0.03
_NUM_VALIDATION_BATCHES = 6
# The preparation is repeated on this many copies if one took less than so long: that tells its rate from its
# start.
_NUM_COPIES, _SHORT_SECONDS = 8, 2.0
# A step may take this part of the measuring time; a larger model is replaced by a smaller one.
_LONGEST_STEP = 0.15
# Of the peak of matrix products: what is expected before anything is measured.
_EXPECTED_UTILIZATION = 0.3
# Libraries, and the batch.
_OTHER_BYTES = 1.5e9
_BYTES_PER_TRAINED_PARAMETER = 16
_MEASURED_GENERATED_TOKENS = 128
_VOCABULARY_WITHOUT_MERGES = 260


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was found."""

    shape: Shape
    """Of the model that was tried."""
    is_same_shape: bool
    """Whether it is the planned one."""
    device: str
    bfloat16: bool
    sample_bytes: int
    """Of the text that was measured with."""
    bytes_per_token: float
    tokens_per_sample: float
    prepare_start: Spent
    prepare_byte: Spent
    """For each byte of text."""
    counting: Spent
    """To count the words of the sample for a new tokenizer."""
    merging: Spent
    """To merge them into tokens."""
    train_start: Spent
    """From the command to its first step."""
    train_token: Spent
    """For each input token, uncompiled."""
    num_steps: int
    """That were measured."""
    tokens_per_step: float
    validation_token: Spent
    validation: Spent
    """Each, without its forward passes: text samples and files."""
    checkpoint: Spent
    """Each."""
    checkpoint_bytes: int
    train_end: Spent
    generate_start: Spent
    generate_token: Spent
    peak_bytes: int
    """Memory of the process, with all libraries."""
    load: float
    """Processes that wanted a core in the last minute, our own included."""
    seconds: float
    """That the measurement took."""


def measure(arguments: PlanArguments, shape: Shape, max_length: int) -> Measurement:
    """Try the plan for some seconds.

    Args:
        arguments: the plan.
        shape: the planned model.
        max_length: tokens per sample.

    Raises:
        DocumentsError: the documents cannot be read.
        MachineError: memory is short for any training.
    """
    started = now()
    python = Spent(time.process_time(), time.process_time())  # until here: the command line
    with (
        tempfile.TemporaryDirectory(prefix="fst-plan-") as name,
        _quiet(),
        running(CommandLine()),
    ):
        measuring = _Measuring(arguments, shape, max_length, Path(name), python)
        measuring.prepare()
        measuring.train()
        measuring.generate()
        found = measuring.found()
    return replace(found, seconds=(now() - started).seconds)


class _Measuring:
    """The steps, and what they found so far."""

    def __init__(
        self,
        arguments: PlanArguments,
        shape: Shape,
        max_length: int,
        root: Path,
        python: Spent,
    ) -> None:
        self._arguments = arguments
        self._planned = self._shape = shape
        self._max_length = max_length
        self._root = root
        self._python = python

    def prepare(self) -> None:
        """The dataset: of the sample, or the given one."""
        _say("preparing a sample of the documents")
        started = now()
        from full_stack_transformer.preparation.prepare import main as prepare_dataset
        from full_stack_transformer.tokenization.document_tokenizer import TrainedTokenizer

        self._import_prepare = now() - started
        file, self._sample_bytes = self._write_sample()
        options = PrepareDatasetArguments(
            documents_train_file=(file,),
            validation_fraction=_VALIDATION_FRACTION,
            dataset_name="sample",
            datasets_root=self._root / "datasets",
            vocab_size=self._shape.vocab_size,
            max_sample_length=self._max_length,
            strip_lines=True,
        )
        with_tokenizer, self._dataset = _timed(lambda: prepare_dataset(options))
        tokenizer = str(self._dataset / "tokenizer")
        again = replace(options, dataset_name="again", tokenizer_path=tokenizer)
        short, _ = _timed(lambda: prepare_dataset(again))
        self._tokenizer = with_tokenizer - short
        texts = file.read_text(encoding="utf-8").split(f"{_END_OF_DOCUMENT}\n")
        self._counting, _ = _timed(
            lambda: TrainedTokenizer.train(texts, vocab_size=_VOCABULARY_WITHOUT_MERGES)
        )
        self._prepare_byte, self._prepare_start = short / self._sample_bytes, Spent()
        if short.seconds < _SHORT_SECONDS:
            with file.open("rb") as source, (self._root / "long.txt").open("wb") as target:
                for _ in range(_NUM_COPIES):
                    source.seek(0)
                    shutil.copyfileobj(source, target)
            more = replace(
                again, dataset_name="long", documents_train_file=(self._root / "long.txt",)
            )
            long, _ = _timed(lambda: prepare_dataset(more))
            self._prepare_byte = (long - short) / ((_NUM_COPIES - 1) * self._sample_bytes)
            self._prepare_start = short - self._prepare_byte * self._sample_bytes
        from full_stack_transformer.datasets.corpus import open_dataset

        description = open_dataset(self._dataset).description
        tokens = description["number_of_train_tokens"] + description["number_of_valid_tokens"]
        self._bytes_per_token = self._sample_bytes / tokens
        if self._arguments.dataset_dir is not None:
            self._dataset = self._arguments.dataset_dir
            description = open_dataset(self._dataset).description
        self._tokens_per_sample = description["number_of_train_tokens"] / max(
            1, description["number_of_train_samples"]
        )

    def _write_sample(self) -> tuple[Path, int]:
        file = self._root / "documents.txt"
        size = 0
        with file.open("w", encoding="utf-8") as target:
            for text in _texts(self._arguments.documents_train_file):
                lines = [line for line in text.splitlines() if line.strip() != _END_OF_DOCUMENT]
                part = "\n".join(lines)[: _SAMPLE_CHARACTERS - size]
                size += len(part)
                target.write(f"{part}\n{_END_OF_DOCUMENT}\n")
                if size >= _SAMPLE_CHARACTERS:
                    break
        return file, file.stat().st_size

    def train(self) -> None:
        """The training: of the planned model, or of one that is small enough."""
        started = now()
        # What generation imports, then the rest of training.
        importlib.import_module("full_stack_transformer.generation.text_generator")

        self._import_generate = now() - started
        from full_stack_transformer.training.callbacks.stopwatch import MINUTES, Stopwatch
        from full_stack_transformer.training.run import train_setup
        from full_stack_transformer.training.setup import open_setup

        self._import_train = now() - started
        arguments = self._arguments
        self._batch_size = arguments.batch_size or 16
        self._device = _device()
        self._shape = self._affordable()
        size = f"{self._shape.num_parameters:,} parameters"
        _say(f"training a model of {size} for {arguments.seconds:g} seconds")
        options = TrainArguments(
            dataset_dir=self._dataset,
            experiments_root=self._root / "experiments",
            experiment_name="sample",
            model_config=self._model_config(),
            batch_size=self._batch_size,
            optimizer=arguments.optimizer,
            activation_checkpointing=arguments.activation_checkpointing,
            max_epochs=-1,
            max_minutes=MINUTES,
            num_warmup_steps=2,
            limit_val_batches=_NUM_VALIDATION_BATCHES,
            compile="never",
            enable_progress_bar=False,
        )
        with running(CommandLine(given={"max_epochs", "batch_size", "learning_rate"})):
            self._watch = Stopwatch(arguments.seconds)
            directory = train_setup(open_setup(options), callbacks=[self._watch])
        if not isinstance(directory, Path):
            raise KeyboardInterrupt
        self._experiment = directory
        self._train_end = now() - self._watch.ended
        self._peak_bytes = machine.peak_resident_bytes()

    def _affordable(self) -> Shape:
        """The planned model, or halves of it until a step and the memory allow it.

        Raises:
            MachineError: nothing fits.
        """
        import torch

        dtype = torch.bfloat16 if machine.multiplies_bfloat16(self._device) else torch.float32
        peak = machine.measure_matmul_peak(self._device, dtype)
        free = machine.free_memory_bytes(self._device)
        num_tokens = self._batch_size * self._max_length
        shape = self._planned
        while True:
            flops = num_tokens * shape.flops_per_token(self._max_length)
            seconds = flops / (peak * _EXPECTED_UTILIZATION)
            needed = _BYTES_PER_TRAINED_PARAMETER * shape.num_parameters + _OTHER_BYTES
            has_room = free is None or needed < free
            is_quick = seconds < _LONGEST_STEP * self._arguments.seconds
            if has_room and (is_quick or shape.num_layers == 1):
                return shape
            if shape.num_parameters < 1e5:
                raise MachineError(
                    f"memory is short for measuring: {needed / 1e9:.1f} GB are needed, "
                    f"{(free or 0) / 1e9:.1f} GB are free; free some"
                )
            weights = shape.num_parameters - shape.vocab_size * shape.hidden_size
            if shape.num_layers > 1 and shape.hidden_size <= 256:
                shape = replace(shape, num_layers=shape.num_layers // 2, option="")
            else:
                width = max(64, shape.hidden_size // 2 // 64 * 64)
                size = shape.vocab_size * width + max(weights // 4, 1)
                shape = shape_of_size(size, shape.vocab_size, takes_preset=False)

    def _model_config(self) -> str:
        """What --model_config takes for the shape that is tried."""
        if self._shape.option:
            return self._shape.option
        path = self._root / "model.json"
        path.write_text(json.dumps(self._shape.config()), encoding="utf-8")
        return str(path)

    def generate(self) -> None:
        """A text from the model that was trained."""
        from full_stack_transformer.generation.text_generator import TextGenerator

        _say("generating a text")
        self._open, generator = _timed(lambda: TextGenerator.open(self._experiment))
        num_tokens = min(
            self._arguments.num_generated_tokens, _MEASURED_GENERATED_TOKENS, self._max_length - 2
        )
        given = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "seed": 1}
        first, _ = _timed(lambda: generator.generate("", **given))  # type: ignore[arg-type]
        second, _ = _timed(lambda: generator.generate("", **given))  # type: ignore[arg-type]
        self._generate_token = second / num_tokens
        self._open += first - second

    def found(self) -> Measurement:
        """All of it."""
        watch = self._watch
        spent, tokens, steps = watch.steps, watch.step_tokens, watch.num_steps - 1
        if not tokens:  # the time was enough for one step
            spent, tokens, steps = watch.first_step, watch.first_step_tokens, 1
        last = watch.validations[-1]
        checkpoints = self._experiment / "checkpoints"
        return Measurement(
            shape=self._shape,
            is_same_shape=self._shape == self._planned,
            device=str(self._device),
            bfloat16=machine.multiplies_bfloat16(self._device),
            sample_bytes=self._sample_bytes,
            bytes_per_token=self._bytes_per_token,
            tokens_per_sample=self._tokens_per_sample,
            prepare_start=self._python + self._import_prepare + self._prepare_start,
            prepare_byte=self._prepare_byte,
            counting=self._counting,
            merging=self._tokenizer - self._counting,
            train_start=self._python + self._import_train + watch.to_first_step,
            train_token=spent / tokens,
            num_steps=steps,
            tokens_per_step=tokens / steps,
            validation_token=last.forward / last.num_tokens,
            validation=last.after,
            checkpoint=last.before,
            checkpoint_bytes=(checkpoints / "last.ckpt").stat().st_size,
            train_end=self._train_end,
            generate_start=self._python + self._import_generate + self._open,
            generate_token=self._generate_token,
            peak_bytes=self._peak_bytes,
            load=os.getloadavg()[0],
            seconds=0.0,
        )


def _device() -> "torch.device":
    """Where training runs by default."""
    import torch

    from full_stack_transformer.modelling.model_directory import resolve_device

    return torch.device(resolve_device("auto").type)


def _texts(paths: tuple[Path, ...]) -> Iterable[str]:
    """The given documents, or the source files of Python's library."""
    if paths:
        return _given_texts(paths)
    library = Path(sysconfig.get_paths()["stdlib"])
    files = itertools.chain(sorted(library.glob("*.py")), sorted(library.glob("*/*.py")))
    return (file.read_text(encoding="utf-8", errors="replace") for file in files)


def _given_texts(paths: tuple[Path, ...]) -> Iterator[str]:
    from full_stack_transformer.documents.blocks import ReadingOptions
    from full_stack_transformer.documents.formats import (
        StreamCopies,
        find_document_files,
        format_of,
    )

    reading = ReadingOptions(end_of_document=_END_OF_DOCUMENT)
    with StreamCopies() as copies:
        for path in find_document_files(paths, "--documents_train_file", copies):
            document_format = format_of(path, reading)
            blocks = document_format.blocks(path, start=0, continues=False)
            with contextlib.closing(blocks):
                for block in blocks:
                    yield from document_format.documents(block).texts


def _timed(work: Callable[[], _Result]) -> tuple[Spent, _Result]:
    started = now()
    result = work()
    return now() - started, result


def _say(what: str) -> None:
    logger.warning("measuring: %s", what)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of others, and our own lines."""
    package = logging.getLogger("full_stack_transformer")
    before, own = package.level, logger.level
    package.setLevel(logging.ERROR)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(before)
        logger.setLevel(own)
