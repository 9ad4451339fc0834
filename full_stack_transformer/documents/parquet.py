"""Parquet: each row is a document, the text of one of its columns."""

from collections.abc import Generator, Iterator
from pathlib import Path

from full_stack_transformer.documents.blocks import (
    BLOCK_BYTES,
    Block,
    DocumentCounts,
    Documents,
    ReadingOptions,
)
from full_stack_transformer.errors import DocumentsError, MissingExtraError, install_command

_ROWS_AT_ONCE = 256


class Parquet:
    """Parquet; see the module."""

    def __init__(self, options: ReadingOptions) -> None:
        self._options = options

    def blocks(self, path: Path, *, start: int, continues: bool) -> Generator[Block, None, None]:
        """Blocks of rows; positions count rows."""
        texts: list[str] = []
        num_characters, row = 0, 0
        for column in self._columns(path):
            for text in column:
                row += 1
                if row <= start:
                    continue
                texts.append(text or "")
                num_characters += len(texts[-1])
                if num_characters >= BLOCK_BYTES:
                    yield Block(path, row - len(texts), row, texts)
                    texts, num_characters = [], 0
        yield Block(path, row - len(texts), row, texts, is_last=True)

    def documents(self, block: Block) -> Documents:
        """The texts of the block's rows; null rows are empty documents."""
        texts = [str(text) for text in block.content if text and not str(text).isspace()]
        counts = DocumentCounts(
            num_documents=len(texts),
            num_empty_documents=len(block.content) - len(texts),
            num_bytes=sum(len(text.encode()) for text in texts),
        )
        return Documents(texts, counts)

    def _columns(self, path: Path) -> Iterator[list[str | None]]:
        try:
            from pyarrow import ArrowException, parquet
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{path} needs the package pyarrow, which is not installed; "
                f"install it with: {install_command('data')}"
            ) from error
        field = self._options.text_field
        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if field not in names:
                    raise DocumentsError(
                        f"{path} should have a column {field!r} (--text_field), found {', '.join(names)}"
                    )
                column_type = str(file.schema_arrow.field(field).type)
                if column_type not in ("string", "large_string"):
                    raise DocumentsError(
                        f"{path}: the column {field!r} should hold strings, found {column_type}"
                    )
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[field]):
                    yield batch.column(0).to_pylist()
        except (OSError, ArrowException) as error:
            raise DocumentsError(
                f"{path} should be a Parquet file, but cannot be read: {error}"
            ) from error
