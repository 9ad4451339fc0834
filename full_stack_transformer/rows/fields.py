"""Fields of labelled rows: reading one with a clear error, and the names that published data sets use.

What a task reads, and which published data sets it knows, stands in the task's file. Here is what several
tasks share: two texts and a label, as GLUE, IMDB, ATEC and dumps of Wikipedia name them, and the choice of
columns by --text_column and --label_column. Knows no files.
"""

import dataclasses
import logging
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from full_stack_transformer.arguments.data import RowFileOptions
from full_stack_transformer.errors import RowError

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

# Key of a row's place in its file, for errors; never written.
PLACE = "_place"
# The first pair whose first name is there is taken; the second name may be missing.
_TEXTS = (
    ("text", "text_pair"),
    ("question", "sentence"),  # QNLI; before `sentence`
    ("sentence", None),  # SST-2, CoLA
    ("sentence1", "sentence2"),  # MRPC, STS-B, RTE, WNLI, ATEC on the hub
    ("premise", "hypothesis"),  # MNLI, SNLI, XNLI
    ("question1", "question2"),  # QQP
    ("#1 String", "#2 String"),  # MRPC as GLUE's own file has it
    ("s1", "s2"),
    ("review", None),
    ("content", None),
)
_LABELS = (
    *("label", "labels", "score", "similarity_score", "category", "sentiment", "stars"),
    *("gold_label", "is_duplicate", "Quality"),  # MNLI, QQP and MRPC as GLUE's own files have them
)
WORDS = ("words", "tokens")
WORD_LABELS = ("labels", "ner_tags", "tags", "pos_tags", "ner")
# Everything that says what is right about a row, under all of its names.
LABEL_NAMES = frozenset((*_LABELS, *WORD_LABELS, "gold", "answerKey", "answers"))
_OF_TEXTS = {name for pair in _TEXTS for name in pair if name is not None}
# Names that a line of column names is recognised by.
KNOWN_NAMES = frozenset((*_OF_TEXTS, *_LABELS, *WORDS, *WORD_LABELS, "context", "answers"))
_BY_SPELLING = {name.casefold(): name for name in KNOWN_NAMES}
# Fields that may differ between rows of the same texts: ids and labels.
_NO_TEXTS = LABEL_NAMES | {PLACE, "", "id", "idx", "index", "guid"}


@dataclass(frozen=True)
class Columns:
    """The names under which a task reads its texts and its label."""

    texts: tuple[str, ...] = ("text", "text_pair")
    label: str = "label"


@dataclass
class BadRows:
    """What happens to rows that cannot be read: --on_bad_row.

    Args:
        source: the file, for the log.
        action: stop or skip.
    """

    source: str
    action: str = "stop"
    errors: list[RowError] = dataclasses.field(default_factory=list)

    def add(self, error: RowError) -> None:
        """Raise the error, or count it.

        Raises:
            RowError: rows are not skipped.
        """
        if self.action != "skip":
            raise RowError(f"{error}; correct it, or pass --on_bad_row skip to leave such rows out")
        self.errors.append(error)

    def log(self) -> None:
        """Say how many rows were skipped, and why the first one was."""
        if self.errors:
            logger.warning(
                "%s: skipped %s bad %s; the first: %s",
                self.source,
                f"{len(self.errors):,}",
                "row" if len(self.errors) == 1 else "rows",
                self.errors[0],
            )


def named_rows(
    rows: Iterable[Row],
    convert: Callable[[Row], Row],
    *,
    bad: BadRows | None = None,
    minus_one_is_label: bool | None = None,
) -> list[Row]:
    """The rows under the names that a task reads.

    Args:
        rows: as they were read.
        convert: of the task: one row under its names.
        bad: takes rows that have no known names; without it the first one is an error.
        minus_one_is_label: whether the label -1 is a class or a score, and does not stand for an unpublished
            label. By default the rows decide: see `is_minus_one_label`.

    Raises:
        RowError: a row has no known names.
    """
    found = []
    for row in rows:
        try:
            found.append(_converted(row, convert))
        except RowError as error:
            if bad is None:
                raise
            bad.add(error)
    if minus_one_is_label is None:
        minus_one_is_label = is_minus_one_label(found)
    return found if minus_one_is_label else list(map(_without_minus_one, found))


