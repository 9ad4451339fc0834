"""The docstrings of the standard library, from which the small labelled data sets are made.

    source files ──> docstrings: module, definition, parameters, text ──> without near-duplicates

The same interpreter gives the same docstrings in the same order. Knows nothing of labels.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import decode_source
from pathlib import Path

from full_stack_transformer.document_sources.documents import (
    is_readable,
    tidy,
    without_legal_paragraphs,
)
from full_stack_transformer.document_sources.python_sources import definitions, source_files
from full_stack_transformer.errors import MachineError

_WORD = re.compile(r"\w+")
# Consecutive words that identify a text; unrelated texts share phrases of three words.
_SHINGLE = 4
# The end of a sentence: a mark, white space, and a possible start of a sentence; not "e.g. this".
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)'\"`][.!?])\s+(?=[A-Z`'\"*(])")


@dataclass(frozen=True)
class Docstring:
    """The docstring of a module, class or function."""

    module: str
    """Dotted name of the module, such as asyncio.queues."""
    name: str
    """Dotted name of the definition in the module; empty for the module itself."""
    kind: str
    """module, class or function."""
    parameters: tuple[str, ...]
    """Names of a function's parameters, without self."""
    text: str

    @property
    def package(self) -> str:
        """The first part of the module's name, without the underscore of an implementation."""
        return self.module.split(".")[0].removeprefix("_py").lstrip("_")

    @property
    def outermost(self) -> str:
        """The outermost class or function that contains it."""
        return self.name.split(".")[0]


class SeenTexts:
    """Remembers runs of words, to recognise a near-duplicate."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, ...]] = set()

    def is_new(self, text: str) -> bool:
        """Whether at least half of the runs of words of `text` are new; remembers them if so."""
        words = _WORD.findall(text.lower())
        last = max(1, len(words) - _SHINGLE + 1)
        runs = {tuple(words[start : start + _SHINGLE]) for start in range(last)}
        if 2 * len(runs & self._seen) > len(runs):
            return False
        self._seen |= runs
        return True


def library_docstrings() -> list[Docstring]:
    """The docstrings of the running interpreter, without near-duplicates, sorted by module.

    Raises:
        MachineError: this interpreter was installed without its sources.
    """
    seen = SeenTexts()
    found = [
        docstring
        for name, path in source_files(Path(sysconfig.get_path("stdlib")))
        for docstring in docstrings_of(name, path.read_bytes())
        if seen.is_new(docstring.text)
    ]
    if not found:
        raise MachineError(
            f"no docstrings found in {sysconfig.get_path('stdlib')}; run the command with a Python "
            "that has its standard library as source files"
        )
    return found


def docstrings_of(module: str, source: bytes) -> Iterator[Docstring]:
    """The readable docstrings of a source file, in source order; none if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes
            tree = ast.parse(decode_source(source))
    except (SyntaxError, ValueError):
        return
    for name, node in (("", tree), *definitions(tree)):
        text = without_legal_paragraphs(tidy(ast.get_docstring(node) or ""))
        if not is_readable(text):
            continue
        kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
        yield Docstring(module, name, kind, _parameters(node), text)


def sentences(text: str) -> list[str]:
    """The sentences of the paragraphs of a text that are prose; lists, examples and code are left out."""
    found: list[str] = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        if any(line.startswith((" ", ">>>", "-", "*")) for line in lines):
            continue
        found += _SENTENCE_END.split(" ".join(paragraph.split()))
    return [text for text in found if text.endswith((".", "!", "?")) and len(text.split()) >= 4]


def _parameters(node: ast.AST) -> tuple[str, ...]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ()
    given = node.args
    variable = [argument for argument in (given.vararg, given.kwarg) if argument is not None]
    arguments = (*given.posonlyargs, *given.args, *given.kwonlyargs, *variable)
    names = [argument.arg for argument in arguments]
    return tuple(name for name in names if name not in ("self", "cls", "mcls", "metacls"))
