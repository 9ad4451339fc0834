"""Files of conversations or preferences: JSON Lines, JSON and Parquet, each plain, .gz or .zst.

Rows are read one by one; a .json file, and a Telegram export, as a whole. Each row has its place: the line
where it begins, or the number of a row of Parquet. Knows no fields; `layouts` does.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from full_stack_transformer.conversations.layouts import conversation_of, preference_of
from full_stack_transformer.conversations.messages import Conversation, Preference
from full_stack_transformer.conversations.telegram_export import conversations_of, is_export
from full_stack_transformer.documents.blocks import (
    MAX_WHOLE_BYTES,
    ending,
    open_decompressed,
    read_lines,
    too_large,
)
from full_stack_transformer.documents.parquet import opened_parquet
from full_stack_transformer.errors import DocumentsError, RowError

logger = logging.getLogger(__name__)

Read = TypeVar("Read")

_JSON_LINES = (".jsonl", ".ndjson")
ENDINGS = (*_JSON_LINES, ".json", ".parquet")
_BLANK = re.compile(r"[\s,]*")
_MAX_SHOWN = 3


@dataclass
class RefusedRows:
    """Rows that cannot be used: the first stops the command, or all are counted."""

    on_bad_row: Literal["stop", "skip"] = "stop"
    num: int = 0

    def add(self, error: RowError) -> None:
        """Count a row.

        Raises:
            RowError: the given one, if bad rows are not skipped.
        """
        if self.on_bad_row == "stop":
            raise RowError(
                f"{error}; correct it, or pass --on_bad_row skip to leave out such rows"
            ) from error
        self.num += 1
        if self.num <= _MAX_SHOWN:
            logger.warning("left out: %s", error)


def find_files(paths: Sequence[Path], flag: str) -> list[Path]:
    """The files themselves, and those of directories in the order of their names.

    Raises:
        DocumentsError: a path does not exist, or a directory holds no such files.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if ending(file) in ENDINGS
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not inside:
                raise DocumentsError(
                    f"{flag} {path} holds no file ending in {', '.join(ENDINGS)} (.gz and .zst of them too)"
                )
            found += inside
        elif not path.is_file():
            raise DocumentsError(f"{flag} {path} does not exist; expected a file or a directory")
        elif ending(path) not in ENDINGS:
            raise DocumentsError(
                f"{flag} {path} should end in {', '.join(ENDINGS)} (or .gz or .zst of them)"
            )
        else:
            found.append(path)
    return found


def read_conversations(
    path: Path, refused: RefusedRows, *, answers_of: str | None = None
) -> Iterator[Conversation]:
    """The conversations of a file, in their order.

    Raises:
        RowError: a row has no conversation, unless such rows are skipped.
        DocumentsError: the file cannot be read.
    """
    if ending(path) == ".json" and is_export(content := _whole_json(path)):
        yield from conversations_of(content, str(path), answers_of)
        return
    yield from _converted(path, refused, conversation_of)


def read_preferences(path: Path, refused: RefusedRows) -> Iterator[Preference]:
    """The preferences of a file, in their order.

    Raises:
        RowError: a row has no preference, unless such rows are skipped.
        DocumentsError: the file cannot be read.
    """
    yield from _converted(path, refused, preference_of)


def _converted(
    path: Path, refused: RefusedRows, convert: Callable[[Mapping[str, Any], str], Read]
) -> Iterator[Read]:
    for row, place in _rows(path, refused):
        try:
            if not isinstance(row, Mapping):
                raise RowError(f"{place} should be an object, found {type(row).__name__}")
            converted = convert(row, place)
        except RowError as error:
            refused.add(error)
            continue
        yield converted


def _rows(path: Path, refused: RefusedRows) -> Iterator[tuple[Any, str]]:
    if ending(path) == ".parquet":
        number = 0
        with opened_parquet(path, DocumentsError) as file:
            for batch in file.iter_batches(256):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}, row {number:,}"
    elif ending(path) == ".json":
        yield from _rows_of_json(path)
    else:
        for number, line in read_lines(path):
            if not line.strip():
                continue
            place = f"{path}, line {number:,}"
            try:
                yield json.loads(_decoded(line, place).removeprefix("\ufeff")), place
            except (ValueError, RecursionError) as error:
                refused.add(RowError(f"{place} should be a JSON object, but is no JSON: {error}"))
            except RowError as error:
                refused.add(error)


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"{place} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); convert it, for "
            "instance with iconv"
        ) from error


def _text_of(path: Path) -> str:
    with open_decompressed(path, 0) as file:
        content = file.read(MAX_WHOLE_BYTES + 1)
    if len(content) > MAX_WHOLE_BYTES:
        raise too_large(
            f"{path}: a .json file (one row a line, as .jsonl, has no limit)", MAX_WHOLE_BYTES
        )
    try:
        return _decoded(content, str(path)).removeprefix("\ufeff")
    except RowError as error:
        raise DocumentsError(str(error)) from error


def _whole_json(path: Path) -> Any:
    try:
        return json.loads(_text_of(path))
    except (ValueError, RecursionError) as error:
        raise _no_json(path, error) from error


def _rows_of_json(path: Path) -> Iterator[tuple[Any, str]]:
    """The objects of a list, each with the line where it begins; or those under `data`, or one object."""
    text = _text_of(path)
    if not text.lstrip().startswith("["):
        content = _whole_json(path)
        rows = content.get("data", content.get("rows")) if isinstance(content, Mapping) else None
        if isinstance(rows, list):
            for number, row in enumerate(rows, 1):
                yield row, f"{path}, row {number:,}"
            return
        yield content, f"{path}"
        return
    decoder = json.JSONDecoder()
    place, line, counted = text.index("[") + 1, 1, 0
    while True:
        found = _BLANK.match(text, place)
        assert found is not None
        place = found.end()
        if text[place : place + 1] in ("]", ""):
            return
        line, counted = line + text.count("\n", counted, place), place
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _no_json(path, error) from error
        yield row, f"{path}, line {line:,}"


def _no_json(path: Path, error: Exception) -> DocumentsError:
    return DocumentsError(
        f"{path} should be JSON, but is not: {error}; a file with a row a line should end in .jsonl"
    )
