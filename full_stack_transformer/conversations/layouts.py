"""Rows -> conversations and preferences, by the fields of a row.

messages            [{"role": …, "content": …}], with tools or functions: OpenAI, TRL
conversations       [{"from": "human", "value": …}]: ShareGPT; also with role and content
instruction         with input, output, system, history: Alpaca
prompt, completion  texts or lists of messages
kind                beside any of these: what is asked

chosen, rejected    texts, messages or lists of messages, after prompt, question, instruction, messages or
                    conversations; without one of these, two whole conversations
input, preferred_output, non_preferred_output    OpenAI
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from full_stack_transformer.conversations.messages import (
    ANSWERER,
    Conversation,
    Preference,
    checked,
)
from full_stack_transformer.errors import RowError

_ROLE_OF_SPEAKER = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"), ANSWERER),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
    "function_call": "function_call",
}
_HUMAN_OR_ASSISTANT = re.compile(r"\s*(Human|Assistant): ?")


def conversation_of(row: Mapping[str, Any], place: str) -> Conversation:
    """The conversation of a row.

    Raises:
        RowError: the row has none of the layouts, or a field of another type.
    """
    messages = _list_in(row)
    if messages is None and isinstance(row.get("instruction"), str):
        messages = _alpaca(row, place)
    if messages is None and "prompt" in row and "completion" in row:
        messages = [*_asked(row["prompt"], place), *_answer(row["completion"], place)]
    if messages is None:
        if "chosen" in row and "rejected" in row:
            raise RowError(f"{place} is a preference; read its file with --preferences")
        raise RowError(
            f"{place} should have messages, conversations, instruction and output, or prompt and completion; "
            f"found {_names(row)}"
        )
    found = _checked(_with_system(messages, row), row, place)
    return replace(found, kind=row["kind"]) if isinstance(row.get("kind"), str) else found


def preference_of(row: Mapping[str, Any], place: str) -> Preference:
    """The preference of a row.

    Raises:
        RowError: as `conversation_of`, or both answers are the same.
    """
    chosen = row.get("chosen", row.get("preferred_output"))
    rejected = row.get("rejected", row.get("non_preferred_output"))
    if chosen is None or rejected is None:
        raise RowError(
            f"{place} should have chosen and rejected (or preferred_output and non_preferred_output); found "
            f"{_names(row)}"
        )
    before = _before_answers(row, place)
    both = [
        _checked([*before, *_answer(answer, f"{place}, {name}")], row, f"{place}, {name}")
        for name, answer in (("chosen", chosen), ("rejected", rejected))
    ]
    for one in both:
        if one.messages[-1]["role"] != ANSWERER:
            raise RowError(
                f"{one.place}: the last message should be the {ANSWERER}'s, found "
                f"{one.messages[-1]['role']!r}"
            )
    if both[0].messages == both[1].messages:
        raise RowError(f"{place}: chosen and rejected are the same")
    if both[0].messages[:-1] != both[1].messages[:-1]:
        raise RowError(f"{place}: chosen and rejected should differ in their last answer only")
    return Preference(*both)


def _checked(messages: list[Any], row: Mapping[str, Any], place: str) -> Conversation:
    given = row.get("input")
    tools = given.get("tools") if isinstance(given, Mapping) else row.get("tools")
    return checked(messages, place, tools=tools, functions=row.get("functions"))


def _list_in(row: Mapping[str, Any]) -> list[Any] | None:
    """The messages of a row that has a list of them."""
    for name in ("messages", "conversations", "conversation"):
        value = row.get(name)
        if isinstance(value, list | tuple) and value:
            return [_from_speaker(one) for one in value]
    return None


def _from_speaker(one: Any) -> Any:
    """ShareGPT's message as role and content; another one as it is."""
    if not isinstance(one, Mapping) or "role" in one or "from" not in one:
        return one
    speaker = one["from"]
    role = _ROLE_OF_SPEAKER.get(str(speaker).lower(), speaker)
    content = one.get("value", one.get("content"))
    if role != "function_call":
        # `weight` is OpenAI's; some write it here too.
        kept = {"weight": one["weight"]} if "weight" in one else {}
        return {"role": role, "content": content, **kept}
    try:
        call = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        call = content
    calls = call if isinstance(call, list) else [call]
    return {"role": ANSWERER, "content": None, "tool_calls": calls}


def _alpaca(row: Mapping[str, Any], place: str) -> list[Any]:
    if "output" not in row:
        raise RowError(f"{place} has instruction, but no output; found {_names(row)}")
    messages: list[Any] = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise RowError(f"{place}: history should be a list of pairs of texts")
        messages += [*_asked(turn[0], place), *_answer(turn[1], place)]
    return [*messages, *_asked(_instruction(row), place), *_answer(row["output"], place)]


def _instruction(row: Mapping[str, Any]) -> str:
    more = row.get("input")
    has_more = isinstance(more, str) and more.strip()
    return f"{row['instruction']}\n\n{more}" if has_more else str(row["instruction"])


def _before_answers(row: Mapping[str, Any], place: str) -> list[Any]:
    """What both answers of a preference follow; nothing where they are whole conversations."""
    if isinstance(given := row.get("input"), Mapping):
        return _list_in(given) or []
    messages = _list_in(row)
    if messages is None and isinstance(row.get("instruction"), str):
        messages = _asked(_instruction(row), place)
    if messages is None:
        asked = row.get("prompt", row.get("question", row.get("input")))
        is_repeated = isinstance(asked, str) and _has_messages(row.get("chosen"))
        # Beside whole conversations, as UltraFeedback has them, the prompt is their first message again.
        messages = [] if asked is None or is_repeated else _asked(asked, place)
    return _with_system(messages, row) if messages else []


def _has_messages(answer: object) -> bool:
    return isinstance(answer, list | tuple) and len(answer) > 1


def _with_system(messages: list[Any], row: Mapping[str, Any]) -> list[Any]:
    system = row.get("system", row.get("system_prompt"))
    first = messages[0].get("role") if isinstance(messages[0], Mapping) else None
    if isinstance(system, str) and system.strip() and first not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    return messages


def _asked(value: Any, place: str) -> list[Any]:
    if isinstance(value, str):
        return _human_and_assistant(value) or [{"role": "user", "content": value}]
    if isinstance(value, list | tuple):
        return [_from_speaker(one) for one in value]
    raise RowError(f"{place}: the prompt should be a text or a list of messages")


def _answer(value: Any, place: str) -> list[Any]:
    if isinstance(value, str):
        return _human_and_assistant(value) or [{"role": ANSWERER, "content": value}]
    if isinstance(value, Mapping):
        return [_from_speaker(value)]
    if isinstance(value, list | tuple):
        return [_from_speaker(one) for one in value]
    raise RowError(f"{place}: an answer should be a text, a message or a list of messages")


def _human_and_assistant(text: str) -> list[Any]:
    """The messages of a text in the form of Anthropic's HH: `\\n\\nHuman: … \\n\\nAssistant: …`."""
    if not text.startswith("\n\nHuman:"):
        return []
    _, *parts = re.split(r"\n\n(?=Human:|Assistant:)", text)
    messages = []
    for part in parts:
        found = _HUMAN_OR_ASSISTANT.match(part)
        assert found is not None
        role = "user" if found[1] == "Human" else ANSWERER
        messages.append({"role": role, "content": part[found.end() :]})
    if messages and not messages[-1]["content"].strip():  # the beginning of an answer
        messages.pop()
    return messages


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(list(map(str, row))[:8]) or "an empty object"