def is_minus_one_label(rows: Iterable[Row]) -> bool:
    """Whether the label -1 of these rows says something.

    It does beside 0 and 1 alone, beside other negative numbers, and beside scores up to 1. Beside 0, 1 and 2,
    beside names and where all labels are -1 it stands for a label that is not published (SNLI, GLUE's tests).
    """
    labels = {row["label"] for row in rows if isinstance(row.get("label"), str | int | float)}
    numbers = [as_number(label) for label in labels if not is_minus_one(label)]
    known = [number for number in numbers if number is not None]
    if not known or len(known) < len(numbers):
        return False
    return min(known) < 0 or max(known) <= 1


def has_minus_one(rows: Iterable[Row]) -> bool:
    """Whether a row has the label -1."""
    return any(is_minus_one(row.get("label")) for row in rows)


def is_minus_one(label: Any) -> bool:
    """Whether a label is the number -1."""
    return isinstance(label, str | int | float) and as_number(label) == -1


def _without_minus_one(row: Row) -> Row:
    if is_minus_one(row.get("label")):
        return {name: value for name, value in row.items() if name != "label"}
    return row


def labelled_rows(rows: Iterable[Row], has_label: Callable[[Row], bool], bad: BadRows) -> list[Row]:
    """The rows with a label; the others go to `bad`."""
    found = []
    for row in rows:
        if has_label(row):
            found.append(row)
        else:
            bad.add(RowError(f"{place(row)}no label"))
    return found


