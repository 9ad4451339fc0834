"""Parquet: each row is a document, the text of one of its columns.

A null, empty or blank text is an empty document, which is counted; a file without the column, or with another
type there, is an error. JSON Lines has the same rules. The column may hold strings, or bytes of UTF-8, in any
of Arrow's forms: plain, large, view or dictionary.
"""

import contextlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from full_stack_transformer.documents.blocks import (
    BLOCK_BYTES,
    Block,
    DocumentCounts,
    Documents,
    ReadingOptions,
    decoded,
)
from full_stack_transformer.errors import (
    DocumentsError,
    InputError,
    MissingExtraError,
    install_command,
)

_MAX_ROWS_AT_ONCE = 256
# Of the column, decoded; rows of long documents are read one by one.
_BYTES_AT_ONCE = 1 << 24
_TEXT_TYPES = (
    *("string", "large_string", "string_view"),
    *("binary", "large_binary", "binary_view", "null"),
)


class Parquet:
    """Parquet; see the module."""

    def __init__(self, options: ReadingOptions) -> None:
        self._options = options

    def blocks(
        self, path: Path, *, start: int, continues: bool, stop: int | None = None
    ) -> Generator[Block, None, None]:
        """Blocks of rows; positions count rows."""
        texts: list[str | bytes | None] = []
        num_characters, row = 0, start
        with contextlib.closing(self._texts(path, start, stop)) as rows:
            for text in rows:
                row += 1
                texts.append(text)
                num_characters += len(text or "")
                if num_characters >= BLOCK_BYTES:
                    yield Block(path, row - len(texts), row, texts)
                    texts, num_characters = [], 0
        if texts or stop is None:
            yield Block(path, row - len(texts), row, texts, is_last=stop is None)

    def cuts(self, path: Path, num_bytes: int) -> list[int]:
        """Where groups of rows begin, which are decoded apart."""
        with opened_parquet(path, DocumentsError) as file:
            metadata = file.metadata
            groups = list(map(metadata.row_group, range(metadata.num_row_groups)))
            sizes = [_num_bytes_of(group, self._options.text_field) for group in groups]
        found: list[int] = []
        row = num_waiting = 0
        for group, size in zip(groups, sizes, strict=True):
            if num_waiting and num_waiting + size > num_bytes:
                found.append(row)
                num_waiting = 0
            row += group.num_rows
            num_waiting += size
        return found

    def border(self, path: Path, position: int, limit: int | None) -> int | None:
        """The position itself: each row is a document."""
        return position

    def documents(self, block: Block) -> Documents:
        """The texts of the block's rows."""
        counts = DocumentCounts()
        found = Documents([], counts)
        for row, value in enumerate(block.content, block.start):
            text = value
            if isinstance(value, bytes):
                place = f"{block.path}, row {row:,}"
                text = decoded(value, place, 0, self._options.encoding_errors, counts)
            if isinstance(text, str) and text and not text.isspace():
                counts.num_documents += 1
                counts.num_bytes += len(text) if text.isascii() else len(text.encode())
                found.texts.append(text)
            else:
                counts.num_empty_documents += 1
        return found

    def column_names(self, path: Path) -> list[str]:
        """The columns of a file."""
        with opened_parquet(path, DocumentsError) as file:
            return list(file.schema_arrow.names)

    def _texts(
        self, path: Path, start: int, stop: int | None
    ) -> Generator[str | bytes | None, None, None]:
        """The texts of the rows from `start` to `stop`; other groups of rows are not read."""
        field = self._options.text_field
        with opened_parquet(path, DocumentsError) as file:
            self._check_column(path, file.schema_arrow)
            num_rows = _rows_at_once(file.metadata, field)
            groups, row = _groups_of(file.metadata, start, stop)
            if not groups:
                return
            for batch in file.iter_batches(num_rows, row_groups=groups, columns=[field]):
                for text in _values(batch.column(0)):
                    if row >= start and (stop is None or row < stop):
                        yield text
                    row += 1

    def _check_column(self, path: Path, schema: Any) -> None:
        field = self._options.text_field
        if field not in schema.names:
            raise DocumentsError(
                f"{path} should have a column {field!r} (--text_field), found {', '.join(schema.names)}"
            )
        column_type = schema.field(field).type
        # A dictionary column (of pandas' categories) counts as its values.
        is_dictionary = hasattr(column_type, "index_type")
        if str(column_type.value_type if is_dictionary else column_type) not in _TEXT_TYPES:
            raise DocumentsError(
                f"{path}: the column {field!r} should hold strings, found {column_type}"
            )


@contextmanager
def opened_parquet(path: Path, error_class: type[InputError]) -> Iterator[Any]:
    """The pyarrow ParquetFile at a path.

    Raises:
        MissingExtraError: pyarrow is not installed.
        InputError: of that class: the file, or what is read from it inside, is no Parquet.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{path} needs the package pyarrow, which is not installed; "
            f"install it with: {install_command('data')}"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, ArrowException) as error:
        raise error_class(
            f"{path} should be a Parquet file, but cannot be read: {error}"
        ) from error


def _groups_of(metadata: Any, start: int, stop: int | None) -> tuple[list[int], int]:
    """The groups of rows that hold rows from `start` to `stop`, and the first row of the first of them."""
    found: list[int] = []
    row = first = 0
    for number in range(metadata.num_row_groups):
        end = row + metadata.row_group(number).num_rows
        if end > start and (stop is None or row < stop):
            first = first if found else row
            found.append(number)
        row = end
    return found, first


def _num_bytes_of(group: Any, field: str) -> int:
    """Bytes of a column in a group of rows, decompressed."""
    return sum(
        column.total_uncompressed_size
        for column in map(group.column, range(group.num_columns))
        if column.path_in_schema.split(".")[0] == field
    )


def _rows_at_once(metadata: Any, field: str) -> int:
    """Rows of a batch, so that long documents do not fill the memory."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    num_bytes = sum(_num_bytes_of(group, field) for group in groups)
    bytes_per_row = max(1, num_bytes // max(1, int(metadata.num_rows)))
    return max(1, min(_MAX_ROWS_AT_ONCE, _BYTES_AT_ONCE // bytes_per_row))


def _values(column: Any) -> list[str | bytes | None]:
    """The values of a batch; strings that are not UTF-8, which Arrow does not check, as bytes."""
    try:
        values: list[str | bytes | None] = column.to_pylist()
    except UnicodeDecodeError:
        scalars = [getattr(scalar, "value", scalar) for scalar in column]
        values = [
            scalar.as_buffer().to_pybytes() if scalar.is_valid else None for scalar in scalars
        ]
    return values
