"""The docstrings of the standard library, one by one: what small labelled data sets are made of.

    source files ──> docstrings: module, definition, signature, text ──> no two alike

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
# Words in a row by which a text is recognised again; a phrase of three is common to unrelated texts.
_SHINGLE = 4
# The end of a sentence: a mark, then white space and what may begin one; not "e.g. this".
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)'\"`][.!?])\s+(?=[A-Z`'\"*(])")


@dataclass(frozen=True)
class Docstring:
    """What a source file says of a class, a function or of itself."""

    module: str
    """Dotted name of the module, such as asyncio.queues."""
    name: str
    """Dotted name of the definition within it; empty for the module itself."""
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
        """The class or function at the top of the file that it belongs to."""
        return self.name.split(".")[0]


class SeenTexts:
    """Remembers runs of words that went by, to recognise a text that came before in other clothes."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, ...]] = set()

    def is_new(self, text: str) -> bool:
        """Whether at least half of the runs of words of `text` were never seen; if so, remember them."""
        words = _WORD.findall(text.lower())
        last = max(1, len(words) - _SHINGLE + 1)
        runs = {tuple(words[start : start + _SHINGLE]) for start in range(last)}
        if 2 * len(runs & self._seen) > len(runs):
            return False
        self._seen |= runs
        return True


def library_docstrings() -> list[Docstring]:
    """The docstrings of the interpreter that runs this, without near-duplicates, sorted by module.

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
    """The readable docstrings of a source file, in source order; none where it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that a later Python will refuse
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
    return [one for one in found if one.endswith((".", "!", "?")) and len(one.split()) >= 4]


def _parameters(node: ast.AST) -> tuple[str, ...]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ()
    given = node.args
    variable = [one for one in (given.vararg, given.kwarg) if one is not None]
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs, *variable)]
    return tuple(name for name in names if name not in ("self", "cls", "mcls", "metacls"))
