"""`fst quantize`: round the weights of a model once, so that it starts from a small file.

model directory ─┐
text ────────────┴─> samples to calibrate on, and others to measure ──> codes ──> quantized_int4.safetensors
"""

import hashlib
import logging
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.models import QuantizeArguments
from full_stack_transformer.datasets.corpus import open_dataset
from full_stack_transformer.errors import (
    DatasetError,
    InputError,
    MachineError,
    ModelError,
    UsageError,
)
from full_stack_transformer.evaluation.log_likelihoods import perplexity
from full_stack_transformer.generation.runners.native.decoder import why_not_native
from full_stack_transformer.modelling.backbones import context_length
from full_stack_transformer.modelling.model_directory import OpenedModel, open_model
from full_stack_transformer.modelling.model_files import find_model_directory, weight_files
from full_stack_transformer.modelling.other_files import (
    CODES_FILE_NAMES,
    MODEL_DIRECTORY_NAME,
)
from full_stack_transformer.own_classes import trust_options
from full_stack_transformer.quantization.codes import GROUP_SIZE
from full_stack_transformer.quantization.files import (
    is_current,
    read_description,
    source_facts,
    write_codes,
)
from full_stack_transformer.quantization.gptq import calibrate, round_nearest
from full_stack_transformer.storage import (
    make_directories,
    read_json,
    replace_directory,
)
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer

logger = logging.getLogger(__name__)

_SAMPLE_TOKENS = 512
_SAMPLES_AT_ONCE = 4
_LEAST_TOKENS = 2048
_MAX_MEASURED_TOKENS = 8192
# Of a text: enough for any calibration, and encoded in seconds.
_MAX_TEXT_BYTES = 8_000_000
# Of a text that has no validation part of its own.
_MEASURED_PART = 0.1


@dataclass(frozen=True)
class _Texts:
    """Token ids to calibrate on, and others to measure."""

    name: str
    sha256: str
    calibration: NDArray[np.int64]
    measured: NDArray[np.int64]


def main(arguments: QuantizeArguments) -> Path:
    """Write the rounded weights, log what they cost, and return their file or the new directory.

    Raises:
        UsageError: options contradict each other, or the output exists.
        ModelError: the model cannot be opened, or the decoder cannot run it.
        InputError: there is no text, or it is too short.
        MachineError: the disk is full or cannot be written.
    """
    trust_options(arguments)
    started = time.perf_counter()
    directory = find_model_directory(arguments.model)
    _check_target(arguments, directory)
    num_threads = torch.get_num_threads()
    model = open_model(arguments.model, device="cpu")
    problem = why_not_native(model.backbone)
    if problem is not None:
        raise ModelError(
            f"{directory}: {arguments.dtype} weights are for the C++ decoder, which cannot run this model "
            f"here: {problem}"
        )
    texts = _texts(arguments, directory, model)
    description = _rounded(arguments, model, texts, num_threads)
    description["source"] = source_facts(directory)
    description["seconds"] = round(time.perf_counter() - started, 1)
    target = _written(arguments, directory, model.backbone, description)
    path = target if target.is_file() else target / CODES_FILE_NAMES[arguments.dtype]
    full = sum(one.stat().st_size for one in weight_files(directory))
    logger.info(
        "wrote %s: %.0f MB in place of %.0f MB, in %.0f s; serve it: fst serve %s --weights_dtype %s",
        *(path, path.stat().st_size / 1e6, full / 1e6, time.perf_counter() - started),
        *(arguments.output or arguments.model, arguments.dtype),
    )
    return target


def _check_target(arguments: QuantizeArguments, directory: Path) -> None:
    if arguments.output is not None:
        if arguments.output.exists():
            raise UsageError(f"--output {arguments.output} exists; name a directory that does not")
        return
    path = directory / CODES_FILE_NAMES[arguments.dtype]
    if path.is_file() and is_current(directory, read_description(path)):
        raise UsageError(f"{path} exists already; remove it to make it again, or pass --output")


# ---------------------------------------------------------------------- texts


def _texts(arguments: QuantizeArguments, directory: Path, model: OpenedModel) -> _Texts | None:
    """What to calibrate on and to measure.

    Raises:
        UsageError: there is none, and the method needs one.
        InputError: it cannot be read, or is too short.
    """
    path = arguments.calibration or _dataset_of(directory)
    needs_text = arguments.dtype == "int4" and arguments.method == "gptq"
    if path is None:
        if needs_text:
            raise UsageError(
                f"{directory} does not say what it was trained on, or that is gone; pass --calibration with "
                "a text file or a dataset directory, or --method nearest"
            )
        return None
    texts = _of_dataset(path, model) if path.is_dir() else _of_file(path, model)
    if needs_text and len(texts.calibration) < _LEAST_TOKENS:
        raise InputError(
            f"{path} has {len(texts.calibration):,} tokens to calibrate on; at least {_LEAST_TOKENS:,} are "
            "needed, pass a longer text"
        )
    return texts


def _dataset_of(directory: Path) -> Path | None:
    """The dataset directory that the model of an experiment was trained on, if it is still there."""
    options = directory.parent / "arguments.json"
    if directory.name != MODEL_DIRECTORY_NAME or not options.is_file():
        return None
    named = read_json(options).get("dataset_dir")
    return Path(named) if isinstance(named, str) and Path(named).is_dir() else None


