"""Questions about the interpreter's library and their answers, made by rules.

    well-known modules --inspect--> things --> facts: a thing, a kind of question, the answer
                                                ──five wordings each──> questions

    kind            answer
    do, return      the first sentence of the docstring
    name            the name, for that sentence
    module          the module that has it
    parameters      the names in the signature
    exception       the exception that the docstring says it raises
    base            the class that an exception is derived from
    documentation   all of that together, for a thing

What is held out: a twentieth of the facts is asked in no training question, in no words; the documentation
of the thing, which is learned, says most of these answers (test). Of the other facts every second one keeps
one of its five wordings for validation; training has the other four. Which ones is drawn by hashes of names:
the same interpreter gives the same questions. Knows nothing of conversations and files.
"""

import builtins
import hashlib
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from full_stack_transformer.document_sources.documents import is_readable, tidy
from full_stack_transformer.errors import MachineError

# Public modules that do nothing when imported.
MODULES = (
    *("bisect", "calendar", "collections", "contextlib", "copy", "csv", "dataclasses", "datetime"),
    *("difflib", "fnmatch", "functools", "getpass", "glob", "gzip", "hashlib", "heapq", "html"),
    *("inspect", "itertools", "json", "linecache", "locale", "math", "operator", "os", "os.path"),
    *("pickle", "platform", "pprint", "random", "re", "secrets", "shlex", "shutil", "statistics"),
    *("string", "subprocess", "tempfile", "textwrap", "threading", "time", "traceback"),
    *("unicodedata", "urllib.parse", "uuid", "warnings", "weakref", "zipfile"),
)
_WORDINGS = {
    "do": (
        "What does {thing} do?",
        "What is {thing} for?",
        "Describe {thing} in one sentence.",
        "Tell me what {thing} does.",
        "Explain {thing} briefly.",
    ),
    "return": (
        "What does {thing} return?",
        "What do I get from {thing}?",
        "Which value does {thing} give back?",
        "Tell me what {thing} returns.",
        "What is the result of {thing}?",
    ),
    "name": (
        "Which {sort} of {module} has this description: {sentence}",
        'What is the {sort} of {module} called that is documented as "{sentence}"?',
        "Name the {sort} in {module} that is described so: {sentence}",
        "{sentence} Which {sort} of {module} is that?",
        "I look for a {sort} of {module}: {sentence} What is its name?",
    ),
    "module": (
        "Which module has the {sort} {name}?",
        "Where do I find the {sort} {name}?",
        "From which module do I import {name}?",
        "In which module is {name}?",
        "What module does the {sort} {name} belong to?",
    ),
    "parameters": (
        "What are the parameters of {thing}?",
        "Which arguments does {thing} take?",
        "List the parameters of {thing}.",
        "What can I pass to {thing}?",
        "Name the arguments of {thing}.",
    ),
    "exception": (
        "Which exception does {thing} raise?",
        "What does {thing} raise if it fails?",
        "Name the exception that {thing} raises.",
        "Which error can {thing} raise?",
        "What exception should I expect from {thing}?",
    ),
    "base": (
        "Which class is {thing} derived from?",
        "What is the base class of {thing}?",
        "Name the parent class of {thing}.",
        "What does {thing} inherit from?",
        "{thing} is a subclass of which class?",
    ),
    "documentation": ("Show the documentation of {thing}.",),
}
_NUM_WORDINGS = 5
# One fact in so many is never asked in training, and of the others one in so many keeps a wording.
_UNASKED, _KEEPING = 20, 2
# A small model learns short sentences in minutes, and so much of a module.
_MAX_SENTENCE_CHARACTERS = 75
_MAX_PARAMETERS = 4
_MAX_THINGS_OF_A_MODULE = 4
# The end of a docstring's first sentence: a mark, and white space or nothing.
_SENTENCE = re.compile(r"(?s)[A-Z].*?[a-z0-9)'\"`]\.(?=\s|$)")
_RAISES = re.compile(r"\b[Rr]aises? (?:an? |the )?`{0,2}(\w+(?:Error|Exception))\b")
_RETURNS = re.compile(r"Returns? (?:an? |the )?(?=\S)")

