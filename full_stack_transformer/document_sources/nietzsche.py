"""Aphorisms of Nietzsche: public-domain translations, downloaded from Project Gutenberg.

    book ──download──> plain text ──strip header and footer──> paragraphs ──> one document per aphorism

Not by pooch: Project Gutenberg rewrites its files, so their checksums are not known, and size and time of a
download are limited. Knows the form of its plain texts; knows nothing of files and delimiters.
"""

import logging
import re
import time
from collections.abc import Iterator

import httpx

from full_stack_transformer.document_sources.documents import (
    Document,
    falls_to_validation,
    share_of_function_words,
    tidy,
)
from full_stack_transformer.errors import MachineError

logger = logging.getLogger(__name__)

GUTENBERG_URL = "https://www.gutenberg.org"
# Ids of https://www.gutenberg.org/ebooks/author/779; one translation of each work, because two would put the
# same aphorism into both splits.
BOOKS = {
    1998: "Thus Spake Zarathustra",
    4363: "Beyond Good and Evil",
    19322: "The Antichrist",
    37841: "Human, All-Too-Human, part 2",
    39955: "The Dawn of Day",
    51356: "The Birth of Tragedy",
    51935: "Human, All-Too-Human, part 1",
    52190: "Ecce Homo",
    52263: "The Twilight of the Idols",
    52319: "The Genealogy of Morals",
    52881: "The Joyful Wisdom",
}
VALIDATION_PERMILLE = 50

# The longest book has 0.8 MB.
_MAX_BOOK_BYTES = 8_000_000
_MAX_BOOK_SECONDS = 120.0
_TIMEOUT_SECONDS = 20.0

_START = re.compile(
    r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^*]*\*\*\*", re.MULTILINE
)
_END = re.compile(
    r"^(?:\*\*\* ?END OF TH(?:E|IS) PROJECT|End of (?:the )?Project Gutenberg)", re.MULTILINE
)
_NUMBER_ALONE = re.compile(r"(?:§ ?)?(\d{1,3})[.:]?")
_NUMBER_BEFORE_TEXT = re.compile(r"(?:§ ?)?(\d{1,3})\.(?:\s*--|\s)\s*(?=\S)")
_ROMAN_NUMERAL = re.compile(r"[IVXLC]+\.?\s+(?=[A-Z])")
_FOOTNOTE_MARK = re.compile(r"\s?\[(?:\d{1,3}|[A-Z*])\]")
_JUNK = re.compile(
    r"\[(?:\d{1,3}|[A-Z*]|Footnote|Illustration|Transcriber)|Footnote|Transcriber|Produced by|"
    r"E-?text prepared|This eBook|\W*THE END\W*$",
    re.IGNORECASE,
)
_CONTENTS = re.compile(r"(?:TABLE OF )?CONTENTS\b", re.IGNORECASE)
_BY_OTHERS = re.compile(r"\b(?:INTRODUCTION|INTRODUCTORY|TRANSLATOR|EDITOR)")
_BACK_MATTER = re.compile(r"(?:APPENDIX|INDEX|FOOTNOTES|NOTES ON)\b")
_EMPHASIS = re.compile(r"[_=]")
_MIN_WORDS = 6
# Numbers that may be missing because of misprints; a larger gap is not an aphorism's number.
_MAX_MISSING_NUMBERS = 5
# Lines of prose are wrapped at about 70 characters; verse and lists are shorter.
_MIN_PROSE_LINE_LENGTH = 50


def nietzsche_documents(base_url: str = GUTENBERG_URL) -> Iterator[Document]:
    """The aphorisms of all books, sorted by the id of the book, then in its order.

    Raises:
        MachineError: Project Gutenberg cannot be reached, or did not send books.
    """
    texts = dict(_download(base_url))
    seen: set[str] = set()
    for book_id, text in texts.items():
        for aphorism in split_book(text):
            if aphorism not in seen:
                seen.add(aphorism)
                to_validation = falls_to_validation(aphorism, VALIDATION_PERMILLE)
                yield Document(aphorism, f"book {book_id}", to_validation)


def _download(base_url: str) -> Iterator[tuple[int, str]]:
    num_found = 0
    headers = {"User-Agent": "full_stack_transformer (python-httpx)"}
    with httpx.Client(
        base_url=base_url, headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=True
    ) as client:
        for book_id, title in BOOKS.items():
            try:
                text = _download_book(client, f"/cache/epub/{book_id}/pg{book_id}.txt")
            except httpx.HTTPError as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise _no_books(
                    f"downloading {title!r} from {base_url} failed: {reason}"
                ) from error
            if text is None:
                logger.warning("%s no longer has %s (%d): left out", base_url, title, book_id)
                continue
            num_found += 1
            yield book_id, _body(text, title, base_url)
    if not num_found:
        raise _no_books(f"{base_url} has none of the {len(BOOKS)} books")


