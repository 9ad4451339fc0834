"""`fst export`: a model directory, experiment or adapter -> the format of another engine.

    MODEL --opened, adapter added--> Source --written--> partial output --checked by the engine--> OUTPUT

A reader of OUTPUT never sees a part of it, nor one that the check refused.
"""

import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from full_stack_transformer.arguments.exporting import ExportArguments
from full_stack_transformer.errors import MachineError, MissingExtraError, install_command
from full_stack_transformer.exporting.checking import check_gguf
from full_stack_transformer.exporting.gguf_file import write_gguf
from full_stack_transformer.exporting.huggingface import write_huggingface
from full_stack_transformer.exporting.ollama import modelfile
from full_stack_transformer.exporting.onnx_file import check_onnx, write_onnx
from full_stack_transformer.exporting.source import Source, open_source
from full_stack_transformer.modelling.backbones import context_length
from full_stack_transformer.modelling.other_files import CONFIG_FILE_NAME
from full_stack_transformer.modelling.writing import written_whole
from full_stack_transformer.storage import (
    make_directories,
    share,
    sync_directory,
    why_not_written,
)
from full_stack_transformer.tokenization.document_tokenizer import copy_tokenizer_files

logger = logging.getLogger(__name__)

GGUF_FILE_NAME, MODELFILE_NAME = "model.gguf", "Modelfile"
# Ollama takes the memory of keys and values for all of it at once.
_MAX_OLLAMA_CONTEXT = 8192


def main(arguments: ExportArguments) -> Path:
    """Write the export, and return its path.

    Raises:
        ModelError: the model cannot be opened, its architecture is not written in this format, or the engine
            computes something else.
        TokenizerError: the engine cannot encode texts as the tokenizer does.
        MachineError: the disk is full or cannot be written.
        MissingExtraError: a package is missing.
    """
    _WRITERS[arguments.format](arguments)
    return arguments.output


def _need(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise MissingExtraError(
            f"this format needs the package {package}; install it with: {install_command(extra)}"
        )


def _gguf(arguments: ExportArguments) -> None:
    _need("gguf", "gguf")
    source = open_source(arguments)
    with _written_file(arguments.output) as partial:
        _write_checked_gguf(source, partial, arguments)
    logger.info("run it: llama-cli -m %s", arguments.output)


def _write_checked_gguf(source: Source, file: Path, arguments: ExportArguments) -> None:
    dtype = source.dtype if arguments.dtype == "auto" else arguments.dtype
    vocabulary = write_gguf(source, file, dtype=dtype)
    if source.tokenizer.text_before:
        logger.warning(
            "%s begins every text with %r; llama.cpp does not: put it before your prompts",
            type(source.tokenizer).__name__,
            source.tokenizer.text_before,
        )
    if arguments.check:
        check_gguf(source, file, vocabulary, dtype=dtype, arguments=arguments)


def _ollama(arguments: ExportArguments) -> None:
    _need("gguf", "gguf")
    source = open_source(arguments)
    num_ctx = context_length(source.backbone.config)
    with written_whole(arguments.output, "the export") as partial:
        text = modelfile(source, GGUF_FILE_NAME, num_ctx=min(num_ctx, _MAX_OLLAMA_CONTEXT))
        (partial / MODELFILE_NAME).write_text(text, encoding="utf-8")
        _write_checked_gguf(source, partial / GGUF_FILE_NAME, arguments)
    where = shlex.quote(str(arguments.output / MODELFILE_NAME))
    logger.info("run it: ollama create NAME -f %s, then: ollama run NAME", where)


def _onnx(arguments: ExportArguments) -> None:
    for package in ("onnx", "onnxscript"):
        _need(package, "onnx")
    source = open_source(arguments)
    can_check = find_spec("onnxruntime") is not None
    with written_whole(arguments.output, "the export") as partial:
        write_onnx(source, partial)
        copy_tokenizer_files(source.place.tokenizer, partial)
        shutil.copyfile(source.place.directory / CONFIG_FILE_NAME, partial / CONFIG_FILE_NAME)
        if arguments.check and can_check:
            check_onnx(source, partial, arguments)
    if arguments.check and not can_check:
        logger.warning("%s is NOT checked: onnxruntime is not installed", arguments.output)


_WRITERS: dict[str, Callable[[ExportArguments], None]] = {
    "huggingface": write_huggingface,
    "gguf": _gguf,
    "ollama": _ollama,
    "onnx": _onnx,
}


@contextmanager
def _written_file(target: Path) -> Iterator[Path]:
    """A new file beside `target`, which gets its name at the end; after an error it is gone."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        make_directories(target.parent.absolute())
        yield partial
        share([partial])
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
        sync_directory(target.parent)
    except OSError as error:
        raise MachineError(f"writing {target} failed: {why_not_written(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
