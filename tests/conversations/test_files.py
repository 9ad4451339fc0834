"""Conversations and preferences are read from every usual layout, and each row is checked."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.conversations.files import (
    RefusedRows,
    find_files,
    read_conversations,
    read_preferences,
)
from full_stack_transformer.conversations.messages import Conversation
from full_stack_transformer.errors import DocumentsError, RowError

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
CALL = {"name": "add", "arguments": '{"a": 2}'}


def _lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def _read(path: Path, **options: Any) -> list[Conversation]:
    return list(read_conversations(path, RefusedRows(), **options))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {"messages": [USER, {**ANSWER, "content": [{"type": "text", "text": "4"}]}]},
            [USER, ANSWER],
        ),
        ({"conversations": SHAREGPT}, [USER, ANSWER]),
        ({"conversations": SHAREGPT, "system": "Be brief."}, [SYSTEM, USER, ANSWER]),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, [USER, ANSWER]),
        (
            {"instruction": "Add", "input": "2, 2", "output": "4", "history": [["2 + 2?", "4"]]},
            [USER, ANSWER, {"role": "user", "content": "Add\n\n2, 2"}, ANSWER],
        ),
        ({"prompt": "2 + 2?", "completion": "4"}, [USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    ],
    ids=[
        "messages",
        "parts",
        "sharegpt",
        "system",
        "roles",
        "alpaca",
        "history",
        "prompt",
        "lists",
    ],
)
def test_every_layout_gives_the_same_messages(
    tmp_path: Path, row: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    [read] = _read(_lines(tmp_path / "a.jsonl", row))
    assert read.messages == expected
    (tmp_path / "b.json").write_text(json.dumps([row, row], indent=1))
    assert [one.messages for one in _read(tmp_path / "b.json")] == [expected, expected]


def test_tools_are_what_templates_read(tmp_path: Path) -> None:
    function = {"name": "add", "parameters": {}}
    asked = {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": CALL}]}
    told = {"role": "tool", "content": "4", "tool_call_id": "x"}
    rows = [
        {
            "messages": [USER, asked, told, ANSWER],
            "tools": [{"type": "function", "function": function}],
        },
        {"messages": [USER, {"role": "assistant", "function_call": CALL}], "functions": [function]},
        {
            "conversations": [SHAREGPT[0], {"from": "function_call", "value": json.dumps(CALL)}],
            "tools": json.dumps([{"type": "function", "function": function}]),
        },
    ]
    for read in _read(_lines(tmp_path / "a.jsonl", *rows)):
        assert read.tools == [{"type": "function", "function": function}]
        [call] = read.messages[1]["tool_calls"]
        assert call["function"] == {"name": "add", "arguments": {"a": 2}}
    weighed = [USER, {**ANSWER, "weight": 0}, USER, ANSWER]
    assert _read(_lines(tmp_path / "b.jsonl", {"messages": weighed}))[0].ignored == {1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "line 2 should be an object, found list"),
        ({"text": "a"}, "line 2 should have messages.*found text"),
        ({"messages": []}, "line 2 should have messages"),
        ({"messages": [USER]}, "no message has the role 'assistant'"),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, "message 2: this answer is empty"),
        ({"messages": [USER, {**ANSWER, "role": "bard"}]}, "message 2: role should be one of"),
        (
            {"messages": [USER, {**ANSWER, "content": 7}]},
            "message 2: content should be a text, found 7",
        ),
        ({"messages": [USER, "hi"]}, "message 2 should be an object with role and content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "part of type 'image_url'; only texts",
        ),
        ({"instruction": "a"}, "has instruction, but no output"),
        ({"chosen": "a", "rejected": "b"}, "is a preference; read its file with --preferences"),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "function_call": {**CALL, "arguments": "{"}},
                ]
            },
            "the arguments of add should be JSON",
        ),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools should be JSON"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path: Path, row: object, message: str) -> None:
    path = _lines(
        tmp_path / "a.jsonl", {"messages": [USER, ANSWER]}, row, {"messages": [USER, ANSWER]}
    )
    with pytest.raises(
        RowError, match=rf"a.jsonl, line 2.*{message.removeprefix('line 2')}"
    ) as caught:
        _read(path)
    assert "--on_bad_row skip" in str(caught.value)
    refused = RefusedRows("skip")
    assert len(list(read_conversations(path, refused))) == 2
    assert refused.num == 1


def test_broken_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "a.jsonl"
    broken.write_text('{"messages": \n')
    with pytest.raises(RowError, match=r"a.jsonl, line 1 should be a JSON object, but is no JSON"):
        _read(broken)
    broken.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(RowError, match=r"line 1 is not UTF-8 \(byte 0xff"):
        _read(broken)
    whole = tmp_path / "a.json"
    whole.write_text('[{"messages": []},\n {"mess')
    with pytest.raises(DocumentsError, match=r"a.json should be JSON, but is not.*line 2"):
        _read(whole)
    whole.write_text(json.dumps([{"messages": [USER, ANSWER]}, {"messages": [USER]}], indent=1))
    with pytest.raises(RowError, match=r"a.json, line 14: no message has the role"):
        _read(whole)


def test_files_are_found_in_directories(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    first = _lines(tmp_path / "in" / "a.jsonl", {"messages": [USER, ANSWER]})
    packed = tmp_path / "in" / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(first.read_bytes()))
    (tmp_path / "in" / "notes.md").write_text("x")
    (tmp_path / "in" / ".hidden.jsonl").write_text("x")
    assert find_files([tmp_path / "in"], "--conversations") == [first, packed]
    assert _read(first)[0].messages == _read(packed)[0].messages
    for path, message in (
        (tmp_path / "no.jsonl", "does not exist"),
        (tmp_path / "in" / "notes.md", "should end in"),
    ):
        with pytest.raises(DocumentsError, match=f"--conversations {path} {message}"):
            find_files([path], "--conversations")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DocumentsError, match="holds no file ending in"):
        find_files([tmp_path / "empty"], "--conversations")


def test_parquet_is_read_by_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"messages": [[USER, ANSWER], [USER]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(RowError, match=r"a.parquet, row 2: no message has the role"):
        _read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"question": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "5"}]},
        {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "5"}]},
        {
            "prompt": "2 + 2?",
            "chosen": [USER, ANSWER],
            "rejected": [USER, {**ANSWER, "content": "5"}],
        },
        {
            "conversations": SHAREGPT[:1],
            "chosen": SHAREGPT[1],
            "rejected": {"from": "gpt", "value": "5"},
        },
        {
            "input": {"messages": [USER]},
            "preferred_output": [ANSWER],
            "non_preferred_output": [{**ANSWER, "content": "5"}],
        },
        {
            "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
            "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5",
        },
    ],
    ids=["prompt", "question", "lists", "whole", "repeated", "sharegpt", "openai", "hh"],
)
def test_every_layout_of_preferences_gives_the_same(tmp_path: Path, row: dict[str, Any]) -> None:
    [read] = read_preferences(_lines(tmp_path / "a.jsonl", row), RefusedRows())
    assert read.chosen.messages == [USER, ANSWER]
    assert read.rejected.messages == [USER, {**ANSWER, "content": "5"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "should have chosen and rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, ANSWER]}, "differ in their last answer"),
        ({"prompt": "a", "chosen": [USER], "rejected": "b"}, "chosen: no message has the role"),
        ({"prompt": 7, "chosen": "a", "rejected": "b"}, "prompt should be a text"),
    ],
)
def test_a_wrong_preference_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = _lines(tmp_path / "a.jsonl", row)
    with pytest.raises(RowError, match=rf"a.jsonl, line 1.*{message}"):
        list(read_preferences(path, RefusedRows()))


def _said(who: str, text: object, seconds: int = 0, number: int = 1) -> dict[str, Any]:
    place = {"Ann": "user1", "Bob": "user2", "Cem": "user3"}[who]
    return {
        "id": number,
        "type": "message",
        "date_unixtime": str(1_700_000_000 + seconds),
        "from": who,
        "from_id": place,
        "text": text,
    }


def test_an_export_of_telegram_becomes_conversations(tmp_path: Path) -> None:
    chat = {
        "name": "Bob",
        "type": "personal_chat",
        "id": 2,
        "messages": [
            {"id": 0, "type": "service", "action": "phone_call"},
            _said("Ann", "unasked"),
            _said("Bob", "hi", 10),
            _said("Bob", ["see ", {"type": "link", "text": "x.org"}], 20),
            _said("Ann", "hello", 30),
            _said("Ann", "", 31),
            _said("Bob", "the next day", 90_000),
            _said("Ann", "yes", 90_010),
            _said("Bob", "not answered", 90_020),
        ],
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(chat))
    first, second = (one.messages for one in _read(path))
    assert [one["content"] for one in first] == ["hi\nsee x.org", "hello"]
    assert [one["content"] for one in second] == ["the next day", "yes"]
    path.write_text(json.dumps({"chats": {"list": [chat]}, "personal_information": {"user_id": 1}}))
    assert [one.messages for one in _read(path)] == [first, second]
    assert [one["role"] for one in _read(path, answers_of="Bob")[0].messages] == [
        "user",
        "assistant",
    ]
    with pytest.raises(RowError, match=r"no message of Eve answers.*--answers_of; found Ann, Bob"):
        _read(path, answers_of="Eve")


def test_in_a_group_it_must_be_said_whose_answers_are_learned(tmp_path: Path) -> None:
    group = {
        "name": "G",
        "type": "private_group",
        "id": 9,
        "messages": [_said("Bob", "who?", 1), _said("Cem", "me", 2), _said("Ann", "and I", 3)],
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(group))
    with pytest.raises(RowError, match=r"chat G is a group.*--answers_of; found Ann, Bob, Cem"):
        _read(path)
    [one] = _read(path, answers_of="Ann")
    assert [message["content"] for message in one.messages] == ["Bob: who?\nCem: me", "and I"]
