"""The running interpreter's own documentation as English technical prose; needs no network.

    topics of pydoc  ┐
    standard library ├─> sections -> pages -> documents, in a fixed order
    modules in C     ┘

The same interpreter gives the same documents, in whatever directory, locale or process. Modules in C are
imported for their docstrings, so this knows which of them do nothing when imported. Knows nothing of files
and delimiters.
"""

import importlib
import inspect
import itertools
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from full_stack_transformer.document_sources.documents import (
    Document,
    Kind,
    Section,
    SeenLines,
    falls_to_validation,
    is_readable,
    make_pages,
    tidy,
)
from full_stack_transformer.document_sources.python_sources import source_files, source_sections
from full_stack_transformer.errors import MachineError

# Left out: modules for tests, and those that use the terminal, the sound card or a display library.
_SKIPPED_MODULE = re.compile(r"_?xx.*|_test.*|.*_test|readline|_?curses.*|_tkinter|ossaudiodev|nis")
_RECEIVER = re.compile(r"^\(\$\w+(, )?(/(, )?)?")
_MAX_SIGNATURE_LENGTH = 120
# 4.4 % of the bytes of CPython 3.11: modules are of unequal length.
VALIDATION_PERMILLE = 35


def python_documents() -> Iterator[Document]:
    """Documents of the running interpreter, sorted by source.

    Raises:
        MachineError: this interpreter was installed without its documentation.
    """
    seen = SeenLines()
    found = itertools.chain(_topics(seen), _standard_library(seen), _modules_in_c(seen))
    documents = [document for document in found if is_readable(document.text)]
    if not documents:
        raise MachineError(
            f"no documentation found in {sysconfig.get_path('stdlib')}; "
            "run the command with a Python that has its standard library as source files"
        )
    yield from documents


def _topics(seen: SeenLines) -> Iterator[Document]:
    """The language reference that `help()` shows.

    The longest topics come first: many short ones are sections of a long one, and would be in both splits.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        parts = [part for part in _parts(text) if is_readable(part) and seen.is_new(part)]
        for page in make_pages(name, [Section("topic", name, (part,)) for part in parts]):
            yield _document(page, f"topic {name}")


def _parts(text: str) -> Iterator[str]:
    """The parts of a topic, each with its heading, which is the line over a line of * = - or ~."""
    lines = text.split("\n")
    starts = [
        index
        for index, (line, ruler) in enumerate(itertools.pairwise(lines))
        if line and ruler and not ruler.strip("*=-~") and len(ruler) == len(line)
    ]
    for start, end in zip([0, *starts], [*starts, len(lines)], strict=True):
        if part := tidy("\n".join(lines[start:end])):
            yield part


def _standard_library(seen: SeenLines) -> Iterator[Document]:
    for name, path in source_files(Path(sysconfig.get_path("stdlib"))):
        for page in make_pages(name, source_sections(path.read_bytes(), seen)):
            yield _document(page, _subject(name))


def _modules_in_c(seen: SeenLines) -> Iterator[Document]:
    for name in builtin_module_names():
        for page in make_pages(name, builtin_sections(name, seen)):
            yield _document(page, _subject(name))


def _subject(module_name: str) -> str:
    """The module that `module_name` implements: _pydecimal and _decimal both describe decimal.

    Documents about the same thing must be in the same split.
    """
    return module_name.removeprefix("_py").lstrip("_") or module_name


def _document(page: str, source: str) -> Document:
    return Document(page, source, falls_to_validation(source, VALIDATION_PERMILLE))


def builtin_module_names() -> list[str]:
    """Names of the modules in C that can be imported without side effects, sorted."""
    names = set(sys.builtin_module_names)
    folder = sysconfig.get_config_var("DESTSHARED")
    if folder and Path(folder).is_dir():
        names.update(
            path.name.split(".")[0]
            for path in Path(folder).iterdir()
            if path.name.endswith(tuple(EXTENSION_SUFFIXES))
        )
    return sorted(name for name in names if not _SKIPPED_MODULE.fullmatch(name))


def builtin_sections(name: str, seen: SeenLines) -> list[Section]:
    """The texts of a module in C; empty if it cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules
        try:
            module = importlib.import_module(name)
        except ImportError:
            return []
    return list(_sections(module, seen))


def _sections(module: types.ModuleType, seen: SeenLines) -> Iterator[Section]:
    if text := _text(module, seen):
        yield Section("module", "", (text,))
    for name, member in sorted(vars(module).items()):
        if not _is_in_c(member):
            continue
        kind: Kind = "class" if isinstance(member, type) else "function"
        blocks = tuple(_blocks(name, member, seen))
        if blocks:
            yield Section(kind, name, blocks)


def _is_in_c(member: object) -> bool:
    """Whether `member` is a class or function in C; not a value, and not added to builtins by `site`."""
    if isinstance(member, type):
        return not any(isinstance(method, types.FunctionType) for method in vars(member).values())
    return inspect.isbuiltin(member)


def _blocks(name: str, member: object, seen: SeenLines) -> Iterator[str]:
    if text := _text(member, seen):
        yield _block(f"class {name}" if isinstance(member, type) else name, member, text)
    if isinstance(member, type):
        for method_name, method in sorted(vars(member).items()):
            if isinstance(method, staticmethod):
                method = method.__func__
            # Wrappers such as __add__ all have the same text.
            is_wrapper = isinstance(method, types.WrapperDescriptorType)
            if inspect.isroutine(method) and not is_wrapper and (text := _text(method, seen)):
                yield _block(f"{name}.{method_name}", method, text)


def _block(name: str, member: object, text: str) -> str:
    signature = getattr(member, "__text_signature__", None)
    if text.startswith(f"{name.rpartition('.')[2]}("):
        return text
    if not signature:
        return text if "(" in text.partition("\n")[0] else f"{name}\n{text}"
    signature = _RECEIVER.sub("(", signature)
    if len(signature) > _MAX_SIGNATURE_LENGTH:
        signature = "(...)"
    return f"{name}{signature}\n{text}"


def _text(member: object, seen: SeenLines) -> str:
    documentation = getattr(member, "__doc__", None)
    text = tidy(inspect.cleandoc(documentation)) if isinstance(documentation, str) else ""
    return text if is_readable(text) and seen.is_new(text) else ""
