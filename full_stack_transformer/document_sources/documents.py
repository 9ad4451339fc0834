"""Texts -> documents: tidying text, finding prose among code and licences, joining small texts into pages.

A page is a class with its methods, or neighbouring functions. A language model learns more from a page than
from many one-line documents. The thresholds are rules of thumb, chosen on the standard library. Knows nothing
of where the text comes from.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["module", "class", "function", "topic"]

# One form of each quotation mark and dash: a small vocabulary has no room for more.
_TYPOGRAPHY = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "\ufeff": None,
    }
)
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_RULER = re.compile(r"\W*?([-=*#~_+^|<>])(?:\s?\1){3,}\W*|[-=*#~_+^|<> ]{4,}|\s*[-+*#|]\s*")
_RULER_INSIDE_LINE = re.compile(r"\s?([-=*#~_])\1{5,}\s?")
_TABLE_ROW = re.compile(r"\s*(\|.*\||\+[-=+]{3,}.*)")
_MEMORY_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]{4,}")
# Longer words are encoded data, not language; the longest URLs have about 90 characters.
_MAX_WORD_LENGTH = 100
# The most common function words: a quarter to a half of English text, almost none of code.
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a about after all also an and any are as at be because been before but by can cannot do "
        "does each for from had has have he her his how i if in into is it its may more must no "
        "not of on one only or other our should so some such than that the their them then there "
        "these they this to up used was we were what when where which while who will with would "
        "you your",
    )
)
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_LEGAL = re.compile(
    r"copyright\s*(\(c\)|©|\d|by\b|,|:)|\(c\)\s*copyright|all rights reserved|hereby granted|"
    r"permission to use|warrant(y|ies)\b|redistribut|licensed (to|under)|contributor agreement|"
    r"by obtaining, using|terms and conditions|in no event shall|written prior permission",
    re.IGNORECASE,
)
_CODE_LINE = re.compile(
    r"\s*(>>>|@\w|(def|class|import|from|return|raise|print|assert|del|elif|else|try|except)\b.*[:()=.\w]$"
    r"|(if|for|while|with)\b.*:$|[\w.\[\]'\", ]+\s?[-+*/|&]?=\s?\S|[\w.]+\(.*\)[;:]?$|[\w.]+\(.*,$"
    r"|['\"(\[{].*['\")\]},]$)"
)
_MIN_WORDS_TO_JUDGE = 25
_MIN_KNOWN_LINE_LENGTH = 20
_PLURALS = {"class": "classes", "function": "functions"}

# Pages are filled up to the first and cut at the second: about 1,000 and 2,000 tokens.
_FULL_PAGE_CHARACTERS = 4_000
_MAX_PAGE_CHARACTERS = 8_000
# Shorter texts are not documents.
_MIN_PAGE_CHARACTERS = 200


@dataclass(frozen=True)
class Document:
    """A text, the name of its file or topic, and its split."""

    text: str
    source: str
    is_for_validation: bool


def falls_to_validation(source: str, permille: int) -> bool:
    """Whether documents of `source` go to validation; the same on every machine and in every run.

    The hash is over the name of the source and not the text, so that similar pages of a file are never in
    different splits.
    """
    digest = hashlib.sha256(source.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < permille


def tidy(text: str) -> str:
    """`text` with plain punctuation, without rulers, grid tables, memory addresses and long codes.

    All line ends become newlines, with at most one empty line between two lines. The result can always be
    encoded as UTF-8.
    """
    text = text.encode("utf-8", "replace").decode("utf-8").translate(_TYPOGRAPHY)
    text = _MEMORY_ADDRESS.sub("", text)
    kept: list[str] = []
    for raw_line in text.splitlines():
        line = _CONTROL_CHARACTERS.sub("", raw_line).expandtabs().rstrip()
        if _is_noise(line) or (not line and (not kept or not kept[-1])):
            continue
        kept.append(_RULER_INSIDE_LINE.sub("", line).rstrip())
    return "\n".join(kept).rstrip("\n")


def _is_noise(line: str) -> bool:
    if not line:
        return False
    is_drawing = _RULER.fullmatch(line) or _TABLE_ROW.fullmatch(line)
    return bool(is_drawing) or max(map(len, line.split()), default=0) > _MAX_WORD_LENGTH


def share_of_function_words(text: str) -> float:
    """Share of the words of `text` that are common English function words, 0 to 1."""
    words = _WORD.findall(text.lower())
    return sum(word in _FUNCTION_WORDS for word in words) / max(len(words), 1)


def without_legal_paragraphs(text: str) -> str:
    """`text` without the paragraphs about licence or copyright."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(part for part in paragraphs if not _LEGAL.search(part)).strip("\n")


def is_readable(text: str) -> bool:
    """Whether a docstring consists of words; short ones are accepted in doubt."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    words = _WORD.findall(text)
    if len(words) < 3 or letters < 0.6 * len(text):
        return False
    return len(words) < _MIN_WORDS_TO_JUDGE or share_of_function_words(text) > 0.12


def is_prose(text: str) -> bool:
    """Whether a comment is a few sentences of English; commented-out code and lists are not."""
    lines = [line for line in text.splitlines() if line.strip()]
    num_code_lines = sum(bool(_CODE_LINE.fullmatch(line)) for line in lines)
    num_words = len(_WORD.findall(text))
    return (
        len(lines) >= 3
        and num_words >= 15
        and num_code_lines <= 0.3 * len(lines)
        and share_of_function_words(text) > 0.2
    )


class SeenLines:
    """Remembers lines, to recognise a repeated text."""

    def __init__(self) -> None:
        self._lines: set[str] = set()

    def is_new(self, text: str) -> bool:
        """Whether at least half of `text` is new; remembers it if so."""
        lines = [" ".join(line.split()) for line in text.splitlines()]
        lines = [line for line in lines if len(line) >= _MIN_KNOWN_LINE_LENGTH] or [text.strip()]
        known = sum(len(line) for line in lines if line in self._lines)
        if 2 * known > sum(map(len, lines)):
            return False
        self._lines.update(lines)
        return True


@dataclass(frozen=True)
class Section:
    """All texts about a module, or about a class or function of it."""

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
        for index, blocks in enumerate(_cut([block for part in group for block in part.blocks])):
            page = "\n\n".join([*_heading(module_name, group, index), *blocks])
            if len(page) >= _MIN_PAGE_CHARACTERS:
                yield page


def _group(sections: list[Section]) -> Iterator[list[Section]]:
    """Neighbouring sections that fill a page together; a section that fills a page stays alone."""
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
    """The blocks of a group in runs of about equal length, at most a page each."""
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


def _heading(module_name: str, group: list[Section], index: int) -> list[str]:
    """The first line of a page; none for topics, whose parts have their own."""
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
    return [f"{heading}, continued" if index else heading]
