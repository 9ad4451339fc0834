"""Tables of labelled rows: what parts the columns, whether the first line names them, and what they hold.

    --delimiter, --no_header, --text_column ...   decide where they are given
    a line with known names                       decides otherwise
    no such line                                  columns are taken by their content if only one reading is
                                                  possible; otherwise the error names the options

What was found in another way than by the file's ending and known names is logged.
"""

import csv
import io
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from full_stack_transformer.arguments.data import RowFileOptions
from full_stack_transformer.documents.blocks import ending
from full_stack_transformer.errors import RowError
from full_stack_transformer.rows.fields import (
    PLACE,
    BadRows,
    Columns,
    Row,
    as_number,
    columns_to_read,
    is_known_name,
)

logger = logging.getLogger(__name__)

# The delimiter that an ending stands for.
TABLE_ENDINGS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".psv": "|"}
_DELIMITERS = ("\t", ",", ";", "|")
_NAMES_OF_DELIMITERS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "pipe", " ": "space"}
# A cell of a CSV file may hold a long document; Python's own limit is 131,072 characters.
_MAX_CELL_CHARACTERS = 1 << 27
# Published tab-separated files without a header, recognised by their first line.
_KNOWN_FILES = (
    (re.compile(r"\d+\t[^\t]+\t[^\t]+\t[01]"), ("id", "sentence1", "sentence2", "label")),  # ATEC
    (re.compile(r"\w+\t[01]\t\*?\t[^\t]+"), ("source", "label", "mark", "sentence")),  # CoLA
)
# A line of fastText: its labels, then the text.
_FASTTEXT = "__label__"
_FASTTEXT_LINE = re.compile(rf"((?:{_FASTTEXT}\S+\s+)+)(.*)", re.DOTALL)
# Lines that are looked at to find out how a file is laid out.
_NUM_LINES_LOOKED_AT = 5000
# A delimiter that parts this share of the lines alike is the right one, if none parts all of them.
_MOST = 0.8
_MAX_LABEL_CHARACTERS = 50
_MAX_LABEL_WORDS = 3.0

_Record = tuple[int, list[str] | csv.Error]
"""The number of its first line, and its cells or why it has none."""


def read_table(
    path: Path, content: str, options: RowFileOptions, columns: Columns, bad: BadRows
) -> Iterator[Row]:
    """The rows of a table.

    Args:
        path: the file, whose ending tells the usual delimiter.
        content: its text.
        options: what is known of the file.
        columns: the names that the task reads.
        bad: takes rows with another number of cells than there are columns.

    Raises:
        RowError: the file is empty, or the columns cannot be told from each other.
    """
    lines = list(io.StringIO(content, newline=""))
    first = next((line.rstrip("\r\n") for line in lines if line.strip()), None)
    if first is None:
        raise RowError(f"{path} should start with a line of column names; it is empty")
    if first.startswith(_FASTTEXT) and options.delimiter is None:
        yield from _fasttext(path, lines, columns, bad)
        return
    known = next((names for pattern, names in _KNOWN_FILES if pattern.fullmatch(first)), None)
    delimiter = _delimiter(path, lines, options) if known is None else "\t"
    records = _best_records(path, lines, delimiter)
    cells = [record for _, record in records if isinstance(record, list)]
    header = list(known or ())
    if known is None and cells and _has_header(cells, options):
        header = _checked_header(path, cells[0])
        records = records[1:]
    width = len(header) or _usual_width(records)
    found = header or [f"column {number}" for number in range(1, width + 1)]
    if not header:
        rows = [row for row in cells if len(row) == width]
        header = _names_by_content(path, rows, found, options, columns)
    names = columns_to_read(header, options, columns, f"{path}, line 1", by_number=True)
    _say_what_was_read(path, delimiter, found, names)
    yield from _rows(path, records, header, names, bad)


def _fasttext(path: Path, lines: Sequence[str], columns: Columns, bad: BadRows) -> Iterator[Row]:
    """Labels and a text on each line; several labels where a line of the file has several."""
    found = [
        (number, _FASTTEXT_LINE.fullmatch(line.strip())) for number, line in enumerate(lines, 1)
    ]
    labels = {
        number: match[1].replace(_FASTTEXT, "").split()
        for number, match in found
        if match is not None
    }
    has_several = any(len(names) > 1 for names in labels.values())
    for number, match in found:
        place = f"{path}, line {number}"
        if match is not None:
            label = labels[number] if has_several else labels[number][0]
            yield {columns.texts[0]: match[2], columns.label: label, PLACE: place}
        elif lines[number - 1].strip():
            bad.add(RowError(f"{place} should be {_FASTTEXT}NAME and a text, as fastText has it"))


