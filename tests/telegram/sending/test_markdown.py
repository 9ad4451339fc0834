"""Markdown as Telegram's entities: what is marked, and that no text can break a message."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from full_stack_transformer.telegram.sending.markdown import markdown_pieces
from tests.fake_bot_api.checks import checked_text


def _shown(text: str) -> list[tuple[str, str]]:
    """The text as (kind of entity, what it covers), after the whole text."""
    (piece,) = markdown_pieces(text)
    units = piece.text.encode("utf-16-le")
    found = [("text", piece.text)]
    for one in piece.entities:
        part = units[2 * one.offset : 2 * (one.offset + one.length)].decode("utf-16-le")
        found.append((f"{one.type} {one.url or one.language or ''}".strip(), part))
    return found


@pytest.mark.parametrize(
    ("text", "shown", "entities"),
    [
        ("plain\ntext\n\nof two", "plain\ntext\n\nof two", []),
        ("🙂 **b *i* b**", "🙂 b i b", [("italic", "i"), ("bold", "b i b")]),
        ("~~a~~ `**b**`", "a **b**", [("strikethrough", "a"), ("code", "**b**")]),
        ("# A\ntext", "A\n\ntext", [("bold", "A")]),
        ("```\na\n\nb\n```", "a\n\nb", [("pre", "a\n\nb")]),
        ("x\n```py t\na", "x\n\na", [("pre py", "a")]),
        ("- a\n- b\n  1. c\n  2. d\n- e", "• a\n• b\n  1. c\n  2. d\n• e", []),
        ("3. a\n4. b\n\nend", "3. a\n4. b\n\nend", []),
        ("> a\n> b\n\nc", "a\nb\n\nc", [("blockquote", "a\nb")]),
        ("[a](https://x.org) b", "a b", [("text_link https://x.org", "a")]),
        ("![a](https://x.org/p.png)", "a", [("text_link https://x.org/p.png", "a")]),
        ("[a](javascript:alert(1))", "[a](javascript:alert(1))", []),
        ("[a](/x)", "a", []),
        (
            "t\n\n| a | b |\n|---|---|\n| 1 | 2 |",
            "t\n\n| a | b |\n|---|---|\n| 1 | 2 |",
            [("pre", "| a | b |\n|---|---|\n| 1 | 2 |")],
        ),
        ("<b>a</b> &lt;", "<b>a</b> <", []),
        ("**open", "**open", []),
        ("---", "———", []),
        ("[a]: https://x.org", "[a]: https://x.org", []),
    ],
)
def test_marks_become_entities(text: str, shown: str, entities: list[tuple[str, str]]) -> None:
    assert _shown(text) == [("text", shown), *entities]


def test_a_long_answer_keeps_its_marks_in_every_message() -> None:
    code = "\n".join(f"line {number}" for number in range(1000))
    pieces = markdown_pieces(f"**head**\n\n```c\n{code}\n```\n\ntail")
    assert [len(piece.text) <= 4096 for piece in pieces] == [True] * 3
    assert "".join(piece.text for piece in pieces) == f"head\n\n{code}\n\ntail"
    assert [one.type for piece in pieces for one in piece.entities] == ["bold", "pre", "pre", "pre"]


_MARKS = st.sampled_from(
    [
        "**",
        "*",
        "_",
        "`",
        "```",
        "\n",
        "\n\n",
        "# ",
        "- ",
        "1. ",
        "> ",
        "[",
        "](http://x)",
        "|",
        "---",
    ]
)


@settings(max_examples=80, deadline=None)
@given(st.lists(_MARKS | st.text(max_size=6), max_size=30).map("".join))
def test_telegram_takes_every_text(text: str) -> None:
    """Also texts that are cut anywhere, as while they grow."""
    for piece in markdown_pieces(text):
        entities = [one.model_dump(exclude_none=True) for one in piece.entities]
        checked_text({"text": piece.text, "entities": entities})
