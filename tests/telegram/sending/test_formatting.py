"""Long texts are split and lose nothing; buttons of old messages still work."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from full_stack_transformer.telegram.sending.formatting import (
    MAX_MESSAGE_CHARACTERS,
    Button,
    ForgetButton,
    ReplyButton,
    SettingButton,
    VariantButton,
    explained_pieces,
    parse_button,
    split_text,
    text_pieces,
)

PIECES = ["a", " ", "\n", "é", "👩🏽‍🚀", "🇩🇪", "👨‍👩‍👧‍👦", "🏴\U000e0067\U000e0062\U000e007f", "漢"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PIECES), st.integers(0, 3000)), max_size=6))
def test_pieces_fit_and_joined_are_the_text(runs: list[tuple[str, int]]) -> None:
    text = "".join(piece * number for piece, number in runs)
    pieces = split_text(text)
    assert "".join(pieces) == text
    assert all(len(piece) <= MAX_MESSAGE_CHARACTERS for piece in pieces)
    assert len(pieces) <= 1 + len(text) // (MAX_MESSAGE_CHARACTERS // 2)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([piece for piece in PIECES if len(piece) > 1]), st.integers(0, 12))
def test_no_cut_goes_through_an_emoji(emoji: str, shift: int) -> None:
    pieces = split_text("." * shift + emoji * 3000)
    assert len(pieces) > 1
    assert all(piece.lstrip(".").replace(emoji, "") == "" for piece in pieces)


def test_a_cluster_without_end_is_cut_all_the_same() -> None:
    assert [len(piece) for piece in split_text("e" + "\u0301" * 5000)] == [4096, 905]


def test_a_prompt_of_full_length_is_bold_in_every_piece_it_reaches() -> None:
    prompt = "👋" * MAX_MESSAGE_CHARACTERS
    first, second = text_pieces(prompt, "!")
    assert [(entity.offset, entity.length) for entity in first.entities] == [(0, 8192)]
    assert (second.text, second.entities) == ("!", [])
    (only,) = text_pieces("prompt", "")
    assert only.text == "prompt"


def test_white_space_alone_is_no_message() -> None:
    pieces = text_pieces("prompt", " " * 9000 + "end" + "\n" * 9000)
    assert [piece.text.strip() for piece in pieces] == ["prompt", "end"]
    assert text_pieces("", " \n") == []


def test_a_long_block_to_copy_is_split_and_each_part_is_a_block() -> None:
    first, *blocks = explained_pieces("why", [("again:", "x" * 9000)])
    assert first.text == "why"
    assert "".join(block.text for block in blocks) == "again:\n" + "x" * 9000
    assert all(len(block.text) <= MAX_MESSAGE_CHARACTERS for block in blocks)
    assert all(entity.type == "pre" for block in blocks for entity in block.entities)


@pytest.mark.parametrize(
    ("button", "data"),
    [
        (ReplyButton(action="repeat", reply_id=12), "2/repeat/12"),
        (ReplyButton(action="continue", reply_id=12), "2/continue/12"),
        (ReplyButton(action="panel", reply_id=12), "2/panel/12"),
        (ReplyButton(action="stop", reply_id=12), "2/stop/12"),
        (VariantButton(reply_id=12, variant=1), "2/show/12/1"),
        (SettingButton(user_id=7, name="top_p", change="+"), "2/set/7/top_p/+"),
        (SettingButton(user_id=7, name="mode", change="chat"), "2/set/7/mode/chat"),
        (ForgetButton(user_id=7), "2/forget/7"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_callback_data_are_the_bytes_of_earlier_versions(button: Button, data: str) -> None:
    assert button.pack() == data
    assert parse_button(data) == button


@pytest.mark.parametrize(
    "data",
    [
        *(None, "", "2", "1/repeat/12", "2/repeat", "2/repeat/", "2/repeat/12/1", "2/show/12"),
        *("2/show/12/x", "2/show/12/-1", "2/set/7/top_p", "2/delete/12", "2:stop:1"),
        f"2/repeat/{10**18}",
    ],
)
def test_invalid_callback_data_are_no_button(data: str | None) -> None:
    assert parse_button(data) is None