def _download_book(client: httpx.Client, path: str) -> str | None:
    """The text at `path`, or None if the server does not have the book."""
    deadline = time.monotonic() + _MAX_BOOK_SECONDS
    content = bytearray()
    with client.stream("GET", path) as response:
        if response.status_code in (404, 410):
            return None
        response.raise_for_status()
        for block in response.iter_bytes():
            content += block
            if len(content) > _MAX_BOOK_BYTES or time.monotonic() > deadline:
                raise httpx.ReadError(
                    f"more than {_MAX_BOOK_BYTES:,} bytes or {_MAX_BOOK_SECONDS:.0f} s"
                )
    return content.decode("utf-8-sig", "replace")


def _body(text: str, title: str, base_url: str) -> str:
    """The text between Project Gutenberg's header and footer."""
    start = _START.search(text)
    if not start:
        raise _no_books(f"{base_url} sent something else than {title!r}: {text[:60]!r}")
    end = _END.search(text, start.end())
    return text[start.end() : end.start() if end else len(text)]


def _no_books(what_failed: str) -> MachineError:
    return MachineError(
        f"{what_failed}; use `fst collect_documents python_docs`, which needs no network, or put "
        "train.txt and valid.txt into the folder nietzsche of --documents_root yourself"
    )


def split_book(body: str) -> Iterator[str]:
    """The aphorisms and chapters of a book without Project Gutenberg's header and footer.

    A document starts at a number (`12.` on a line or before a text) and at a heading in capitals.
    Tables of contents, footnotes, title pages and texts by other authors are left out.
    """
    document: list[str] = []
    last_number = 0
    for paragraph in _own_paragraphs(body):
        number, text = _take_number(paragraph, last_number)
        if number is not None or _is_heading(paragraph):
            yield from _finish(document)
            document = []
        last_number = last_number if number is None else number
        if text:
            document.append(text)
    yield from _finish(document)


def _own_paragraphs(body: str) -> Iterator[str]:
    """The author's paragraphs, with their line breaks."""
    paragraphs = tidy(_EMPHASIS.sub("", body)).split("\n\n")
    in_contents = by_others = False
    for position, paragraph in enumerate(paragraphs):
        if _is_heading(paragraph):
            if _BACK_MATTER.match(paragraph) and position > 0.6 * len(paragraphs):
                return
            in_contents = in_contents or bool(_CONTENTS.match(paragraph))
            by_others = bool(_BY_OTHERS.search(paragraph))
        elif in_contents and _is_wrapped_prose(paragraph):
            in_contents = False
        if not (in_contents or by_others or _JUNK.match(paragraph.lstrip())):
            yield paragraph


def _is_heading(paragraph: str) -> bool:
    text = paragraph.strip()
    return text.isupper() and len(text) < 150


def _is_wrapped_prose(paragraph: str) -> bool:
    """Whether the lines are as long as those of prose; lines of lists and verse are shorter."""
    lines = [line.strip() for line in paragraph.splitlines()]
    return sum(map(len, lines[:-1])) >= _MIN_PROSE_LINE_LENGTH * max(len(lines) - 1, 1)


def _take_number(paragraph: str, last_number: int) -> tuple[int | None, str]:
    """The number of the aphorism that starts here, if any, and the text after the number.

    Numbers increase, or start again at 1; other numbers are dates and quantities.
    """
    first_line, _, other_lines = paragraph.strip().partition("\n")
    if match := _NUMBER_ALONE.fullmatch(first_line.strip()):
        text = other_lines
    elif match := _NUMBER_BEFORE_TEXT.match(paragraph.strip()):
        text = paragraph.strip()[match.end() :]
    else:
        return None, paragraph
    number = int(match[1])
    is_next = number == 1 or last_number < number <= last_number + _MAX_MISSING_NUMBERS
    return (number, text) if is_next else (None, paragraph)


def _finish(paragraphs: list[str]) -> Iterator[str]:
    """The document of these paragraphs, if it has text under its heading."""
    body = [_unwrap(part) for part in paragraphs if not _is_heading(part)]
    heading = [_ROMAN_NUMERAL.sub("", _unwrap(part)) for part in paragraphs if _is_heading(part)]
    num_words = sum(len(part.split()) for part in body)
    if num_words >= _MIN_WORDS and share_of_function_words(" ".join(body)) > 0.2:
        yield "\n\n".join([*(part for part in heading if len(part) > 5), *body])


def _unwrap(paragraph: str) -> str:
    """A paragraph of prose as one line; verse keeps its lines."""
    separator = " " if _is_wrapped_prose(paragraph) else "\n"
    lines = (line.strip() for line in paragraph.splitlines())
    return _FOOTNOTE_MARK.sub("", separator.join(lines)).removeprefix("--")
