"""Docstrings and prose comments of Python source files, read without importing or running them.

    source files ──source_sections──> sections of documents: docstrings and comments
                 ──library_docstrings──> docstrings one by one, without near-duplicates

The same interpreter gives the same texts in the same order. Knows nothing of labels.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import decode_source
from pathlib import Path

from full_stack_transformer.document_sources.documents import (
    Kind,
    Section,
    SeenLines,
    is_prose,
    is_readable,
    tidy,
    without_legal_paragraphs,
)
from full_stack_transformer.errors import MachineError

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

_SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data")
)
# Generated tables, 240 files; the other files of the folder are read.
_CHARACTER_TABLE = re.compile(r"encodings/(?!__init__|aliases|idna|punycode|utf_8_sig).*")
_MACHINE_FILE = re.compile(r"config-[^/]*/.*|_sysconfigdata.*|(site|user)customize\.py")
_RECEIVER = re.compile(r"^(self|cls|_cls|mcls|mcs|metacls|meta|type)(, |$)(/(, |$))?")
_COMMENT_LINE = re.compile(r"\s*#+:?\s?(.*?)[\s#]*")
# A longer signature is a table of defaults.
_MAX_SIGNATURE_LENGTH = 120
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


@dataclass(frozen=True)
class _Comment:
    """Consecutive comment lines."""

    first_line: int
    last_line: int
    text: str


@dataclass
class _Entry:
    """The texts about a definition, or about the module if `node` is the module."""

    name: str
    node: ast.Module | Definition
    first_line: int
    last_line: int
    texts: list[str] = field(default_factory=list)


def source_files(root: Path) -> list[tuple[str, Path]]:
    """Names and paths of the modules below `root` that are worth reading, sorted by name."""
    found: list[tuple[str, Path]] = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        name = relative.as_posix()
        is_generated = _CHARACTER_TABLE.fullmatch(name) or _MACHINE_FILE.fullmatch(name)
        is_skipped = is_generated or _SKIPPED_FOLDERS.intersection(relative.parts)
        if not is_skipped and path.is_file():  # distributions leave links to nowhere
            parts = relative.with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return sorted(found)


def source_sections(source: bytes, seen: SeenLines) -> list[Section]:
    """The texts of a source file, a section for the module and for each class and function.

    Empty if this interpreter cannot parse the file.
    """
    parsed = _parsed(source)
    if parsed is None:
        return []
    text, module = parsed
    lines = text.split("\n")
    entries = [_Entry("", module, 0, len(lines) + 1), *_entries(module)]
    for entry in entries:
        _add_docstring(entry, seen)
    for comment in _comments(lines, _lines_in_strings(module)):
        _add_comment(comment, entries, seen)
    return list(_sections(entries))


def _parsed(source: bytes) -> tuple[str, ast.Module] | None:
    """The text of a source file and its syntax tree; None if this interpreter cannot parse it."""
    try:
        text = decode_source(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes
            return text, ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Classes and functions below `node` with their dotted names in source order, those inside `if` and
    `try` too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + child.name, child
            yield from definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from definitions(child, prefix)


def _entries(module: ast.Module) -> Iterator[_Entry]:
    for name, node in definitions(module):
        first_line = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        yield _Entry(name, node, first_line, node.end_lineno or node.lineno)


def _add_docstring(entry: _Entry, seen: SeenLines) -> None:
    text = without_legal_paragraphs(tidy(ast.get_docstring(entry.node) or ""))
    if is_readable(text) and seen.is_new(text):
        entry.texts.append(text)


def _add_comment(comment: _Comment, entries: list[_Entry], seen: SeenLines) -> None:
    """Add a comment to the definition on the next line, or else to the definition around it."""
    text = without_legal_paragraphs(tidy(comment.text))
    if not is_prose(text) or not seen.is_new(text):
        return
    below = [entry for entry in entries if entry.first_line == comment.last_line + 1]
    around = [
        entry for entry in entries if entry.first_line <= comment.first_line <= entry.last_line
    ]
    # Inner definitions come after outer ones.
    (below or around)[-1].texts.append(text)


def _comments(lines: list[str], lines_in_strings: set[int]) -> Iterator[_Comment]:
    texts: list[str] = []
    for line_number, line in enumerate([*lines, ""], 1):
        match = None if line_number in lines_in_strings else _COMMENT_LINE.fullmatch(line)
        if match:
            texts.append(match[1])
        elif texts:
            yield _Comment(line_number - len(texts), line_number - 1, "\n".join(texts))
            texts = []


def _lines_in_strings(module: ast.Module) -> set[int]:
    """Numbers of the lines inside a string, where # starts no comment."""
    inside: set[int] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno != node.lineno:
            inside.update(range(node.lineno + 1, (node.end_lineno or node.lineno) + 1))
    return inside


def _sections(entries: list[_Entry]) -> Iterator[Section]:
    """A section for the module, and one for each outermost definition and its inner ones."""
    module, *definitions = entries
    if module.texts:
        yield Section("module", "", tuple(module.texts))
    groups: list[list[_Entry]] = []
    for entry in definitions:
        if "." in entry.name and groups:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    for outer, *inner in groups:
        blocks = tuple(_block(entry) for entry in (outer, *inner) if entry.texts)
        if blocks:
            kind: Kind = "class" if isinstance(outer.node, ast.ClassDef) else "function"
            yield Section(kind, outer.name, blocks)


def _block(entry: _Entry) -> str:
    """The signature of a definition and its texts, unless the docstring starts with a signature."""
    text = "\n\n".join(entry.texts)
    if text.startswith(f"{entry.name.rpartition('.')[2]}("):
        return text
    return f"{_signature(entry)}\n{text}"


def _signature(entry: _Entry) -> str:
    node = entry.node
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {entry.name}({bases})" if bases else f"class {entry.name}"
    arguments = ast.unparse(node.args)
    if "." in entry.name:
        arguments = _RECEIVER.sub("", arguments, count=1)
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = f"{entry.name}({arguments}){returned}"
    return signature if len(signature) <= _MAX_SIGNATURE_LENGTH else f"{entry.name}(...)"


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
    parsed = _parsed(source)
    if parsed is None:
        return
    _, tree = parsed
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
