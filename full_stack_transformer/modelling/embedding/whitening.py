"""BERT-whitening: an affine map after which embeddings have no mean and no preferred direction; `fst whiten`.

Su, Cao, Liu and Ou 2021 (arXiv 2103.15316), section 3. With the mean m and the covariance C = U L U^T of
the embeddings of some texts

    x  ->  (x - m) W        W = the first k columns of U L^(-1/2), largest eigenvalues first

so that the cosine of two embeddings, which assumes orthonormal axes, means something; fewer columns cost
little and often help. The paper's C divides by the number of texts, as here. Two differences: k is at
most the rank of C, since with fewer texts than dimensions some directions have no variance, and W would
blow up their rounding errors; and a small epsilon is added to the eigenvalues.

    model directory ─┐
    texts ───────────┴─> embeddings ──> whitening ──> a copy of the model directory, with modules.json

The copy holds the model's own files unchanged; a Dense layer after the pooling does the whitening.
Shapes: n texts, d dimensions before, k after.
"""

import csv
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError

from full_stack_transformer.arguments.models import WhitenArguments
from full_stack_transformer.documents.blocks import (
    MAX_LINE_BYTES,
    ReadingOptions,
    ending,
    read_lines,
)
from full_stack_transformer.documents.formats import (
    JSON_LINES_ENDINGS,
    PARQUET_ENDING,
    StreamCopies,
    find_document_files,
)
from full_stack_transformer.documents.parquet import Parquet
from full_stack_transformer.errors import DocumentsError, MachineError, UsageError
from full_stack_transformer.modelling.embedding.encoder import (
    SentenceEncoder,
    open_sentence_encoder,
)
from full_stack_transformer.modelling.embedding.head import Dense, Head, write_head
from full_stack_transformer.modelling.model_files import find_model_directory
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    make_directories,
    read_json,
    replace_directory,
    write_json,
)
from full_stack_transformer.tasks.catalogue import EMBEDDING_TASK

logger = logging.getLogger(__name__)

# Variances below this part of the largest one are rounding errors of fp32 embeddings.
_LEAST_VARIANCE = 1e-10
EPSILON = 1e-12
# Texts that are sorted by length together before they are embedded.
_TEXTS_AT_ONCE = 4096


class _Tabs(csv.excel_tab):
    quoting = csv.QUOTE_NONE


_DIALECTS = {".csv": csv.excel, ".tsv": _Tabs}
# Formats whose lines are no texts.
_NO_TEXTS = (".json", ".html", ".htm", ".xml", ".md", ".pdf", ".xls", ".xlsx", ".conll", ".npy")


@dataclass(frozen=True)
class Whitening:
    """The map: x -> (x - mean) @ kernel."""

    mean: NDArray[np.float64]
    """(d,)"""
    kernel: NDArray[np.float64]
    """(d, k) W."""
    num_texts: int
    """Number of texts that it was fitted on."""

    def transform(self, embeddings: ArrayLike) -> NDArray[np.float64]:
        """(n, d) -> (n, k)."""
        moved: NDArray[np.float64] = (np.asarray(embeddings, np.float64) - self.mean) @ self.kernel
        return moved


class CovarianceSum:
    """Mean and covariance of embeddings that come in batches, in the memory of one d x d matrix."""

    def __init__(self) -> None:
        self.num_texts = 0
        self._mean: NDArray[np.float64] | Any = 0.0
        self._scatter: NDArray[np.float64] | Any = 0.0

    def add(self, embeddings: ArrayLike) -> Self:
        """Add (n, d) embeddings."""
        batch = np.asarray(embeddings, np.float64)
        if not len(batch):
            return self
        mean = batch.mean(axis=0)
        centred, difference = batch - mean, mean - self._mean
        total = self.num_texts + len(batch)
        # Chan, Golub and LeVeque 1979: the sums of squares of two groups about their common mean.
        between = np.outer(difference, difference) * (self.num_texts * len(batch) / total)
        self._scatter = self._scatter + centred.T @ centred + between
        self._mean = self._mean + difference * (len(batch) / total)
        self.num_texts = total
        return self

    def whitening(
        self, *, num_dimensions: int | None = None, epsilon: float = EPSILON
    ) -> Whitening:
        """The map that whitens the added embeddings.

        Args:
            num_dimensions: the largest k; by default all dimensions. k is at most the rank.
            epsilon: fraction of the largest variance, added to each variance.

        Raises:
            ValueError: there are fewer than two different embeddings.
        """
        if self.num_texts < 2 or not np.any(self._scatter):
            raise ValueError("whitening needs at least two texts with different embeddings")
        variances, directions = np.linalg.eigh(self._scatter / self.num_texts)
        variances, directions = variances[::-1], directions[:, ::-1]  # largest first
        largest = variances[0]
        rank = min(self.num_texts - 1, int((variances > _LEAST_VARIANCE * largest).sum()))
        num_kept = rank if num_dimensions is None else min(rank, num_dimensions)
        kernel = directions[:, :num_kept] / np.sqrt(variances[:num_kept] + epsilon * largest)
        # An eigenvector's sign is arbitrary: the largest entry is made positive, on every machine.
        peaks = kernel[np.abs(kernel).argmax(axis=0), np.arange(num_kept)]
        return Whitening(self._mean, kernel * np.sign(peaks), self.num_texts)


