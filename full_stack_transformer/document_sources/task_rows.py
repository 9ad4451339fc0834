"""Small labelled data sets out of the interpreter's own documentation, a row for each example.

    sequence_classification   the text of a docstring           -> its package, one of ten; names masked
    token_labelling           signature and docstring, in words -> the names of code among them
    multiple_choice           signature and rest of a docstring -> its first line, among four
    span_selection            a page of pydoc and a question    -> the sentence that answers it, or none
    sentence_embedding        two sentences                     -> 1 from one docstring, 0 from two packages

Rows that could help each other (of one class or function, or of one file) fall on the same side of the
split, and no two docstrings are near-duplicates. Every choice is drawn from a generator that is seeded with
the row's own name: the same interpreter gives the same rows. The field names are those of well-known data
sets. Knows nothing of files.
"""

import builtins
import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from full_stack_transformer.document_sources.docstrings import (
    Docstring,
    library_docstrings,
    sentences,
)
from full_stack_transformer.document_sources.documents import tidy

Side = Literal["train", "valid", "test"]
TaskName = Literal[
    "sequence_classification",
    "token_labelling",
    "multiple_choice",
    "span_selection",
    "sentence_embedding",
]

_NUM_CLASSES = 10
_MASK = "MODULE"
_NUM_CHOICES = 4
_MAX_TEXT_CHARACTERS = 600
_MAX_CONTEXT_CHARACTERS = 300
_MAX_SENTENCE_CHARACTERS = 200
_MAX_WORDS = 80
_MIN_LINE_WORDS = 3
_ENTRIES_ON_PAGE = 5
# One question in so many has no answer on its page.
_UNANSWERED = 6
_WORD = re.compile(r"\w+|[^\w\s]")
# A line over a ruler, and what follows up to the next of the kind.
_HEADING = re.compile(r"^(\S.*)\n[*=\-~]{3,}\n((?:(?!^\S.*\n[*=\-~]{3,}$).*\n?)*)", re.MULTILINE)
_EXCEPTIONS = frozenset(
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
)


@dataclass(frozen=True)
class TaskRow:
    """An example and the side of the split that it falls on."""

    side: Side
    fields: dict[str, Any]


def task_rows(task: TaskName) -> list[TaskRow]:
    """The rows of a task, from the interpreter that runs this.

    Raises:
        MachineError: this interpreter was installed without its sources.
    """
    return list(_ROWS[task](library_docstrings()))


def side_of(group: str) -> Side:
    """A tenth of all groups test, a tenth validate, the others train; the same on every machine."""
    number = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % 10
    return "test" if number == 0 else "valid" if number == 1 else "train"


def package_rows(docstrings: Sequence[Docstring]) -> Iterator[TaskRow]:
    """Which package a docstring is from. Methods of one class stay on one side."""
    counts = Counter(one.package for one in docstrings)
    # By count, then by name.
    packages = [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][
        :_NUM_CLASSES
    ]
    names = re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, packages))})(?![^\W_])", re.I)
    for one in docstrings:
        if one.package in packages:
            text = names.sub(_MASK, _cut(one.text, _MAX_TEXT_CHARACTERS))
            yield TaskRow(
                side_of(f"{one.module} {one.outermost}"), {"text": text, "label": one.package}
            )


def name_rows(docstrings: Sequence[Docstring]) -> Iterator[TaskRow]:
    """Which words are names of code: ARGUMENT, FUNCTION, CLASS, EXCEPTION. Files stay on one side."""
    kinds: dict[str, dict[str, str]] = {}
    for one in docstrings:
        if one.name:
            last = one.name.rpartition(".")[2]
            kinds.setdefault(one.module, {})[last] = one.kind.upper()
    for one in docstrings:
        if one.kind == "module":
            continue
        known = {
            **dict.fromkeys(_EXCEPTIONS, "EXCEPTION"),
            **{name: kind for name, kind in kinds[one.module].items() if _is_code(name)},
            **dict.fromkeys(one.parameters, "ARGUMENT"),
            one.name.rpartition(".")[2]: one.kind.upper(),
        }
        words = _WORD.findall(f"{_signature(one)}\n{one.text}")[:_MAX_WORDS]
        yield TaskRow(side_of(one.module), {"words": words, "labels": _labels(words, known)})


