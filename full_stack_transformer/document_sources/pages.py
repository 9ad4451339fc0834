"""Many small texts about one module, put together into pages of a few thousand characters.

A page is what a reader would open: a class with its methods, or neighbouring functions. A language
model learns more from a page than from as many one-line documents. Knows nothing of Python.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["module", "class", "function", "topic"]
_PLURALS = {"class": "classes", "function": "functions"}

# Pages are filled up to the first figure and cut at the second: about 1,000 and 2,000 tokens.
_FULL_PAGE_CHARACTERS = 4_000
_MAX_PAGE_CHARACTERS = 8_000
# What is shorter says too little to be a document.
_MIN_PAGE_CHARACTERS = 200


@dataclass(frozen=True)
class Section:
    """All texts about a module itself, or about one of its classes or functions."""

    kind: Kind
    name: str
    blocks: tuple[str, ...]

    @property
    def size(self) -> int:
        """Characters."""
        return sum(len(block) + 2 for block in self.blocks)


def make_pages(module_name: str, sections: list[Section]) -> Iterator[str]:
    """Pages about a module, in the order of its sections."""
    for group in _group(sections):
        for number, blocks in enumerate(_cut([block for part in group for block in part.blocks])):
            page = "\n\n".join([*_heading(module_name, group, number), *blocks])
            if len(page) >= _MIN_PAGE_CHARACTERS:
                yield page


def _group(sections: list[Section]) -> Iterator[list[Section]]:
    """Neighbouring sections that fill a page together; what fills one alone stays alone."""
    group: list[Section] = []
    size = 0
    for section in sections:
        if group and size + section.size > _FULL_PAGE_CHARACTERS:
            yield group
            group, size = [], 0
        group.append(section)
        size += section.size
    if group:
        yield group


def _cut(blocks: list[str]) -> Iterator[list[str]]:
    """`blocks` of one group in runs that are about equally long and no longer than a page may be."""
    total = sum(map(len, blocks))
    num_pages = -(-total // _MAX_PAGE_CHARACTERS)
    page: list[str] = []
    size = 0
    for block in blocks:
        page.append(block)
        size += len(block)
        if size * num_pages >= total:
            yield page
            page, size = [], 0
    if page:
        yield page


def _heading(module_name: str, group: list[Section], number: int) -> list[str]:
    """The first line of a page; none for topics, whose parts bring their own."""
    kinds = {section.kind for section in group}
    if "topic" in kinds:
        return []
    if "module" in kinds:
        heading = f"The module {module_name}"
    elif len(group) == 1:
        heading = f"The {group[0].kind} {module_name}.{group[0].name}"
    else:
        contents = " and ".join(_PLURALS[kind] for kind in sorted(kinds))
        heading = f"{contents.capitalize()} of the module {module_name}"
    return [f"{heading}, continued" if number else heading]
