"""Which format a file has."""

from pathlib import Path

from full_stack_transformer.documents.blocks import DocumentFormat, ReadingOptions
from full_stack_transformer.documents.delimited import DelimitedText
from full_stack_transformer.documents.files import JSON_LINES_ENDINGS, PARQUET_ENDING, ending
from full_stack_transformer.documents.json_lines import JsonLines
from full_stack_transformer.documents.parquet import Parquet


def format_of(path: Path, options: ReadingOptions) -> DocumentFormat:
    """The format that the file's name says: .jsonl and .parquet, everything else is delimited text."""
    if ending(path) in JSON_LINES_ENDINGS:
        return JsonLines(options)
    if ending(path) == PARQUET_ENDING:
        return Parquet(options)
    return DelimitedText(options)
