"""Labelled rows from files: each row is a dict with its place in the file.

    .jsonl .ndjson   a JSON object per line                .json      a list of objects, or SQuAD's form
    .csv .tsv .txt   a row per line: tables.py             .parquet   columns
    .conll .conllu   a word and its label per line, a blank line after each sentence: labelled_words.py
    a folder         a folder of .txt files for each label, like IMDB

All of them plain, .gz or .zst. Knows file formats; fields.py knows the names of fields.
"""

import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from full_stack_transformer.arguments.data import RowFileOptions
from full_stack_transformer.documents.blocks import ending, open_decompressed
from full_stack_transformer.documents.parquet import opened_parquet
from full_stack_transformer.errors import (
    DocumentsError,
    RowError,
    UsageError,
)
from full_stack_transformer.rows.fields import PLACE, BadRows, Columns, Row, columns_to_read
from full_stack_transformer.rows.labelled_words import WORD_ENDINGS, read_labelled_words
from full_stack_transformer.rows.tables import TABLE_ENDINGS, read_table

logger = logging.getLogger(__name__)

_JSON_LINES = (".jsonl", ".ndjson")
_TEXT = ".txt"
_PARQUET = ".parquet"
_WITH_NAMES = (*_JSON_LINES, ".json", _PARQUET)
ROW_ENDINGS = (*_WITH_NAMES, *TABLE_ENDINGS, *WORD_ENDINGS, _TEXT)
# IMDB's texts without a label, and what macOS's archives and Python leave behind.
_NO_LABELS = ("unsup", "__MACOSX", "__pycache__")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_rows(
    path: Path,
    options: RowFileOptions | None = None,
    columns: Columns | None = None,
    *,
    has_words: bool = False,
) -> Iterator[Row]:
    """The rows of a file or folder, in their order.

    Args:
        path: where they are.
        options: what is known of the file.
        columns: the names that the task reads.
        has_words: whether the task reads words with labels: .tsv and .txt are then no tables.

    Raises:
        RowError: the file does not exist, has an unknown ending, or cannot be read.
        UsageError: an option is not for a file of its kind.
    """
    options, columns = options or RowFileOptions(), columns or Columns()
    bad = BadRows(str(path), options.on_bad_row)
    kind = "" if path.is_dir() else ending(path).lower()
    if not (path.is_dir() or path.is_file()):
        raise RowError(f"{path} does not exist; expected a file or folder of labelled rows")
    if path.is_dir() or kind in _WITH_NAMES:
        _refuse_options_of_tables(path, options)
        rows = _labelled_folders(path) if path.is_dir() else _with_names(path, kind, bad)
        yield from chosen_columns(rows, options, columns, bad)
    else:
        yield from _lines(path, kind, options, columns, bad, has_words=has_words)
    bad.log()


def _refuse_options_of_tables(path: Path, options: RowFileOptions) -> None:
    if options.delimiter is not None or options.header is not None:
        name = "delimiter" if options.delimiter is not None else "header"
        raise UsageError(
            f"--{name} is for tables and files of labelled words, which {path} is not; omit it"
        )


def _lines(
    path: Path,
    kind: str,
    options: RowFileOptions,
    columns: Columns,
    bad: BadRows,
    *,
    has_words: bool,
) -> Iterator[Row]:
    """A file of labelled words, or a table."""
    is_table = kind in (*TABLE_ENDINGS, _TEXT) or options.delimiter is not None
    are_words = kind in WORD_ENDINGS or (
        has_words and (kind != ".csv" or options.delimiter is not None)
    )
    if not (is_table or are_words):
        raise RowError(
            f"{path} should end in one of {', '.join(ROW_ENDINGS)}, or be a folder of folders; if it is a "
            "table, pass --delimiter"
        )
    yield from _decoded(
        path,
        lambda text: (
            read_labelled_words(path, text.read(), options, bad)
            if are_words
            else read_table(path, text.read(), options, columns, bad)
        ),
    )


