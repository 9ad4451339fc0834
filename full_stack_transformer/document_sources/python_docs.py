"""The running interpreter's own documentation as English technical prose; needs no network.

    topics of pydoc  ┐
    standard library ├─> sections -> pages -> documents, in a fixed order
    modules in C     ┘

The same interpreter gives the same documents, in whatever directory, locale or process. Knows
nothing of files and delimiters.
"""

import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from full_stack_transformer.document_sources.documents import (
    Document,
    falls_to_validation,
    tidy,
)
from full_stack_transformer.document_sources.pages import Section, make_pages
from full_stack_transformer.document_sources.prose import SeenLines, is_readable
from full_stack_transformer.document_sources.python_builtins import (
    builtin_module_names,
    builtin_sections,
)
from full_stack_transformer.document_sources.python_sources import source_files, source_sections
from full_stack_transformer.errors import MachineError

# 4.4 % of the bytes of CPython 3.11: modules are of unequal length.
VALIDATION_PERMILLE = 35


def python_documents() -> Iterator[Document]:
    """Documents of the interpreter that runs this, sorted by where they come from.

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

    The longest topics come first: many short ones are a section of a long one, and would be on
    both sides of the split.
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
        number
        for number, (line, ruler) in enumerate(itertools.pairwise(lines))
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

    What describes the same thing must fall on the same side of the split.
    """
    return module_name.removeprefix("_py").lstrip("_") or module_name


def _document(page: str, source: str) -> Document:
    return Document(page, source, falls_to_validation(source, VALIDATION_PERMILLE))
