"""Telling English prose from code, tables and licences, and new text from what was seen before.

Rules of thumb with thresholds read off the standard library; knows nothing of Python's syntax tree.
"""

import re

# The commonest function words: a quarter to a half of any English text, next to none of any code.
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


def share_of_function_words(text: str) -> float:
    """Which part of the words of `text` are the commonest English ones, 0 to 1."""
    words = _WORD.findall(text.lower())
    return sum(word in _FUNCTION_WORDS for word in words) / max(len(words), 1)


def without_legal_paragraphs(text: str) -> str:
    """`text` without the paragraphs that state a licence or a copyright."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(part for part in paragraphs if not _LEGAL.search(part)).strip("\n")


def is_readable(text: str) -> bool:
    """Whether a docstring says something in words; short ones get the benefit of the doubt."""
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
    """Remembers the lines that went by, to recognise a text that came before under another name."""

    def __init__(self) -> None:
        self._lines: set[str] = set()

    def is_new(self, text: str) -> bool:
        """Whether at least half of `text` was never seen; if so, remember it."""
        lines = [" ".join(line.split()) for line in text.splitlines()]
        lines = [line for line in lines if len(line) >= _MIN_KNOWN_LINE_LENGTH] or [text.strip()]
        known = sum(len(line) for line in lines if line in self._lines)
        if 2 * known > sum(map(len, lines)):
            return False
        self._lines.update(lines)
        return True
