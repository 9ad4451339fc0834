"""Small labelled data sets out of the interpreter's own documentation, a row for each example.

    package_rows    the text of a docstring            -> its package, one of ten; names masked
    name_rows       signature and docstring, in words  -> the names of code among them
    choice_rows     signature and rest of a docstring  -> its first line, among four
    span_rows       a docstring or paragraph of pydoc
                    and a question                     -> the sentence that answers it, or none
    sentence_rows   two sentences                      -> 1 from one docstring, 0 from two packages
    conversation_rows   questions about the library    -> short answers; see python_questions

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
from typing import Any

from full_stack_transformer.document_sources.documents import tidy
from full_stack_transformer.document_sources.python_questions import (
    Question,
    Side,
    python_questions,
)
from full_stack_transformer.document_sources.python_sources import (
    Docstring,
    library_docstrings,
    sentences,
)
from full_stack_transformer.tasks.catalogue import EXAMPLE_ROWS

_NUM_CLASSES = 10
_MASK = "MODULE"
_NUM_CHOICES = 4
_MAX_TEXT_CHARACTERS = 600
_MAX_CONTEXT_CHARACTERS = 300
_MAX_SENTENCE_CHARACTERS = 200
_MAX_WORDS = 80
_MIN_LINE_WORDS = 3
_MIN_SENTENCES = 2
# Beside one question a conversation, the system prompt of a template would be most of what is computed.
_QUESTIONS_OF_A_CONVERSATION = 4
# One passage in so many is also asked for what it does not say.
_UNANSWERED = 3
_WORD = re.compile(r"\w+|[^\w\s]")
# What is asked of a name, and by which words the sentence that tells it is known.
_QUESTIONS = tuple(
    (question, re.compile(hint))
    for question, hint in (
        ("What does {} return?", r"\b[Rr]eturn(s|ed)?\b"),
        ("When does {} raise an error?", r"\b[Rr]aise[sd]?\b|\b[A-Z]\w*(Error|Exception)\b"),
        ("What is the default of {}?", r"\b[Dd]efaults?\b"),
        ("Under which condition does {} do otherwise?", r"^(If|When|Unless)\b"),
        ("What is required by {}?", r"\b(must|should)\b"),
        ("What is optional in {}?", r"\b[Oo]ptional(ly)?\b"),
        ("What is {} used for?", r"\b(used?|useful)\b"),
    )
)
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


def task_rows(task: str) -> list[TaskRow]:
    """The rows for a task of `EXAMPLE_ROWS`, from the interpreter that runs this.

    Raises:
        MachineError: this interpreter was installed without its sources.
    """
    if EXAMPLE_ROWS[task] == conversation_rows.__name__:
        return list(conversation_rows())
    return list(_MAKERS[EXAMPLE_ROWS[task]](library_docstrings()))


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
    """Which sentence of a text tells what is asked, or that none does.

    Paragraphs of a topic stay on one side, and so do methods of a class.
    """
    for passage in (*_passages_of_docstrings(docstrings), *_passages_of_topics()):
        side, context = side_of(passage.group), " ".join(passage.sentences)
        unanswered = []
        for question, hint in _QUESTIONS:
            telling = [one for one in passage.sentences if hint.search(one)]
            asked = question.format(passage.name)
            if not telling:
                unanswered.append(asked)
            if len(telling) == 1:
                answers = {"text": telling, "answer_start": [context.index(telling[0])]}
                yield TaskRow(side, {"question": asked, "context": context, "answers": answers})
        draw = _generator(f"{passage.group}:{passage.name}:{context}")
        if unanswered and draw.randrange(_UNANSWERED) == 0:
            nothing: dict[str, list[Any]] = {"text": [], "answer_start": []}
            asked = draw.choice(unanswered)
            yield TaskRow(side, {"question": asked, "context": context, "answers": nothing})


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


def conversation_rows() -> Iterator[TaskRow]:
    """Questions and answers: one in a conversation of validation and test, several in one of training."""
    questions = python_questions()
    for side in ("valid", "test"):
        for one in (one for one in questions if one.side == side):
            yield TaskRow(one.side, {"messages": _messages([one]), "kind": one.kind})
    training = [one for one in questions if one.side == "train"]
    for start in range(0, len(training), _QUESTIONS_OF_A_CONVERSATION):
        several = training[start : start + _QUESTIONS_OF_A_CONVERSATION]
        yield TaskRow("train", {"messages": _messages(several)})


def _messages(questions: Sequence[Question]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for one in questions
        for role, content in (("user", one.question), ("assistant", one.answer))
    ]


_MAKERS: dict[str, Callable[[Sequence[Docstring]], Iterator[TaskRow]]] = {
    maker.__name__: maker
    for maker in (package_rows, name_rows, choice_rows, span_rows, sentence_rows)
}


@dataclass(frozen=True)
class _Passage:
    """Sentences in a row, of which no two are equal."""

    group: str
    name: str
    sentences: list[str]


def _passages_of_docstrings(docstrings: Sequence[Docstring]) -> Iterator[_Passage]:
    for one in docstrings:
        name = one.name.rpartition(".")[2] or one.module
        yield from _passage(f"{one.module} {one.outermost}", name, one.text)


def _passages_of_topics() -> Iterator[_Passage]:
    """The paragraphs of pydoc's topics."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    seen: set[str] = set()
    # The longest first: short topics are sections of long ones, and would be on both sides.
    for topic, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        for paragraph in tidy(text).split("\n\n"):
            for passage in _passage(f"topic {topic}", topic.lower(), paragraph):
                if passage.sentences[0] not in seen:
                    yield passage
                    seen.add(passage.sentences[0])


def _passage(group: str, name: str, text: str) -> Iterator[_Passage]:
    """The first sentences of a text, where there are two or more."""
    found = list(dict.fromkeys(sentences(text)))
    while len(" ".join(found)) > _MAX_TEXT_CHARACTERS:
        found.pop()
    if len(found) >= _MIN_SENTENCES:
        yield _Passage(group, name, found)


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