def fit_whitening(
    embeddings: ArrayLike, *, num_dimensions: int | None = None, epsilon: float = EPSILON
) -> Whitening:
    """The map that whitens (n, d) embeddings; see `CovarianceSum.whitening`."""
    return CovarianceSum().add(embeddings).whitening(num_dimensions=num_dimensions, epsilon=epsilon)


def whitening_dense(whitening: Whitening) -> Dense:
    """(x - m) W as an affine map: the weight is W^T and the bias -m W, computed in fp64."""
    return Dense(
        weight=torch.from_numpy(whitening.kernel.T.astype(np.float32)).contiguous(),
        bias=torch.from_numpy((-whitening.mean @ whitening.kernel).astype(np.float32)),
    )


def main(arguments: WhitenArguments) -> Path:
    """Write the whitened model and return its directory.

    Raises:
        UsageError: --output_dir exists, or all texts have the same embedding.
        DocumentsError: a file contains no texts.
        ModelError: the model cannot be opened.
        MachineError: the disk is full or cannot be written.
    """
    started = time.perf_counter()
    if arguments.output_dir.exists():
        raise UsageError(
            f"--output_dir {arguments.output_dir} exists; name a directory that does not"
        )
    encoder = open_sentence_encoder(arguments.model, device=arguments.device)
    # Whitening follows the pooling and replaces later layers.
    encoder.head = Head(arguments.pooling or encoder.head.pooling)
    encoder.max_length = min(encoder.max_length, arguments.max_length or encoder.max_length)
    with StreamCopies() as copies:
        files = find_document_files(arguments.texts, "TEXTS", copies)
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
    """Each of the named fields of a row of JSON Lines, CSV, TSV or Parquet; of other files each line.

    Raises:
        DocumentsError: a file cannot be read, or has none of the fields.
    """
    for path in paths:
        num_texts = 0
        for text in map(str.strip, _texts_of(path, fields)):
            num_texts += bool(text)
            if text:
                yield text
        if not num_texts:
            is_table = _kind(path) is not _texts_of_lines
            wanted = f"texts under {', '.join(fields)}" if is_table else "lines of text"
            raise DocumentsError(f"{path} should hold {wanted}; found none (--text_field)")


def _texts_of(path: Path, fields: Sequence[str]) -> Iterator[str]:
    return _kind(path)(path, fields)


def _kind(path: Path) -> Callable[[Path, Sequence[str]], Iterator[str]]:
    kind = ending(path)
    if kind in _NO_TEXTS:
        raise DocumentsError(
            f"{path}: {kind} is not read; expected .jsonl, .csv, .tsv, .parquet, or a text per line"
        )
    if kind in JSON_LINES_ENDINGS:
        return _texts_of_json_lines
    return {PARQUET_ENDING: _texts_of_parquet, **dict.fromkeys(_DIALECTS, _texts_of_table)}.get(
        kind, _texts_of_lines
    )


def _texts_of_lines(path: Path, fields: Sequence[str]) -> Iterator[str]:
    for _, line in read_lines(path):
        yield line.decode("utf-8", "replace")


def _texts_of_json_lines(path: Path, fields: Sequence[str]) -> Iterator[str]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError) as error:
            raise DocumentsError(
                f"{path}, line {number}: should be a JSON object: {error}"
            ) from error
        values = [row.get(field) for field in fields] if isinstance(row, dict) else []
        yield from (value for value in values if isinstance(value, str))


def _texts_of_table(path: Path, fields: Sequence[str]) -> Iterator[str]:
    lines = (line.decode("utf-8-sig", "replace") for _, line in read_lines(path))
    csv.field_size_limit(MAX_LINE_BYTES)
    # Fields of .tsv files are not quoted, as in GLUE's.
    rows = csv.DictReader(lines, dialect=_DIALECTS[ending(path)])
    try:
        names = rows.fieldnames or ()
        if not {*names} & {*fields}:
            raise DocumentsError(
                f"{path}, line 1: expected column names, one of them {' or '.join(fields)}; found "
                f"{', '.join(map(repr, names)) or 'nothing'}; name the column with --text_field"
            )
        for row in rows:
            yield from (row[field] for field in fields if isinstance(row.get(field), str))
    except csv.Error as error:
        raise DocumentsError(f"{path}, line {rows.line_num}: {error}") from error


def _texts_of_parquet(path: Path, fields: Sequence[str]) -> Iterator[str]:
    for field in fields:
        options = ReadingOptions(end_of_document="", text_field=field, encoding_errors="replace")
        parquet = Parquet(options)
        if field in parquet.column_names(path):
            for block in parquet.blocks(path, start=0, continues=False):
                yield from parquet.documents(block).texts


def _fit(encoder: SentenceEncoder, texts: Iterator[str], arguments: WhitenArguments) -> Whitening:
    covariance = CovarianceSum()
    # Each text counts once: pairs repeat their texts.
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
        description["task"] = EMBEDDING_TASK
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
