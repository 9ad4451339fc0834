"""Fields of labelled rows: reading one with a clear error, and the names that published data sets use.

What a task reads, and which published data sets it knows, stands in the task's file. Here is what several
tasks share: two texts and a label, as GLUE, IMDB, ATEC and dumps of Wikipedia name them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from full_stack_transformer.errors import RowError
from full_stack_transformer.rows.files import PLACE, Row

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
# Values that mean "unknown": a test set whose labels are not published.
_NO_LABEL = (None, -1, "-1", "")


def named_rows(rows: Iterable[Row], convert: Callable[[Row], Row]) -> list[Row]:
    """The rows under the names that a task reads.

    Args:
        rows: as they were read.
        convert: of the task: one row under its names.

    Raises:
        RowError: a row has no known names.
    """
    return [_converted(row, convert) for row in rows]


def _converted(row: Row, convert: Callable[[Row], Row]) -> Row:
    try:
        return convert(row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise RowError(
            f"{row.get(PLACE, 'a row')} has fields of another form than the known ones: {reason}; "
            "docs/tasks.md shows the forms"
        ) from error


def texts_and_label(row: Row) -> Row:
    """`text`, `text_pair` and `label` under those names; other fields stay."""
    for first, second in _TEXTS:
        if first in row and (first != "question" or second in row):
            found = {
                key: value for key, value in row.items() if key not in (first, second, *_LABELS)
            }
            found["text"] = row[first]
            if second is not None and row.get(second) is not None:
                found["text_pair"] = row[second]
            break
    else:
        raise missing_field(row, [name for name, _ in _TEXTS], "a text")
    for name in _LABELS:
        if name in row:
            if not is_unknown(row[name]):
                found["label"] = row[name]
            break
    return found


def is_unknown(label: Any) -> bool:
    """Whether a label says nothing; tables hold NaN where there is nothing."""
    return label in _NO_LABEL or (isinstance(label, float) and math.isnan(label))


def with_origin(found: Row, row: Row) -> Row:
    """A converted row with what says where `row` is from."""
    return {**{key: row[key] for key in (PLACE, "id", "group") if key in row}, **found}


def missing_field(row: Row, names: Sequence[str], what: str) -> RowError:
    """The error for a row that has none of the names."""
    return RowError(
        f"{row.get(PLACE, 'a row')} should have {what} under one of {', '.join(names)}; found "
        f"{', '.join(name for name in row if name != PLACE) or 'nothing'}"
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
