"""Parquet: each row is a document, the text of one of its columns.

A null, empty or blank text is an empty document, which is counted; a file without the column, or with another
type there, is an error. JSON Lines has the same rules. The column may hold strings, or bytes of UTF-8, in any
of Arrow's forms: plain, large, view or dictionary.
"""

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

    def blocks(self, path: Path, *, start: int, continues: bool) -> Generator[Block, None, None]:
        """Blocks of rows; positions count rows."""
        texts: list[str | bytes | None] = []
        num_characters, row = 0, 0
        for column in self._columns(path):
            for text in column:
                row += 1
                if row <= start:
                    continue
                texts.append(text)
                num_characters += len(text or "")
                if num_characters >= BLOCK_BYTES:
                    yield Block(path, row - len(texts), row, texts)
                    texts, num_characters = [], 0
        yield Block(path, row - len(texts), row, texts, is_last=True)

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

    def _columns(self, path: Path) -> Iterator[list[str | bytes | None]]:
        field = self._options.text_field
        with opened_parquet(path, DocumentsError) as file:
            self._check_column(path, file.schema_arrow)
            num_rows = _rows_at_once(file.metadata, field)
            for batch in file.iter_batches(num_rows, columns=[field]):
                yield _values(batch.column(0))

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


def _rows_at_once(metadata: Any, field: str) -> int:
    """Rows of a batch, so that long documents do not fill the memory."""
    num_bytes: int = sum(
        column.total_uncompressed_size
        for group in map(metadata.row_group, range(metadata.num_row_groups))
        for column in map(group.column, range(group.num_columns))
        if column.path_in_schema.split(".")[0] == field
    )
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
