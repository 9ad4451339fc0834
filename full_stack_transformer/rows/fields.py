"""The field names of well-known data sets -> those that a task reads.

    sequence_classification, sentence_embedding   text, text_pair, label
    multiple_choice                               text, choices, label
    span_selection                                question, context, answers: [{text, start}]
    token_labelling                               words, labels
    masked_lm                                     text

Known are GLUE, IMDB and ATEC, SWAG and CommonsenseQA, SQuAD, CoNLL-2003 as the hub has it, and dumps of
Wikipedia. Fields that are not known stay as they are.
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
_WORDS = ("words", "tokens")
_WORD_LABELS = ("labels", "ner_tags", "tags", "pos_tags", "ner")
# Everything that says what is right about a row, under all of its names.
LABEL_NAMES = frozenset((*_LABELS, *_WORD_LABELS, "gold", "answerKey", "answers"))
# Names of one value that say "unknown": a test set that is not published.
_NO_LABEL = (None, -1, "-1", "")


def named_rows(rows: Iterable[Row], task: str) -> list[Row]:
    """The rows under the names that the task reads.

    Raises:
        RowError: a row has no names that are known.
    """
    convert = _CONVERTERS.get(task, dict)
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


def _texts(row: Row) -> Row:
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
        raise _no_field(row, [name for name, _ in _TEXTS], "a text")
    for name in _LABELS:
        if name in row:
            if not _is_unknown(row[name]):
                found["label"] = row[name]
            break
    return found


def _choices(row: Row) -> Row:
    if isinstance(row.get("choices"), list) and "text" in row:
        return row
    endings = [name for name in row if name.startswith("ending") and name[6:].isdecimal()]
    # A table has a column for the greatest number of choices: the last ones may hold nothing.
    endings.sort(key=lambda name: int(name[6:]))
    while endings and row[endings[-1]] in (None, ""):
        endings.pop()
    if endings:  # SWAG: the context, then the beginning of the sentence that each choice ends
        beginning = row.get("sent2") or ""
        texts = [f"{beginning} {row[name] or ''}".strip() for name in endings]
        text = row.get("sent1", row.get("startphrase", ""))
        return _chosen(row, text, texts, row.get("label", row.get("gold")))
    if "question" in row:
        question = row["question"]
        if isinstance(question, dict):  # CommonsenseQA as it was published
            text, choices = question.get("stem"), question.get("choices")
        else:  # as the hub has it: columns instead of rows
            text, choices = question, row.get("choices")
        if isinstance(choices, dict):
            names, texts = list(choices["label"]), list(choices["text"])
        elif isinstance(choices, list) and all(isinstance(one, dict) for one in choices):
            names, texts = [one["label"] for one in choices], [one["text"] for one in choices]
        else:
            raise _no_field(row, ["choices"], "a list of choices")
        key = row.get("answerKey", row.get("answer"))
        return _chosen(row, text, texts, names.index(key) if key in names else None)
    raise _no_field(row, ["choices", "ending0", "question"], "choices")


def _chosen(row: Row, text: Any, choices: Sequence[str], label: Any) -> Row:
    found: Row = {"text": text, "choices": list(choices)}
    if not _is_unknown(label):
        found["label"] = int(label)
    return _with_rest(found, row)


def _spans(row: Row) -> Row:
    answers = row.get("answers")
    if isinstance(answers, dict):  # SQuAD as the hub has it: columns instead of rows
        starts = answers.get("answer_start") or answers.get("start") or []
        answers = [
            {"text": text, "start": start}
            for text, start in zip(answers["text"], starts, strict=True)
        ]
    elif isinstance(answers, list):
        answers = [
            {"text": one["text"], "start": one.get("start", one.get("answer_start"))}
            for one in answers
        ]
    return row if answers is None else {**row, "answers": answers}


def _labelled_words(row: Row) -> Row:
    words = next((row[name] for name in _WORDS if name in row), None)
    if words is None:
        raise _no_field(row, _WORDS, "words")
    labels = next((row[name] for name in _WORD_LABELS if name in row), None)
    found: Row = {"words": _list(words)}
    if labels is not None:
        if None in _list(labels):
            raise TypeError("a label is null")
        found["labels"] = [str(label) for label in labels]
    return _with_rest(found, row)


def _is_unknown(label: Any) -> bool:
    """NaN is what tables hold where there is nothing."""
    return label in _NO_LABEL or (isinstance(label, float) and math.isnan(label))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{value!r} should be a list")
    return list(value)


def _with_rest(found: Row, row: Row) -> Row:
    return {**{key: row[key] for key in (PLACE, "id", "group") if key in row}, **found}


def _no_field(row: Row, names: Sequence[str], what: str) -> RowError:
    there = [name for name in row if name != PLACE]
    return RowError(
        f"{row.get(PLACE, 'a row')} should have {what} under one of {', '.join(names)}; found "
        f"{', '.join(there) or 'nothing'}"
    )


_CONVERTERS: dict[str, Callable[[Row], Row]] = {
    "sequence_classification": _texts,
    "sentence_embedding": _texts,
    "masked_lm": _texts,
    "multiple_choice": _choices,
    "span_selection": _spans,
    "token_labelling": _labelled_words,
}