def _rows(
    path: Path,
    records: Sequence[_Record],
    header: Sequence[str],
    names: Sequence[str | None],
    bad: BadRows,
) -> Iterator[Row]:
    """The records that have a cell for each column."""
    for line_number, record in records:
        place = f"{path}, line {line_number}"
        if isinstance(record, csv.Error):
            bad.add(RowError(f"{place}: {record}"))
        elif len(record) != len(header):
            bad.add(
                RowError(
                    f"{place} should have {len(header)} columns ({', '.join(header)}), found {len(record)}"
                )
            )
        else:
            pairs = zip(names, record, strict=True)
            yield {**{name: cell for name, cell in pairs if name is not None}, PLACE: place}


def _records(
    lines: Sequence[str], delimiter: str, *, is_quoted: bool, width: int = 0
) -> Iterator[_Record]:
    """The records of lines; blank ones are left out.

    A quotation mark that is never closed swallows the lines after it: reading then goes on after the line
    with the mark.
    """
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    start = 0
    while start < len(lines):
        rest = (lines[number] for number in range(start, len(lines)))
        if is_quoted:
            reader = csv.reader(rest, delimiter=delimiter, strict=True)
        else:
            reader = csv.reader(rest, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        first, start = start, len(lines)
        number_read = 0
        try:
            for cells in reader:
                at, number_read = first + number_read, reader.line_num
                if number_read > at - first + 1 and len(cells) != (width or len(cells)):
                    start = at + 1
                    yield at + 1, csv.Error("a quotation mark is not closed")
                    break
                if any(cell.strip() for cell in cells):
                    yield at + 1, cells
        except csv.Error as error:
            start = first + number_read + 1
            is_open = "unexpected end" in str(error)
            yield start, csv.Error("a quotation mark is not closed") if is_open else error


def _best_records(path: Path, lines: Sequence[str], delimiter: str) -> list[_Record]:
    """The records with or without quotation marks around cells, whichever makes rows of one width.

    Tab-separated files usually have none: GLUE's hold marks that are never closed.
    """
    found = list(_records(lines, delimiter, is_quoted=delimiter != "\t"))
    if _are_whole(found):
        return found
    other = list(_records(lines, delimiter, is_quoted=delimiter == "\t"))
    # Marks that pair up are no part of a text, whatever one damaged row holds.
    if _are_whole(other) and (delimiter == "\t" or not _has_quoted_cells(other)):
        how = "removed" if delimiter == "\t" else "kept, as they do not pair up"
        logger.info("%s: quotation marks around cells are %s", path, how)
        return other
    width = _usual_width(found)
    return list(_records(lines, delimiter, is_quoted=delimiter != "\t", width=width))


def _are_whole(records: Sequence[_Record]) -> bool:
    width = _usual_width(records)
    return all(isinstance(record, list) and len(record) == width for _, record in records)


def _has_quoted_cells(records: Sequence[_Record]) -> bool:
    return any(
        len(cell) > 1 and cell[0] == cell[-1] == '"'
        for _, record in records
        if isinstance(record, list)
        for cell in record
    )


def _usual_width(records: Sequence[_Record]) -> int:
    widths = Counter(len(record) for _, record in records if isinstance(record, list))
    return widths.most_common(1)[0][0] if widths else 0


def _delimiter(path: Path, lines: Sequence[str], options: RowFileOptions) -> str:
    if options.delimiter_character is not None:
        return options.delimiter_character
    usual = TABLE_ENDINGS.get(ending(path).lower())
    candidates = [usual] if usual is not None else []
    candidates += [one for one in _DELIMITERS if one != usual]
    looked_at = lines[:_NUM_LINES_LOOKED_AT]
    widths: dict[str, list[int]] = {}
    for one in candidates:
        found = list(_records(looked_at, one, is_quoted=one != "\t"))
        cells = [record for _, record in found if isinstance(record, list)]
        if one == usual and cells and any(map(is_known_name, cells[0])):
            return one
        # A line that cannot be parted is as one with a single column.
        widths[one] = [len(record) if isinstance(record, list) else 0 for _, record in found]
    shares = {one: _share_of_usual_width(widths[one]) for one in candidates}
    whole = [one for one in candidates if shares[one] == 1.0]
    most = [one for one in candidates if shares[one] >= _MOST]
    for found_ones in (whole, most):
        if "\t" in found_ones:
            return "\t"
        named = [one for one in found_ones if _names_columns(looked_at, one)]
        if len(named) == 1 or len(found_ones) == 1:
            return (named or found_ones)[0]
        if found_ones:
            break
    if usual is not None and not found_ones:
        return usual
    if not found_ones and options.text_column:  # a text on each line
        return "\t"
    possible = " or ".join(_NAMES_OF_DELIMITERS[one] for one in found_ones or _DELIMITERS)
    raise RowError(
        f"{path}: cannot tell which character parts the columns of the table; pass --delimiter {possible}"
    )


def _share_of_usual_width(widths: Sequence[int]) -> float:
    """The share of the lines with the usual number of columns, 0 if that is one."""
    [(width, count)] = Counter(widths).most_common(1) or [(0, 0)]
    return count / len(widths) if width > 1 else 0.0


def _names_columns(lines: Sequence[str], delimiter: str) -> bool:
    _, first = next(_records(lines, delimiter, is_quoted=delimiter != "\t"), (0, []))
    return isinstance(first, list) and any(map(is_known_name, first))


def _has_header(cells: Sequence[Sequence[str]], options: RowFileOptions) -> bool:
    """Whether the first row names the columns: with a known name, or with words that no other row has."""
    if options.header is not None:
        return options.header
    first, rest = cells[0], cells[1:_NUM_LINES_LOOKED_AT]
    if {*options.text_column, options.label_column} & {*first}:
        return True
    seen = [{row[n] for row in rest if n < len(row)} for n in range(len(first))]
    if any(is_known_name(cell) and cell not in seen[n] for n, cell in enumerate(first)):
        return True
    if [cell for cell in first if cell] == list(map(str, range(len(first) - (first[0] == "")))):
        return True  # as pandas writes a table without names
    has_numbers = any(as_number(cell) is not None for cell in first)
    # A class occurs again, the name of its column does not.
    has_class = any(
        cell in seen[n] and 2 * len(seen[n]) <= len(rest) + 1
        for n, cell in enumerate(first)
        if cell
    )
    return not (has_numbers or has_class)


def _checked_header(path: Path, cells: Sequence[str]) -> list[str]:
    """The names; columns without one, which spreadsheets write, get their number."""
    names = [cell.strip() for cell in cells]
    if names.count("") > 1:
        names = [name or f"column {number}" for number, name in enumerate(names, start=1)]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise RowError(f"{path}, line 1: two columns have the name {repeated[0]!r}; rename one")
    return names


def _names_by_content(
    path: Path,
    rows: Sequence[Sequence[str]],
    numbers: Sequence[str],
    options: RowFileOptions,
    columns: Columns,
) -> list[str]:
    """Names for the columns of a table without a header, which have only `numbers`.

    Raises:
        RowError: they can be read in more than one way.
    """
    table = list(zip(*rows[:_NUM_LINES_LOOKED_AT], strict=True))
    names = [*numbers]
    if options.text_column or not rows:
        return names
    labels = [n for n, column in enumerate(table) if _holds_labels(column)]
    texts = [n for n, column in enumerate(table) if n not in labels and _holds_texts(column)]
    ids = [n for n in range(len(table)) if n not in (*labels, *texts)]
    is_certain = len(labels) == 1 and 1 <= len(texts) <= len(columns.texts)
    if not is_certain or (ids and not (ids == [0] and _holds_ids(table[0]))):
        shown = " | ".join(cell[:40] for cell in rows[0])
        raise RowError(
            f"{path}: no line of known column names, and which column is the text and which the label is "
            f"not certain; the first row is: {shown}; pass --no_header (--header if that line is one) with "
            "--text_column N and --label_column N, counted from 1"
        )
    names[labels[0]] = columns.label
    for target, number in zip(columns.texts, texts, strict=False):
        names[number] = target
    return names


def _holds_labels(column: Sequence[str]) -> bool:
    """Few short values that occur again, or fractions."""
    values = set(column)
    if all(as_number(cell) is not None for cell in values):
        has_fractions = any("." in cell for cell in values)
        return has_fractions or 1 < len(values) <= max(2, len(column) / 2) < len(column)
    return (
        1 < len(values) <= max(2, len(column) / 2) < len(column)
        and max(map(len, values)) <= _MAX_LABEL_CHARACTERS
        and _mean_words(column) <= _MAX_LABEL_WORDS
    )


def _holds_texts(column: Sequence[str]) -> bool:
    """Words, mostly different ones in each row."""
    return any(as_number(cell) is None for cell in column) and not _holds_ids(column)


def _holds_ids(column: Sequence[str]) -> bool:
    """A different number, or name with a number in it, in each row."""
    is_named = all(re.fullmatch(r"[\w.:/-]*\d[\w.:/-]*", cell) for cell in column)
    return is_named and len(set(column)) == len(column)


def _mean_words(column: Sequence[str]) -> float:
    return sum(len(cell.split()) for cell in column) / len(column)


def _say_what_was_read(
    path: Path, delimiter: str, header: Sequence[str], names: Sequence[str | None]
) -> None:
    """Log what does not follow from the file's ending and its header."""
    said = []
    if delimiter != TABLE_ENDINGS.get(ending(path).lower()):
        said.append(f"columns are separated by {_NAMES_OF_DELIMITERS.get(delimiter, delimiter)}")
    renamed = [
        f"{name} is {old!r}"
        for old, name in zip(header, names, strict=True)
        if name not in (None, old)
    ]
    said += [", ".join(renamed)] if renamed else []
    if said:
        logger.info("%s: %s", path, "; ".join(said))
