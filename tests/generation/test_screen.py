"""Markdown that grows in a terminal: what is printed for good, and what may not pass."""

import io
import re

import pytest
from rich.console import Console

from full_stack_transformer.generation import screen

TEXT = """A **bold** word.

1. one

   more of one
2. two

```python
def one():

    return 1
```

The end \x1b]0;title\x07 <b>as it is</b>"""


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("a", ""),
        ("a\n\n", ""),
        ("a\n\nb", "a\n\n"),
        ("- a\n\n- b", ""),
        ("- a\n\n  more", ""),
        ("1. a\n\n2) b", ""),
        ("- a\n\nb", "- a\n\n"),
        ("```\na\n\nb", ""),
        ("```\na\n```\n\nb", "```\na\n```\n\n"),
        ("````\n```\n\nb", ""),
        ("~~~\n```\n\nb\n~~~\n\nc", "~~~\n```\n\nb\n~~~\n\n"),
    ],
)
def test_blocks_are_complete_where_another_begins(text: str, complete: str) -> None:
    assert text[: screen.complete_blocks(text)] == complete


def test_an_answer_in_pieces_looks_as_one_at_once() -> None:
    shown = []
    for size in (1, 7, len(TEXT)):
        output = io.StringIO()
        console = Console(file=output, force_terminal=True, width=60, height=20, color_system=None)
        growing = screen._GrowingMarkdown(console)
        for start in range(0, len(TEXT), size):
            growing.add(TEXT[start : start + size])
        growing.finish()
        assert "\x1b]0" not in output.getvalue()
        shown.append(_seen(output.getvalue()))
    assert shown[0] == shown[1] == shown[2]
    assert "    return 1" in shown[0]
    assert "<b>as it is</b>" in shown[0]
    assert "**" not in shown[0]


def _seen(written: str) -> str:
    """What a terminal shows in the end, of lines that were erased and written again."""
    lines = [""]
    row = 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b") and part != "\r":
            lines[row] += part
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines).strip())
