"""A word and its label on each line, a blank line after each sentence: CoNLL and its relatives.

    two columns                                       word, label
    several, of which the last holds B-, I- and O     word, ..., label            (CoNLL-2002, WNUT)
    word, part of speech, chunk, name                 the last                    (CoNLL-2003)
    number, word, label                               the last
    number, word, outer and inner label               the outer                   (GermEval 2014)
    ten columns, of which the first counts            FORM and UPOS; ranges (2-3) and empty nodes (4.1) are no
                                                      words                       (CoNLL-U, CoNLL-X)

Of any other form the error asks for --text_column and --label_column: a guessed label makes a model of
nonsense. Lines before a sentence that begin with # are comments, -DOCSTART- lines begin a document.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from full_stack_transformer.arguments.data import RowFileOptions
from full_stack_transformer.documents.blocks import ending
from full_stack_transformer.errors import RowError
from full_stack_transformer.rows.fields import PLACE, BadRows, Row

logger = logging.getLogger(__name__)

_UNIVERSAL = (".conllu", ".conllx")
WORD_ENDINGS = (".conll", *_UNIVERSAL, ".bio", ".iob", ".iob2")
_DOCUMENT_START = "-DOCSTART-"
_COMMENT = "#"
# Columns of CoNLL-U; CoNLL-X has the same words and parts of speech under older names.
_UNIVERSAL_NAMES = (
    *("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC"),
)
_NUMBER = re.compile(r"\d+")
_RANGE_OR_EMPTY = re.compile(r"\d+[-.]\d+")
# Labels of spans: O, and B-, I- and their relatives.
_OUTSIDE = "O"
_SPAN_LABEL = re.compile(rf"{_OUTSIDE}|[BIESLUM]-\S+")
_BLANKS = re.compile(r"[ \t]+")
_NOTHING = "_"


@dataclass(frozen=True)
class _Line:
    number: int
    """In the file, from 1."""
    text: str
    cells: tuple[str, ...]
    """None of a blank line."""


@dataclass(frozen=True)
class _Form:
    """Which columns are read, from 0."""

    word: int
    label: int
    width: int | None
    """Columns of each line; None where only those that are read must be there."""
    is_numbered: bool = False
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        label = f" ({self.names[self.label]})" if self.names else ""
        return f"the word is column {self.word + 1}, its label column {self.label + 1}{label}"


def read_labelled_words(
    path: Path, content: str, options: RowFileOptions, bad: BadRows
) -> Iterator[Row]:
    """The sentences of a file.

    Args:
        path: the file.
        content: its text.
        options: which columns to read, where that is not certain.
        bad: takes sentences with a line that is not like the others.

    Raises:
        RowError: it is not certain which column is the label.
    """
    lines = _without_comments(list(_split(content, options.delimiter_character)))
    sentences = list(_sentences(lines))
    if not sentences:
        return
    form = _form(path, sentences, options)
    if form.word != 0 or form.label != (form.width or 0) - 1:
        logger.info("%s: %s", path, form)
    for sentence in sentences:
        try:
            pairs = [_word_and_label(path, line, form) for line in sentence]
        except RowError as error:
            bad.add(error)
            continue
        found = [pair for pair in pairs if pair is not None]
        if found:
            words, labels = map(list, zip(*found, strict=True))
            place = f"{path}, line {sentence[0].number}"
            yield {"words": words, "labels": labels, PLACE: place}


def _split(content: str, delimiter: str | None) -> Iterator[_Line]:
    """Cells between tabs, where most lines have any and words may hold spaces, else between blanks."""
    lines = re.split(r"\r\n|\n|\r", content)
    of_words = [line for line in lines if line.strip() and not line.startswith(_COMMENT)]
    has_tabs = 2 * sum("\t" in line.strip() for line in of_words) >= max(1, len(of_words))
    if delimiter is None and has_tabs:
        delimiter = "\t"
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            cells: Sequence[str] = ()
        elif delimiter not in (None, " "):
            cells = line.split(delimiter)
        else:
            cells = _BLANKS.split(line.strip(" \t"))
        yield _Line(number, line, tuple(cells))


def _without_comments(lines: Sequence[_Line]) -> list[_Line]:
    """Lines of words and blank ones.

    The word # at the beginning of a sentence is told from a comment by its label and its columns.
    """
    words = [line for line in lines if line.cells and not line.text.startswith(_COMMENT)]
    widths = {len(line.cells) for line in words}
    labels = {line.cells[-1] for line in words}
    are_numbered = bool(words) and all(_is_number(line.cells[0]) for line in words)
    found: list[_Line] = []
    for line in lines:
        if line.cells and line.cells[0].startswith(_DOCUMENT_START):
            found.append(_Line(line.number, "", ()))
            continue
        is_first = not (found and found[-1].cells)
        is_label = bool(line.cells) and (
            line.cells[-1] in labels or bool(_SPAN_LABEL.fullmatch(line.cells[-1]))
        )
        is_word = len(line.cells) in widths and is_label
        if line.text.startswith(_COMMENT) and (are_numbered or (is_first and not is_word)):
            continue
        found.append(line)
    return found


def _sentences(lines: Sequence[_Line]) -> Iterator[list[_Line]]:
    sentence: list[_Line] = []
    for line in lines:
        if line.cells:
            sentence.append(line)
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _is_number(cell: str) -> bool:
    return bool(_NUMBER.fullmatch(cell) or _RANGE_OR_EMPTY.fullmatch(cell))


def _form(path: Path, sentences: Sequence[Sequence[_Line]], options: RowFileOptions) -> _Form:
    """The form of a file.

    Raises:
        RowError: none is certain.
    """
    lines = [line for sentence in sentences for line in sentence]
    width = _usual_width(lines)
    must_be_universal = ending(path).lower() in _UNIVERSAL
    is_numbered = width > 2 and (must_be_universal or all(map(_counts, sentences)))
    names = _UNIVERSAL_NAMES if is_numbered and width == len(_UNIVERSAL_NAMES) else ()
    alike = [line.cells for line in lines if len(line.cells) == width]
    if must_be_universal and not names:
        raise RowError(
            f"{path}, line {lines[0].number} should have the ten columns of CoNLL-U between tabs, the first "
            f"of which counts the words; found {lines[0].text[:80]!r}"
        )
    if options.text_column or options.label_column is not None:
        return _chosen_form(path, options, width, names, is_numbered=is_numbered)
    if width < 2:
        raise RowError(
            f"{path}, line {lines[0].number} should be a word and its label, or blank; found "
            f"{lines[0].text!r}"
        )
    form = _certain_form(alike, width, names, is_numbered=is_numbered)
    if form is None:
        raise RowError(
            f"{path}, line {lines[0].number}: which of the {width} columns is the label is not certain: "
            f"{' | '.join(alike[0])}; pass --label_column N, counted from 1, and --text_column N if the word "
            "is not the first"
        )
    return form


def _usual_width(lines: Sequence[_Line]) -> int:
    widths = [len(line.cells) for line in lines]
    return max(sorted({*widths}, reverse=True), key=widths.count)


def _counts(sentence: Sequence[_Line]) -> bool:
    """Whether the first column counts the words of a sentence, from 0 or 1."""
    numbers = [line.cells[0] for line in sentence if not _RANGE_OR_EMPTY.fullmatch(line.cells[0])]
    starts = numbers[:1]
    return starts in (["0"], ["1"]) and numbers == [
        str(int(starts[0]) + index) for index in range(len(numbers))
    ]


def _certain_form(
    rows: Sequence[Sequence[str]], width: int, names: tuple[str, ...], *, is_numbered: bool
) -> _Form | None:
    columns = [[row[n] for row in rows] for n in range(width)]
    spans = [n for n, column in enumerate(columns) if _holds_spans(column)]
    outside = [n for n, column in enumerate(columns) if set(column) == {_OUTSIDE}]
    word, last = int(is_numbered), width - 1
    form = _Form(word, last, width, is_numbered, names)
    if names:
        label = names.index("UPOS")
        is_there = any(row[label] != _NOTHING for row in rows)
        return replace(form, label=label) if is_there else None
    if is_numbered and width == 4 and sorted((*spans, *outside)) == [2, 3]:
        return replace(form, label=2)
    if width == word + 2:  # unless the columns stand in another order
        return None if spans == [word] else form
    is_chunked = width == 4 and spans == [2, 3] and not is_numbered
    return form if (spans or outside) == [last] or is_chunked else None


def _holds_spans(column: Sequence[str]) -> bool:
    """Whether all are labels of spans, and not only O, which is a letter too."""
    return all(map(_SPAN_LABEL.fullmatch, column)) and any(cell != _OUTSIDE for cell in column)


def _chosen_form(
    path: Path, options: RowFileOptions, width: int, names: tuple[str, ...], *, is_numbered: bool
) -> _Form:
    """As --text_column and --label_column say; the other one is the usual one."""

    def column(name: str, option: str) -> int:
        if name in names:
            return names.index(name)
        if _NUMBER.fullmatch(name) and 1 <= int(name) <= width:
            return int(name) - 1
        known = f" or one of {', '.join(names)}" if names else ""
        raise RowError(
            f"{path}: {option} should be a number from 1 to {width}{known}; found {name!r}"
        )

    if len(options.text_column) > 1:
        raise RowError(f"{path}: labelled words are one column; give --text_column once")
    word = int(is_numbered)
    if options.text_column:
        word = column(options.text_column[0], "--text_column")
    label = names.index("UPOS") if names else width - 1
    if options.label_column is not None:
        label = column(options.label_column, "--label_column")
    if label == word:
        raise RowError(
            f"{path}: column {label + 1} cannot be both word and label; pass --text_column and --label_column"
        )
    return _Form(word, label, None, is_numbered, names)


def _word_and_label(path: Path, line: _Line, form: _Form) -> tuple[str, str] | None:
    """None of what is no word.

    Raises:
        RowError: the line is not like the others.
    """
    cells = line.cells
    if form.is_numbered and _RANGE_OR_EMPTY.fullmatch(cells[0]):
        return None
    needed = max(form.word, form.label) + 1
    if len(cells) != (form.width or len(cells)) or len(cells) < needed:
        raise RowError(
            f"{path}, line {line.number} should have {form.width or needed} columns, found {len(cells)}: "
            f"{line.text!r}"
        )
    if not cells[form.word] or not cells[form.label].strip():
        raise RowError(
            f"{path}, line {line.number} should be a word and its label, or blank; found {line.text!r}"
        )
    return cells[form.word], cells[form.label]
