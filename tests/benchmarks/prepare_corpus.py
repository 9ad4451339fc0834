"""Build a corpus of English technical text from the files of the running Python, for benchmarks.

python tests/benchmarks/prepare_corpus.py /tmp/documents.txt --mb 100

    prose of every file ──> whole Python sources ──> both again, in another order ──> DOCUMENTS

Files are those below sys.prefix and of the standard library, taken in the order of a hash of their
names, so that a small corpus is the beginning of a large one. Each file is a document, each document
occurs once. Where that is not enough, documents repeat in another order, one in four with its letters
shifted: then the number of different words keeps growing, as it does in text that does not repeat.
Prints the facts as one line of JSON, and keeps them beside the file. Knows nothing of tokens.
"""

import argparse
import hashlib
import json
import os
import random
import re
import string
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

END_OF_DOCUMENT = "[END_OF_DOCUMENT]"

_TEXT_SUFFIXES = (".md", ".rst", ".txt")
# Larger ones are tables, not text.
_MAX_FILE_BYTES = 1 << 20
_MIN_DOCUMENT_CHARACTERS = 200
_PROSE = re.compile(
    r'"""((?s:.*?))"""|\'\'\'((?s:.*?))\'\'\'|^[ \t]*#[ \t]?(.*)$', flags=re.MULTILINE
)
_LETTERS = string.ascii_lowercase.encode(), string.ascii_uppercase.encode()


def build_corpus(path: Path, num_bytes: int) -> dict[str, float]:
    """Write documents of at least `num_bytes` to `path`, and return what they are.

    Raises:
        SystemExit: there is no file of text.
    """
    facts_path = path.with_suffix(".json")
    if path.is_file() and facts_path.is_file():
        known: dict[str, float] = json.loads(facts_path.read_text(encoding="utf-8"))
        return known
    partial = path.with_suffix(f".partial-{os.getpid()}")
    spans: list[tuple[int, int]] = []
    with partial.open("wb") as file:
        for document in _ended(_unique(_documents())):
            if file.tell() >= num_bytes:
                break
            spans.append((file.tell(), len(document)))
            file.write(document)
        unique_bytes = file.tell()
        if not spans:
            raise SystemExit(f"no text below {sys.prefix}: nothing to build a corpus from")
        num_documents = len(spans)
        for document in _repeated(partial, spans):
            if file.tell() >= num_bytes:
                break
            file.write(document)
            file.flush()  # the repeated documents are read from this file
            num_documents += 1
        facts = {
            "mb": file.tell() / 1e6,
            "unique_mb": unique_bytes / 1e6,
            "num_documents": num_documents,
        }
    partial.replace(path)
    facts_path.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return facts


def _documents() -> Iterator[str]:
    """Prose of all files, then the Python sources whole."""
    paths = _paths()
    for path in paths:
        text = _read(path)
        if path.suffix == ".py":
            text = "\n".join("".join(groups) for groups in _PROSE.findall(text))
        yield text
    for path in paths:
        if path.suffix == ".py":
            yield _read(path)


def _paths() -> list[Path]:
    """Files with text, in an order that depends on their names only."""
    found: dict[bytes, Path] = {}
    for root in (Path(sys.prefix), Path(sysconfig.get_path("stdlib"))):
        for directory, _, names in os.walk(root):
            for name in names:
                path = Path(directory, name)
                if path.suffix == ".py" or path.suffix in _TEXT_SUFFIXES or name == "METADATA":
                    relative = path.relative_to(root).as_posix()
                    found[hashlib.blake2b(relative.encode(), digest_size=16).digest()] = path
    return [found[key] for key in sorted(found)]


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return ""
        return path.read_text(encoding="utf-8").replace("\ufeff", "")
    except (OSError, UnicodeDecodeError):
        return ""


def _unique(documents: Iterable[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.blake2b(document.encode(), digest_size=16).digest()
        if len(document) >= _MIN_DOCUMENT_CHARACTERS and digest not in seen:
            seen.add(digest)
            yield document


def _ended(documents: Iterable[str]) -> Iterator[bytes]:
    """Documents as they stand in the file, each followed by the line that ends it."""
    for document in documents:
        lines = [line for line in document.split("\n") if line.strip() != END_OF_DOCUMENT]
        yield "\n".join((*lines, END_OF_DOCUMENT, "")).encode()


def _repeated(path: Path, spans: list[tuple[int, int]]) -> Iterator[bytes]:
    """The documents at `spans` again and again, each time in another order."""
    order = random.Random(0)
    end = f"{END_OF_DOCUMENT}\n".encode()
    with path.open("rb") as file:
        for repetition in range(1, sys.maxsize):
            shifted = _shift_letters(repetition)
            for number, (offset, length) in enumerate(order.sample(spans, len(spans))):
                file.seek(offset)
                document = file.read(length)
                if number % 4 == 0:
                    document = document.removesuffix(end).translate(shifted) + end
                yield document


def _shift_letters(places: int) -> bytes:
    """A translation of bytes that moves every ASCII letter by so many places of the alphabet."""
    places %= len(string.ascii_lowercase)
    moved = [letters[places:] + letters[:places] for letters in _LETTERS]
    return bytes.maketrans(b"".join(_LETTERS), b"".join(moved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("path", type=Path)
    parser.add_argument("--mb", type=float, default=100)
    options = parser.parse_args()
    print(json.dumps(build_corpus(options.path, round(options.mb * 1e6))), flush=True)


if __name__ == "__main__":
    main()
