"""`fst whiten`: fit BERT-whitening on texts and write a model directory that embeds with it.

    model directory ─┐
    texts ───────────┴─> embeddings ──> whitening ──> a copy of the model directory, with modules.json

The copy holds the model's own files unchanged; a Dense layer after the pooling does the whitening.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError

from full_stack_transformer.arguments.models import WhitenArguments
from full_stack_transformer.documents.blocks import ending, open_decompressed
from full_stack_transformer.documents.formats import JSON_LINES_ENDINGS, find_document_files
from full_stack_transformer.errors import DocumentsError, MachineError, UsageError
from full_stack_transformer.modelling.embedding.encoder import (
    SentenceEncoder,
    open_sentence_encoder,
)
from full_stack_transformer.modelling.embedding.head import Head, whitening_dense, write_head
from full_stack_transformer.modelling.embedding.whitening import CovarianceSum, Whitening
from full_stack_transformer.modelling.model_directory import find_model_directory
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    make_directories,
    read_json,
    replace_directory,
    write_json,
)

logger = logging.getLogger(__name__)

# Texts that are sorted by length together before they are embedded.
_TEXTS_AT_ONCE = 4096


def whiten(arguments: WhitenArguments) -> Path:
    """Write the whitened model and return its directory.

    Raises:
        UsageError: there is something at --output_dir, or the texts all have one embedding.
        DocumentsError: a file holds no texts.
        ModelError: the model cannot be opened.
        MachineError: the disk is full or cannot be written.
    """
    started = time.perf_counter()
    if arguments.output_dir.exists():
        raise UsageError(
            f"--output_dir {arguments.output_dir} exists; name a directory that does not"
        )
    encoder = open_sentence_encoder(arguments.model, device=arguments.device)
    # Whitening follows on the pooling: what followed on it before is not kept.
    encoder.head = Head(arguments.pooling or encoder.head.pooling)
    encoder.max_length = min(encoder.max_length, arguments.max_length or encoder.max_length)
    files = find_document_files(arguments.texts, "TEXTS")
    whitening = _fit(encoder, read_texts(files, arguments.text_field), arguments)
    head = Head(encoder.head.pooling, (whitening_dense(whitening),), arguments.normalize)
    _write(arguments, encoder, head, whitening)
    logger.info(
        "fitted the whitening on %s texts in %.1f s: %s dimensions become %s",
        f"{whitening.num_texts:,}",
        time.perf_counter() - started,
        *whitening.kernel.shape,
    )
    return arguments.output_dir


def read_texts(paths: Sequence[Path], fields: Sequence[str]) -> Iterator[str]:
    """Each line of a text file; of JSON Lines each of the named fields that a row has.

    Raises:
        DocumentsError: a file cannot be read, is no JSON Lines, or holds none of the fields.
    """
    for path in paths:
        is_json = ending(path) in JSON_LINES_ENDINGS
        num_texts = 0
        with open_decompressed(path, 0) as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8", "replace").strip()
                found = _texts_of_row(line, path, number, fields) if is_json else [line]
                for text in found:
                    num_texts += bool(text)
                    if text:
                        yield text
        if not num_texts:
            wanted = f"texts under {', '.join(fields)}" if is_json else "lines of text"
            raise DocumentsError(f"{path} should hold {wanted}; found none (--text_field)")


def _texts_of_row(line: str, path: Path, number: int, fields: Sequence[str]) -> list[str]:
    if not line:
        return []
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DocumentsError(f"{path}, line {number}: should be a JSON object: {error}") from error
    values = [row.get(field) for field in fields] if isinstance(row, dict) else []
    return [value.strip() for value in values if isinstance(value, str)]


def _fit(encoder: SentenceEncoder, texts: Iterator[str], arguments: WhitenArguments) -> Whitening:
    covariance = CovarianceSum()
    # The same text twice would count twice: pairs repeat their texts.
    different = iter(dict.fromkeys(texts))
    while group := list(islice(different, _TEXTS_AT_ONCE)):
        covariance.add(encoder.encode(group, batch_size=arguments.batch_size))
    try:
        return covariance.whitening(
            num_dimensions=arguments.num_dimensions, epsilon=arguments.epsilon
        )
    except ValueError as error:
        raise UsageError(f"{error}; found {covariance.num_texts} texts") from error


def _write(
    arguments: WhitenArguments, encoder: SentenceEncoder, head: Head, whitening: Whitening
) -> None:
    """A copy of the model directory with the head, complete or absent."""
    target = arguments.output_dir
    source = find_model_directory(arguments.model)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        make_directories(target.absolute().parent)
        # Folders belong to modules of an older head.
        folders = [path.name for path in source.iterdir() if path.is_dir()]
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*folders))
        config = encoder.backbone.config
        write_head(
            partial,
            head,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            max_length=encoder.max_length,
        )
        description_file = partial / DESCRIPTION_FILE_NAME
        description = read_json(description_file) if description_file.is_file() else {}
        description["task"] = "sentence_embedding"
        description["whitening"] = {
            "num_texts": whitening.num_texts,
            "num_dimensions": whitening.kernel.shape[1],
            "pooling": head.pooling,
            "epsilon": arguments.epsilon,
        }
        write_json(description_file, description)
        replace_directory(partial, target)
    except (OSError, SafetensorError, MachineError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise MachineError(f"writing the model directory {target} failed: {error}") from error