def _decoded(
    path: Path, read: Callable[[io.TextIOWrapper], Iterator[dict[str, Any]] | Iterator[Row]]
) -> Iterator[Row]:
    """What `read` makes of the text of a file."""
    try:
        with open_decompressed(path, 0) as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            yield from read(text)
    except UnicodeDecodeError as error:
        raise RowError(
            f"{path} should be UTF-8, but is not: {error}; convert it, for instance with iconv"
        ) from error
    except DocumentsError as error:
        raise RowError(str(error)) from error


def _with_names(path: Path, kind: str, bad: BadRows) -> Iterator[Row]:
    """A file whose rows name their fields."""
    if kind == _PARQUET:
        yield from _parquet(path)
    elif kind == ".json":
        yield from _decoded(path, lambda text: _json(path, text, bad))
    else:
        yield from _decoded(path, lambda text: _json_lines(path, text, bad))


def chosen_columns(
    rows: Iterable[Row], options: RowFileOptions, columns: Columns, bad: BadRows
) -> Iterator[Row]:
    """The rows with the columns that the options name under the names that the task reads."""
    known: dict[tuple[str, ...], list[str | None]] = {}
    for row in rows:
        names = tuple(name for name in row if name != PLACE)
        if names not in known:
            try:
                known[names] = columns_to_read(names, options, columns, row.get(PLACE, "a row"))
            except RowError as error:
                bad.add(error)
                continue
        found = {new: row[name] for name, new in zip(names, known[names], strict=True) if new}
        yield {**found, PLACE: row[PLACE]} if PLACE in row else found


def _json_lines(path: Path, lines: io.TextIOWrapper, bad: BadRows) -> Iterator[Row]:
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {line_number}"
        try:
            row = _loaded(line)
        except (ValueError, RecursionError) as error:
            bad.add(RowError(f"{place} should be a JSON object, but is not valid JSON: {error}"))
            continue
        yield from _placed(row, place, bad)


def _json(path: Path, text: io.TextIOWrapper, bad: BadRows) -> Iterator[Row]:
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
        yield from _placed(row, f"{path}, row {index}", bad)


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


def _parquet(path: Path) -> Iterator[Row]:
    index = 0
    with opened_parquet(path, RowError) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                found = {name: _as_text(value) for name, value in row.items()}
                yield {**found, PLACE: f"{path}, row {index}"}
                index += 1


def _as_text(value: Any) -> Any:
    """A text that was stored as bytes; other bytes, such as a picture, stay."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value


def class_folders(path: Path) -> list[Path]:
    """The folders whose names are labels; hidden ones and those of other programs are none."""
    return sorted(
        inner
        for inner in path.iterdir()
        if inner.is_dir() and not _is_hidden(inner) and inner.name not in _NO_LABELS
    )


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _labelled_folders(path: Path) -> Iterator[Row]:
    folders = class_folders(path)
    if not folders:
        raise RowError(
            f"{path} should have a folder of {_TEXT} files for each label; it has no folders"
        )
    num_rows = 0
    passed_over: list[Path] = []
    for folder in folders:
        inside = sorted(inner for inner in folder.iterdir() if not _is_hidden(inner))
        files = [file for file in inside if file.is_file() and ending(file).lower() == _TEXT]
        passed_over += [
            *(one for one in inside if one not in {*files}),
            *([] if files else [folder]),
        ]
        for file in files:
            num_rows += 1
            [text] = _decoded(file, lambda text: iter([{"text": _with_line_feeds(text.read())}]))
            yield {**text, "label": folder.name, PLACE: str(file)}
    if not num_rows:
        raise RowError(
            f"{path}: its folders {', '.join(f.name for f in folders)} have no {_TEXT} files"
        )
    if passed_over:
        logger.warning(
            "%s: passed over %s files and folders that are no texts ending in %s, such as %s",
            path,
            f"{len(passed_over):,}",
            _TEXT,
            passed_over[0],
        )


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _placed(row: Any, place: str, bad: BadRows) -> Iterator[Row]:
    if isinstance(row, dict):
        yield {**row, PLACE: place}
    else:
        bad.add(RowError(f"{place} should be a JSON object, found {type(row).__name__}"))