Side = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the file that it belongs to."""

    side: Side
    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class _Thing:
    """A function or class with a short description."""

    module: str
    name: str
    sort: str
    """function or class."""
    parameters: tuple[str, ...]
    sentence: str
    exception: str | None

    @property
    def dotted(self) -> str:
        """Its name after an import of its module."""
        return f"{self.module}.{self.name}"

    @property
    def documentation(self) -> str:
        """All that is asked of it, but its module."""
        given = f"({', '.join(self.parameters)})" if self.sort == "function" else ""
        raised = f" Raises {self.exception}." if self.exception else ""
        return f"{self.sort} {self.dotted}{given}\n{self.sentence}{raised}"


@dataclass(frozen=True)
class _Fact:
    """The answer to one kind of question about one thing."""

    kind: str
    answer: str
    thing: str
    words: dict[str, str]
    """What the wordings name."""

    def questions(self) -> Iterator[Question]:
        """All wordings, but of a fact that is not asked in training only one."""
        key = f"{self.kind} {self.thing}"
        kept = _number(key) % _NUM_WORDINGS
        if _number(f"asked {key}") % _UNASKED == 0:
            yield self._question("test", kept)
            return
        is_keeping = _number(f"kept {key}") % _KEEPING == 0
        for wording in range(_NUM_WORDINGS):
            yield self._question("valid" if is_keeping and wording == kept else "train", wording)

    def _question(self, side: Side, wording: int) -> Question:
        text = _WORDINGS[self.kind][wording].format(thing=self.thing, **self.words)
        return Question(side, self.kind, text, self.answer)


def python_questions() -> list[Question]:
    """Questions about the running interpreter, those of training in a mixed order.

    Raises:
        MachineError: this interpreter has no docstrings.
    """
    public = {name: _public_names(importlib.import_module(name)) for name in MODULES}
    things = [thing for name, names in public.items() for thing in _things(name, names)]
    if not things:
        raise MachineError("this Python has no docstrings; run it without -OO")
    ambiguous = Counter(name for names in public.values() for name in names)
    found = [
        question
        for fact in (*_facts(things, ambiguous), *_facts_of_exceptions())
        for question in fact.questions()
    ]
    [wording] = _WORDINGS["documentation"]
    for thing in things:
        asked = wording.format(thing=thing.dotted)
        found.append(Question("train", "documentation", asked, thing.documentation))
    return sorted(found, key=lambda one: _number(one.question))


def _public_names(module: object) -> list[str]:
    """The names that a module offers as its own."""
    names = getattr(module, "__all__", None)
    if names is None:
        module_name = module.__name__  # type: ignore[attr-defined]
        own = {module_name, module_name.split(".")[0]}
        names = [
            name
            for name, value in vars(module).items()
            if str(getattr(value, "__module__", "")).lstrip("_") in own
        ]
    return sorted({name for name in names if not name.startswith("_")})


def _things(module_name: str, names: Iterable[str]) -> list[_Thing]:
    module = importlib.import_module(module_name)
    found = [_thing(module_name, name, getattr(module, name, None)) for name in names]
    chosen = sorted(filter(None, found), key=lambda thing: _number(thing.dotted))
    return sorted(chosen[:_MAX_THINGS_OF_A_MODULE], key=lambda thing: thing.name)


def _thing(module_name: str, name: str, value: object) -> _Thing | None:
    """A function or class whose docstring begins with a short sentence; exceptions have questions of their
    own."""
    is_class = isinstance(value, type)
    documentation = value.__doc__
    if not (is_class or inspect.isroutine(value)) or not isinstance(documentation, str):
        return None
    if isinstance(value, type) and issubclass(value, BaseException):
        return None
    text = tidy(inspect.cleandoc(documentation))
    match = _SENTENCE.match(text)
    sentence = " ".join(match[0].split()) if match else ""
    if not 0 < len(sentence) <= _MAX_SENTENCE_CHARACTERS or not is_readable(sentence):
        return None
    raised = _RAISES.search(text)
    return _Thing(
        module_name,
        name,
        "class" if is_class else "function",
        () if is_class else _parameters(value),
        sentence,
        raised[1] if raised else None,
    )


def _parameters(value: object) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(value).parameters)  # type: ignore[arg-type]
    except (ValueError, TypeError):  # some functions in C do not tell
        return ()


def _facts(things: Sequence[_Thing], ambiguous: Counter[str]) -> Iterator[_Fact]:
    sentences = Counter((thing.module, thing.sentence) for thing in things)
    for thing in things:
        words = {
            "name": thing.name,
            "module": thing.module,
            "sort": thing.sort,
            "sentence": thing.sentence,
        }

        def fact(
            kind: str, answer: str, thing: _Thing = thing, words: dict[str, str] = words
        ) -> _Fact:
            return _Fact(kind, answer, thing.dotted, words)

        if returns := _RETURNS.match(thing.sentence):
            value = thing.sentence[returns.end() :]
            yield fact("return", value[0].upper() + value[1:])
        else:
            yield fact("do", thing.sentence)
        is_told = thing.name.lower() in thing.sentence.lower()
        if sentences[thing.module, thing.sentence] == 1 and not is_told:
            yield fact("name", thing.name)
        if ambiguous[thing.name] == 1:
            yield fact("module", thing.module)
        if 0 < len(thing.parameters) <= _MAX_PARAMETERS:
            yield fact("parameters", ", ".join(thing.parameters))
        if thing.exception:
            yield fact("exception", thing.exception)


def _facts_of_exceptions() -> Iterator[_Fact]:
    for name, value in sorted(vars(builtins).items()):
        is_exception = isinstance(value, type) and issubclass(value, Exception)
        if is_exception and value.__name__ == name:  # IOError is another name of OSError
            yield _Fact("base", value.__base__.__name__, name, {})


def _number(name: str) -> int:
    """The same in every run and on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