def _of_dataset(path: Path, model: OpenedModel) -> _Texts:
    dataset = open_dataset(path)
    theirs = open_saved_tokenizer(dataset.tokenizer_directory)
    if theirs.backend.get_vocab() != model.tokenizer.backend.get_vocab():
        raise DatasetError(
            f"{dataset.directory} was prepared with another tokenizer than that of the model; pass a "
            "text file"
        )
    train, valid = (
        np.asarray(corpus.tokens[:_MAX_TEXT_BYTES], np.int64)
        for corpus in (dataset.train, dataset.valid)
    )
    digest = hashlib.sha256(train.tobytes()).hexdigest()
    return _Texts(dataset.directory.name, digest, train, valid)


def _of_file(path: Path, model: OpenedModel) -> _Texts:
    with path.open("rb") as file:
        content = file.read(_MAX_TEXT_BYTES)
    try:
        text = content.decode("utf-8", "strict" if len(content) < _MAX_TEXT_BYTES else "ignore")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start:,}); pass a text file or a dataset directory"
        ) from error
    ids = np.array(model.tokenizer.encode_text(text), np.int64)
    border = int(len(ids) * (1 - _MEASURED_PART))
    return _Texts(path.name, hashlib.sha256(content).hexdigest(), ids[:border], ids[border:])


def _samples(ids: NDArray[np.int64], length: int, most: int) -> list[list[int]]:
    """Samples of one length, evenly from all parts of a text; `most` tokens together."""
    length = min(length, len(ids))
    num = max(1, min(len(ids), most) // max(1, length))
    starts = np.linspace(0, len(ids) - length, num).astype(int).tolist()
    return [ids[start : start + length].tolist() for start in starts]


# ---------------------------------------------------------------------- rounding


def _rounded(
    arguments: QuantizeArguments, model: OpenedModel, texts: _Texts | None, num_threads: int
) -> dict[str, Any]:
    """Give the backbone its codes; returns what is said of them."""
    backbone, dtype = model.backbone, arguments.dtype
    method = arguments.method if dtype == "int4" else "nearest"
    description: dict[str, Any] = {
        "method": method,
        "group_size": GROUP_SIZE if dtype == "int4" else None,
        "versions": {
            name: version(name) for name in ("torch", "transformers", "full_stack_transformer")
        },
    }
    length = min(_SAMPLE_TOKENS, context_length(backbone.config))
    measured: list[list[int]] = []
    if texts is not None and len(texts.measured) > 1:
        measured = _samples(texts.measured, length, _MAX_MEASURED_TOKENS)
        description["perplexity_before"] = perplexity(backbone, measured, "float32")
    torch.set_num_threads(num_threads)  # the decoder wants PyTorch to have one
    if method == "gptq":
        assert texts is not None
        samples = _samples(texts.calibration, length, arguments.num_calibration_tokens)
        batches = [
            torch.tensor(samples[start : start + _SAMPLES_AT_ONCE])
            for start in range(0, len(samples), _SAMPLES_AT_ONCE)
        ]
        batches = [one for one in batches if one.shape == batches[0].shape]
        num_tokens = sum(one.numel() for one in batches)
        logger.info("calibrating on %s tokens of %s", f"{num_tokens:,}", texts.name)
        description["calibration"] = {
            "name": texts.name,
            "sha256": texts.sha256,
            "num_tokens": num_tokens,
        }
        calibrate(backbone, batches, _Progress())
    else:
        round_nearest(backbone, dtype)
    if measured:
        description["perplexity_after"] = perplexity(backbone, measured, dtype)
        _log_perplexity(description, sum(map(len, measured)), dtype)
    return description


def _log_perplexity(description: dict[str, Any], num_tokens: int, dtype: str) -> None:
    before, after = description["perplexity_before"], description["perplexity_after"]
    logger.info(
        "perplexity of %s other tokens: %.3f in float32, %.3f in %s (%+.2f %%)",
        *(f"{num_tokens:,}", before, after, dtype, 100 * (after / before - 1)),
    )


class _Progress:
    """Logs each layer."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self, number: int, num_layers: int, changed: float) -> None:
        seconds = time.perf_counter() - self._started
        logger.info(
            "layer %d of %d: outputs changed by %.2f %%; %.0f s left",
            *(number, num_layers, 100 * changed**0.5, seconds / number * (num_layers - number)),
        )


# ---------------------------------------------------------------------- writing


def _written(
    arguments: QuantizeArguments, directory: Path, backbone: Backbone, description: dict[str, Any]
) -> Path:
    """The file beside the full weights, or a new model directory without them."""
    if arguments.output is None:
        return write_codes(directory, backbone, arguments.dtype, description)
    target = arguments.output
    full = {path.name for path in weight_files(directory)}
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        make_directories(partial)
        for file in directory.iterdir():
            is_weights = file.name in full or file.name.endswith(".safetensors")
            if file.is_file() and not is_weights and not file.name.startswith("."):
                shutil.copyfile(file, partial / file.name)
        write_codes(partial, backbone, arguments.dtype, description)
        replace_directory(partial, target)
    except (OSError, MachineError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise MachineError(f"writing the model directory {target} failed: {error}") from error
    return target