def choice_rows(docstrings: Sequence[Docstring]) -> Iterator[TaskRow]:
    """Which of four first lines begins a docstring. The others are of other packages on the same side."""
    first_lines: dict[Side, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
    for one in docstrings:
        line = " ".join(one.text.split("\n")[0].split())
        if one.kind != "module" and len(line.split()) >= _MIN_LINE_WORDS:
            first_lines[side_of(one.module)].append((one.package, line))
    strangers: dict[tuple[Side, str], list[str]] = {}
    for one in docstrings:
        line, rest = (" ".join(part.split()) for part in f"{one.text}\n".split("\n", 1))
        side = side_of(one.module)
        if one.kind == "module" or len(line.split()) < _MIN_LINE_WORDS or line in rest:
            continue
        key = (side, one.package)
        if key not in strangers:
            others = (text for package, text in first_lines[side] if package != one.package)
            strangers[key] = list(dict.fromkeys(others))
        if len(strangers[key]) < _NUM_CHOICES:
            continue
        draw = _generator(f"{one.module}:{one.name}")
        # One more than needed: another package may have the same line.
        drawn = [text for text in draw.sample(strangers[key], _NUM_CHOICES) if text != line]
        choices = [line, *drawn[: _NUM_CHOICES - 1]]
        draw.shuffle(choices)
        context = _cut(f"{_signature(one)} {rest}", _MAX_CONTEXT_CHARACTERS)
        yield TaskRow(side, {"text": context, "choices": choices, "label": choices.index(line)})


def span_rows(docstrings: Sequence[Docstring]) -> Iterator[TaskRow]:
    """Which sentence of a page says what a name does. Files and topics stay on one side."""
    for source, entries in (*_entries_of_modules(docstrings), *_entries_of_topics()):
        names = [name for name, _ in entries]
        for start in range(0, len(entries) - 1, _ENTRIES_ON_PAGE):
            page = entries[start : start + _ENTRIES_ON_PAGE]
            inside = {name for name, _ in page}
            outside = [name for name in names if name not in inside]
            context = " ".join(f"{name}: {sentence}" for name, sentence in page)
            for name, sentence in page:
                draw = _generator(f"{source}:{name}")
                position = context.index(f"{name}: {sentence}") + len(name) + 2
                answers = {"text": [sentence], "answer_start": [position]}
                if outside and draw.randrange(_UNANSWERED) == 0:
                    name, answers = draw.choice(outside), {"text": [], "answer_start": []}
                yield TaskRow(
                    side_of(source),
                    {"question": f"What is {name}?", "context": context, "answers": answers},
                )


def sentence_rows(docstrings: Sequence[Docstring]) -> Iterator[TaskRow]:
    """Two neighbouring sentences of a docstring, and a first one with one of another package."""
    pairs: dict[Side, list[tuple[Docstring, str, str]]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    for one in docstrings:
        found = [text for text in sentences(one.text) if len(text) <= _MAX_SENTENCE_CHARACTERS]
        for first, second in zip(found[::2], found[1::2], strict=False):
            if first != second and not seen & {first, second}:
                pairs[side_of(one.module)].append((one, first, second))
                seen |= {first, second}
    for side, examples in pairs.items():
        has_others = len({one.package for one, _, _ in examples}) > 1
        for number, (one, first, second) in enumerate(examples):
            yield TaskRow(side, {"sentence1": first, "sentence2": second, "score": 1.0})
            draw = _generator(f"{one.module}:{one.name}:{number}")
            stranger, _, other = draw.choice(examples)
            while has_others and stranger.package == one.package:
                stranger, _, other = draw.choice(examples)
            if has_others:
                yield TaskRow(side, {"sentence1": first, "sentence2": other, "score": 0.0})


_ROWS: dict[TaskName, Callable[[Sequence[Docstring]], Iterator[TaskRow]]] = {
    "sequence_classification": package_rows,
    "token_labelling": name_rows,
    "multiple_choice": choice_rows,
    "span_selection": span_rows,
    "sentence_embedding": sentence_rows,
}


def _entries_of_modules(
    docstrings: Sequence[Docstring],
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Of each module the names and what each is, in one sentence, without repeated names."""
    found: dict[str, dict[str, str]] = {}
    for one in docstrings:
        said = sentences(one.text)
        if one.name and said and len(said[0]) <= _MAX_SENTENCE_CHARACTERS:
            entries = found.setdefault(one.module, {})
            entries.setdefault(one.name.rpartition(".")[2], said[0])
    yield from ((module, list(entries.items())) for module, entries in found.items())


def _entries_of_topics() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Of each topic of pydoc its headings and the first sentence under each."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    seen: set[str] = set()
    # The longest first: short topics are sections of long ones, and would be on both sides.
    for topic, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        entries: dict[str, str] = {}
        for heading, body in _HEADING.findall(text):
            said = sentences(tidy(body.strip("\n")))
            if said and len(said[0]) <= _MAX_SENTENCE_CHARACTERS and said[0] not in seen:
                entries.setdefault(heading.strip().replace('"', ""), said[0])
                seen.add(said[0])
        yield f"topic {topic}", list(entries.items())


def _labels(words: Sequence[str], known: dict[str, str]) -> list[str]:
    """IOB2; a dotted name is one span of the kind of its last part."""
    labels = ["O"] * len(words)
    position = 0
    while position < len(words):
        end = position + 1
        while end + 1 < len(words) and words[end] == "." and words[end + 1] in known:
            end += 2
        kind = known.get(words[end - 1])
        if kind and (end > position + 1 or words[position] in known):
            labels[position] = f"B-{kind}"
            labels[position + 1 : end] = [f"I-{kind}"] * (end - position - 1)
        position = end
    return labels


def _is_code(name: str) -> bool:
    """Whether a name cannot be taken for a word of English, which most short ones can."""
    return "_" in name.strip("_") or name.lower() != name[:1].lower() + name[1:]


def _signature(one: Docstring) -> str:
    last = one.name.rpartition(".")[2]
    return f"{last}({', '.join(one.parameters)})" if one.kind == "function" else f"class {last}"


def _generator(name: str) -> random.Random:
    """Of its own for each row: what is drawn for one does not depend on the others."""
    return random.Random(name)  # noqa: S311


def _cut(text: str, length: int) -> str:
    """The beginning of a text that ends with a whole word."""
    return text if len(text) <= length else text[: length + 1].rsplit(None, 1)[0]
