"""Messages with private characters for their letters, so that a template's output tells whose each letter is.

Each message has private characters of its own. What the template may look for stays as it is, and so does
what escaping would change.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import nodes

from full_stack_transformer.tokenization.control_tokens import mapped, unused_characters
from full_stack_transformer.tokenization.templates import template_tree

# What escaping (JSON, HTML) would change.
_NEVER_MARKED = frozenset("\"'\\<>&/")
# Names in a message whose texts are words of the template.
_WORDS = frozenset(["role", "type", "id", "tool_call_id"])

# A private character -> the letter that it stands for, and the index of its message.
Whole = dict[str, tuple[str, int]]


def marked_messages(
    source: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]
) -> tuple[list[dict[str, Any]], Whole]:
    """The messages with private characters for their letters, and what these stand for.

    Args:
        source: the template.
        messages: as long as before; no text of them has one of the private characters.
        tools: the same, but they are not marked.
    """
    private = unused_characters(source, [*messages, *tools])
    kept = _constants_pattern(source)
    whole: Whole = {}
    marked = [
        _marked(message, index, private, whole, kept) for index, message in enumerate(messages)
    ]
    return marked, whole


def _marked(
    message: Mapping[str, Any],
    index: int,
    private: Iterator[str],
    whole: Whole,
    kept: re.Pattern[str],
) -> dict[str, Any]:
    """The message with private characters for its letters; `whole` learns which stands for which."""
    marks: dict[str, str] = {}

    def mark_letters(letters: str) -> str:
        for letter in letters:
            if letter not in marks and not letter.isspace() and letter not in _NEVER_MARKED:
                mark = next(private, None)
                if mark is not None:
                    marks[letter] = mark
                    whole[mark] = (letter, index)
        return "".join(marks.get(letter, letter) for letter in letters)

    def mark(text: str) -> str:
        return "".join(
            part if place % 2 else mark_letters(part) for place, part in enumerate(kept.split(text))
        )

    return {
        name: one if name in _WORDS else _without_words(mark, one) for name, one in message.items()
    }


def _without_words(change: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: one if name in _WORDS else _without_words(change, one)
            for name, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_words(change, one) for one in value]
    return mapped(change, value)


def _constants_pattern(source: str) -> re.Pattern[str]:
    """Finds what the template may look for in a text; its one group is the whole."""
    constants = {
        one.value
        for one in template_tree(source).find_all(nodes.Const)
        if isinstance(one.value, str) and one.value.strip()
    }
    longest_first = sorted(constants, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
