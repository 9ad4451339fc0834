"""Labelled rows from files: each row is a dict with its place in the file.

    .jsonl .ndjson   a JSON object per line                .json      a list of objects, or SQuAD's form
    .csv .tsv        a header, then a row per line         .parquet   columns
    .conll .bio      a word and its label per line, a blank line after each sentence
    a folder         a folder of .txt files for each label, like IMDB

All of them plain, .gz or .zst. Knows file formats; fields.py knows the names of fields.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from full_stack_transformer.documents.blocks import ending, open_decompressed
from full_stack_transformer.errors import (
    DocumentsError,
    MissingExtraError,
    RowError,
    install_command,
)

Row = Mapping[str, Any]

# Key of a row's place in its file, for errors; never written.
PLACE = "_place"
_JSON_LINES = (".jsonl", ".ndjson")
_LABELLED_WORDS = (".conll", ".bio", ".iob2")
ROW_ENDINGS = (*_JSON_LINES, ".json", ".csv", ".tsv", ".parquet", *_LABELLED_WORDS)
# IMDB's texts without a label.
_UNLABELLED_FOLDERS = ("unsup",)
# A cell of a CSV file may hold a long document; Python's own limit is 131,072 characters.
_MAX_CELL_CHARACTERS = 1 << 27
_DOCUMENT_START = "-DOCSTART-"
# Published tab-separated files without a header, recognised by their first line.
_WITHOUT_HEADER = (
    (re.compile(r"\d+\t[^\t]+\t[^\t]+\t[01]"), ("id", "sentence1", "sentence2", "label")),  # ATEC
    (re.compile(r"\w+\t[01]\t\*?\t[^\t]+"), ("source", "label", "mark", "sentence")),  # CoLA
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file or folder, in their order.

    Raises:
        RowError: the file does not exist, has an unknown ending, or cannot be read.
    """
    if path.is_dir():
        yield from _labelled_folders(path)
        return
    if not path.is_file():
        raise RowError(f"{path} does not exist; expected a file or folder of labelled rows")
    kind = ending(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path)
            return
        with open_decompressed(path, 0) as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            if kind in _JSON_LINES:
                yield from _json_lines(path, text)
            elif kind == ".json":
                yield from _json(path, text)
            elif kind in (".csv", ".tsv"):
                yield from _table(path, text, delimiter="," if kind == ".csv" else "\t")
            elif kind in _LABELLED_WORDS:
                yield from _labelled_words(path, text)
            else:
                raise RowError(
                    f"{path} should end in one of {', '.join(ROW_ENDINGS)}, or be a folder of folders"
                )
    except UnicodeDecodeError as error:
        raise RowError(f"{path} should be UTF-8, but is not: {error}") from error
    except DocumentsError as error:
        raise RowError(str(error)) from error


def _json_lines(path: Path, lines: io.TextIOWrapper) -> Iterator[Row]:
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {line_number}"
        try:
            row = _loaded(line)
        except (ValueError, RecursionError) as error:
            raise RowError(
                f"{place} should be a JSON object, but is not valid JSON: {error}"
            ) from error
        yield _placed(row, place)


def _json(path: Path, text: io.TextIOWrapper) -> Iterator[Row]:
    try:
        content = _loaded(text.read())
    except (ValueError, RecursionError) as error:
        raise RowError(f"{path} should be JSON: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
        if content and isinstance(content[0], dict) and "paragraphs" in content[0]:
            yield from _nested_spans(path, content)
            return
    if not isinstance(content, list):
        raise RowError(
            f"{path} should be a list of objects, or SQuAD's object with `data`; found "
            f"{type(content).__name__}; a file with a row per line should end in .jsonl"
        )
    for index, row in enumerate(content):
        yield _placed(row, f"{path}, row {index}")


def _loaded(text: str) -> Any:
    content = json.loads(text)
    if _SURROGATE.search(text):
        # JSON can contain lone surrogates, which are not valid text.
        whole = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
        content = json.loads(whole)
    return content


def _nested_spans(path: Path, articles: list[Any]) -> Iterator[Row]:
    """SQuAD's articles > paragraphs > questions, versions 1.1 and 2.0."""
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {
                        "id": question["id"],
                        "question": question["question"],
                        "context": paragraph["context"],
                        "answers": question.get("answers", []),
                        PLACE: f"{path}, question {question['id']}",
                    }
    except (KeyError, TypeError) as error:
        raise RowError(
            f"{path} should be in SQuAD's form, data > paragraphs > qas: {error!r} is missing"
        ) from error


def _table(path: Path, lines: io.TextIOWrapper, *, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    first = lines.readline()
    known = [names for pattern, names in _WITHOUT_HEADER if pattern.fullmatch(first.rstrip("\r\n"))]
    delimiter = "\t" if known else delimiter
    all_lines = chain([first], lines) if first else lines
    # GLUE's .tsv files have quotation marks that are never closed.
    if delimiter == ",":
        reader = csv.reader(all_lines, strict=True)
    else:
        reader = csv.reader(all_lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    try:
        header = list(known[0]) if known else next(reader, None)
        if header is None:
            raise RowError(f"{path} should start with a line of column names; it is empty")
        repeated = [name for name in header if header.count(name) > 1]
        if repeated:
            raise RowError(f"{path}, line 1: two columns have the name {repeated[0]!r}; rename one")
        for cells in reader:
            if not cells:
                continue
            place = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise RowError(
                    f"{place} should have {len(header)} columns ({', '.join(header)}), found {len(cells)}"
                )
            yield {**dict(zip(header, cells, strict=True)), PLACE: place}
    except csv.Error as error:
        raise RowError(f"{path}, line {reader.line_num}: {error}") from error


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{path} needs the package pyarrow, which is not installed; "
            f"install it with: {install_command('data')}"
        ) from error
    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield {**row, PLACE: f"{path}, row {index}"}
                    index += 1
    except (OSError, ArrowException) as error:
        raise RowError(f"{path} should be a Parquet file, but cannot be read: {error}") from error


def _labelled_words(path: Path, lines: io.TextIOWrapper) -> Iterator[Row]:
    """The first column is the word, the last its label; in tab-separated files words may contain spaces."""
    words: list[str] = []
    labels: list[str] = []
    start = 1
    for line_number, line in enumerate([*lines, ""], start=1):
        cells = line.strip("\r\n").split("\t") if "\t" in line.strip() else line.split()
        if cells and not cells[0].startswith(_DOCUMENT_START):
            if len(cells) < 2:
                raise RowError(
                    f"{path}, line {line_number} should be a word and its label, or blank; found {line!r}"
                )
            if not words:
                start = line_number
            words.append(cells[0])
            labels.append(cells[-1])
        elif words:
            yield {"words": words, "labels": labels, PLACE: f"{path}, line {start}"}
            words, labels = [], []


def _labelled_folders(path: Path) -> Iterator[Row]:
    folders = sorted(
        inner
        for inner in path.iterdir()
        if inner.is_dir() and inner.name not in _UNLABELLED_FOLDERS
    )
    if not folders:
        raise RowError(
            f"{path} should have a folder of .txt files for each label; it has no folders"
        )
    num_rows = 0
    for folder in folders:
        for file in sorted(folder.glob("*.txt")):
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise RowError(f"{file} should be a text in UTF-8: {error}") from error
            num_rows += 1
            yield {"text": text, "label": folder.name, PLACE: str(file)}
    if not num_rows:
        raise RowError(
            f"{path}: its folders {', '.join(f.name for f in folders)} have no .txt files"
        )


def _placed(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise RowError(f"{place} should be a JSON object, found {type(row).__name__}")
    return {**row, PLACE: place}