def _converted(row: Row, convert: Callable[[Row], Row]) -> Row:
    try:
        return convert(row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise RowError(
            f"{row.get(PLACE, 'a row')} has fields of another form than the known ones: {reason}; "
            "docs/tasks.md shows the forms"
        ) from error


def columns_to_read(
    names: Sequence[str],
    options: RowFileOptions,
    columns: Columns,
    place: str,
    *,
    by_number: bool = False,
) -> list[str | None]:
    """The names under which the columns of a file are read, None for those that are left out.

    Args:
        names: as the file has them.
        options: with --text_column and --label_column. Without them a known name in another spelling, such
            as `Label`, becomes the known one.
        columns: of the task.
        place: the file and line, for errors.
        by_number: whether "1" names the first column, as in tables.

    Raises:
        RowError: there is no such column.
    """
    if len(options.text_column) > len(columns.texts):
        raise RowError(
            f"--text_column is given {len(options.text_column)} times; this task reads "
            f"{len(columns.texts)}: {', '.join(columns.texts)}"
        )
    chosen: dict[int, str] = {}
    for target, name in zip(columns.texts, options.text_column, strict=False):
        index = _index_of(name, names, by_number=by_number)
        if index is None:
            raise RowError(
                f"{place} has no column {name!r} (--text_column); found {', '.join(names) or 'none'}"
            )
        chosen[index] = target
    left_out = set(columns.texts) if options.text_column else set()
    if options.label_column is not None:
        left_out |= LABEL_NAMES
        index = _index_of(options.label_column, names, by_number=by_number)
        if index is not None:  # a test file may have none
            chosen[index] = columns.label
    found: list[str | None] = [
        chosen.get(n, None if name in left_out else name) for n, name in enumerate(names)
    ]
    for number, spelled in enumerate(found):
        known = _BY_SPELLING.get(_folded(spelled)) if spelled and number not in chosen else None
        if known is not None and known not in {*found, *left_out}:
            found[number] = known
    return found


def _index_of(name: str, names: Sequence[str], *, by_number: bool) -> int | None:
    if name in names:
        return names.index(name)
    if by_number and name.isdecimal() and 1 <= int(name) <= len(names):
        return int(name) - 1
    return None


def is_known_name(name: str) -> bool:
    """Whether published data sets call a column so, whatever the case."""
    return _folded(name) in _BY_SPELLING


def _folded(name: str) -> str:
    return name.strip().casefold()


def texts_and_label(row: Row) -> Row:
    """`text`, `text_pair` and `label` under those names; other fields stay.

    A label -1 stays too: `named_rows` knows whether it says something.
    """
    names = names_of_texts(row)
    if not names:
        raise missing_field(row, [name for name, _ in _TEXTS], "a text", "--text_column")
    if is_null(row[names[0]]):
        raise RowError(f"{row.get(PLACE, 'a row')} has no text: {names[0]!r} is null")
    found = {key: value for key, value in row.items() if key not in (*names, *_LABELS)}
    found["text"] = row[names[0]]
    if len(names) > 1 and row[names[1]] is not None:
        found["text_pair"] = row[names[1]]
    name = next((name for name in _LABELS if name in row), None)
    # SNLI writes "-" where its annotators did not agree.
    is_open = name == "gold_label" and row[name] == "-"
    if name is not None and not is_null(row[name]) and row[name] != "" and not is_open:
        found["label"] = row[name]
    return found


def names_of_texts(row: Row) -> tuple[str, ...]:
    """The fields of a row that hold its text and the text that it is paired with."""
    for first, second in _TEXTS:
        if first in row and (first != "question" or second in row):
            return (first, second) if second is not None and second in row else (first,)
    return ()


def all_but_labels(row: Row) -> dict[str, Any]:
    """The fields of a row that are neither a label nor an id, by their names."""
    return {name: row[name] for name in sorted(row) if name not in _NO_TEXTS}


def only(row: Row, names: Iterable[str]) -> dict[str, Any]:
    """Those of the fields that a row has; without any of them all but its labels."""
    return {name: row[name] for name in names if name in row} or all_but_labels(row)


def label_name(label: Any) -> str:
    """The name of a label: 1 and 1.0 and "1" are one label."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label)


def counted(counts: Mapping[str, int], *, most: int = 20) -> str:
    """Classes with their counts, the greatest first."""
    shown = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    words = [f"{name} ({count:,})" for name, count in shown[:most]]
    if len(shown) > most:
        words.append(f"and {len(shown) - most:,} more")
    return ", ".join(words)


def described_numbers(numbers: Sequence[float]) -> str:
    """Scores by their range and mean."""
    mean = sum(numbers) / max(1, len(numbers))
    return f"scores: {min(numbers):g} to {max(numbers):g}, mean {mean:.3g}" if numbers else ""


def alike_labels(names: Iterable[str]) -> list[list[str]]:
    """Labels that differ by case or white space only, together."""
    found: dict[str, list[str]] = {}
    for name in sorted({*names}):
        key = " ".join(unicodedata.normalize("NFC", name).casefold().split())
        found.setdefault(key, []).append(name)
    return [alike for alike in found.values() if len(alike) > 1]


def is_null(value: Any) -> bool:
    """Whether a field holds nothing, for which tables have NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_unknown(label: Any) -> bool:
    """Whether the number of a choice is not published: nothing, or -1."""
    return is_null(label) or label == "" or is_minus_one(label)


def as_number(label: Any) -> float | None:
    """A label as a number; None of what is no number, which "nan" and "inf" are not."""
    try:
        number = float(label)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def with_origin(found: Row, row: Row) -> Row:
    """A converted row with what says where `row` is from."""
    return {**{key: row[key] for key in (PLACE, "id", "group") if key in row}, **found}


def missing_field(row: Row, names: Sequence[str], what: str, option: str = "") -> RowError:
    """The error for a row that has none of the names; `option` can name the field."""
    return RowError(
        f"{row.get(PLACE, 'a row')} should have {what} under one of {', '.join(names)}; found "
        f"{', '.join(name for name in row if name != PLACE) or 'nothing'}"
        + (f"; name the right one with {option}" if option else "")
        + (", or pass --no_header if the first line of the table is a row" if option else "")
    )


def field(row: Row, name: str, kind: type | tuple[type, ...], task: str) -> Any:
    """A field of a row, of the type that its task needs.

    Raises:
        RowError: it is missing, or has another type.
    """
    value = row.get(name)
    if isinstance(value, kind):
        return value
    expected = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
    found = f"{type(value).__name__} there" if name in row else f"the fields {names_of(row)}"
    raise RowError(f"{place(row)}a row of {task} should have {name!r}, a {expected}; found {found}")


def texts_of(row: Row, name: str, task: str) -> list[str]:
    """A field of a row that is a list of texts.

    Raises:
        RowError: it is missing, or has another type.
    """
    values: list[Any] = field(row, name, list, task)
    wrong = next((value for value in values if not isinstance(value, str)), "")
    if not isinstance(wrong, str):
        raise RowError(
            f"{place(row)}a row of {task} should have {name!r}, a list of str; found {wrong!r} in it"
        )
    return values


def names_of(row: Row) -> str:
    """The fields of a row, for an error."""
    return ", ".join(name for name in row if name != PLACE) or "of an empty object"


def place(row: Row) -> str:
    """Where a row stands, for the beginning of an error."""
    return f"{row[PLACE]}: " if PLACE in row else ""


def without_place(row: Row) -> dict[str, Any]:
    """A row as it is written."""
    return {name: value for name, value in row.items() if name != PLACE}
