"""Which files hold documents, and in which format each of them is."""

from collections.abc import Sequence
from pathlib import Path

from full_stack_transformer.documents.blocks import DocumentFormat, ReadingOptions, ending
from full_stack_transformer.documents.delimited import DelimitedText
from full_stack_transformer.documents.json_lines import JsonLines
from full_stack_transformer.documents.parquet import Parquet
from full_stack_transformer.errors import DocumentsError

JSON_LINES_ENDINGS = (".jsonl", ".ndjson")
_PARQUET_ENDING = ".parquet"
# Taken from directories; a file that is named itself may have any ending.
_ENDINGS_IN_DIRECTORIES = (".txt", *JSON_LINES_ENDINGS, _PARQUET_ENDING)


def find_document_files(paths: Sequence[Path], flag: str) -> list[Path]:
    """The files themselves, and the files of directories in the order of their names.

    Raises:
        DocumentsError: a path does not exist, or a directory holds no documents.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            inside = sorted(
                file for file in path.rglob("*") if file.is_file() and _is_readable(file)
            )
            if not inside:
                raise DocumentsError(
                    f"{flag} {path} holds no file ending in {', '.join(_ENDINGS_IN_DIRECTORIES)} "
                    "(.gz and .zst of them too)"
                )
            found += inside
        else:
            raise DocumentsError(f"{flag} {path} does not exist; expected a file of documents")
    return found


def format_of(path: Path, options: ReadingOptions) -> DocumentFormat:
    """The format of a file by its name: .jsonl and .parquet; everything else is delimited text."""
    if ending(path) in JSON_LINES_ENDINGS:
        return JsonLines(options)
    if ending(path) == _PARQUET_ENDING:
        return Parquet(options)
    return DelimitedText(options)


def _is_readable(path: Path) -> bool:
    return ending(path) in _ENDINGS_IN_DIRECTORIES and not path.name.startswith(".")
