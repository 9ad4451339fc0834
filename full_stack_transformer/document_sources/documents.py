"""What a document is, how its text is tidied, and on which side of the split it falls.

Knows nothing of where the text comes from.
"""

import hashlib
import re
from dataclasses import dataclass

# One way to write a quotation mark or a dash: a small vocabulary has no room for three.
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
# A word longer than this is encoded data, not language; the longest URLs have about 90 characters.
_MAX_WORD_LENGTH = 100


@dataclass(frozen=True)
class Document:
    """A text, the name of the file or topic that it was taken from, and its side of the split."""

    text: str
    source: str
    is_for_validation: bool


def falls_to_validation(source: str, permille: int) -> bool:
    """Whether documents of `source` validate; the same on every machine and in every run.

    The hash is over the name of the source and not the text, so that two similar pages of one
    file never fall on different sides.
    """
    digest = hashlib.sha256(source.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < permille


def tidy(text: str) -> str:
    """`text` with plain punctuation, without rulers, grid tables, memory addresses and long codes.

    Every kind of line end becomes a newline and at most one empty line stands between two lines.
    The result can always be encoded as UTF-8.
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
