"""What a conversation is, and the checks that each one passes.

    {"role": "user", "content": "…"}   roles: system, developer, user, assistant, tool, function

Contents are texts, or lists of parts of which all are texts. Calls of functions are brought into the form
that chat templates read: `tool_calls` with arguments as an object.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from full_stack_transformer.errors import RowError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ANSWERER = "assistant"
# What templates read of a message.
_KEPT = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages that passed the checks."""

    messages: list[Message]
    place: str
    """File and line, for errors."""
    tools: Sequence[Any] = ()
    """Descriptions of functions."""
    ignored: frozenset[int] = frozenset()
    """Indices of answers that are not learned: OpenAI's `weight` 0."""
    kind: str = ""
    """What is asked, for figures by kind."""

    @property
    def texts(self) -> list[str]:
        """The contents, to train a tokenizer on."""
        return [message["content"] for message in self.messages if message.get("content")]


@dataclass(frozen=True)
class Preference:
    """Two conversations that differ in their last answer."""

    chosen: Conversation
    rejected: Conversation


def checked(
    messages: object, place: str, *, tools: object = None, functions: object = None
) -> Conversation:
    """A conversation.

    Args:
        messages: a list of messages, as JSON has them.
        place: file and line.
        tools: in OpenAI's form; a text is read as JSON.
        functions: the older form of `tools`.

    Raises:
        RowError: something is missing or of another type.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RowError(f"{place}: expected a list of messages, found {_shown(messages)}")
    found = [_message(one, f"{place}, message {number}") for number, one in enumerate(messages, 1)]
    if not any(message["role"] == ANSWERER for message in found):
        raise RowError(
            f"{place}: no message has the role {ANSWERER!r}, so there is no answer to learn; found "
            f"{', '.join(message['role'] for message in found)}"
        )
    ignored = frozenset(
        index
        for index, one in enumerate(messages)
        if isinstance(one, Mapping) and one.get("weight") == 0 and one.get("role") == ANSWERER
    )
    if functions and not tools:
        listed = _list_of_json(functions, f"{place}: functions")
        return Conversation(
            found, place, [{"type": "function", "function": one} for one in listed], ignored
        )
    return Conversation(found, place, _list_of_json(tools, f"{place}: tools"), ignored)


def _message(one: object, place: str) -> Message:
    if not isinstance(one, Mapping):
        raise RowError(f"{place} should be an object with role and content, found {_shown(one)}")
    role = one.get("role")
    if role not in ROLES:
        raise RowError(f"{place}: role should be one of {', '.join(ROLES)}; found {_shown(role)}")
    message: Message = {"role": role}
    calls = _calls(one, place)
    content = _content(one.get("content"), place)
    has_more = calls or any(one.get(name) for name in _KEPT[2:])
    if not content.strip() and role == ANSWERER and not has_more:
        raise RowError(f"{place}: this answer is empty; write one, or leave the message out")
    message["content"] = content
    for name in _KEPT:
        if isinstance(one.get(name), str):
            message[name] = _valid_text(one[name])
    if calls:
        message["tool_calls"] = calls
    return message


def _content(content: object, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return _valid_text(content)
    if isinstance(content, list | tuple):
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, Mapping) else part
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise RowError(
                    f"{place}: content has a part of type {kind!r}; only texts can be learned"
                )
            texts.append(_valid_text(text))
        return "".join(texts)
    raise RowError(f"{place}: content should be a text, found {_shown(content)}")


def _calls(one: Mapping[str, Any], place: str) -> list[Any]:
    calls = one.get("tool_calls") or []
    if one.get("function_call"):
        calls = [{"type": "function", "function": one["function_call"]}]
    if not isinstance(calls, list | tuple):
        raise RowError(f"{place}: tool_calls should be a list, found {_shown(calls)}")
    return [_call(call, place) for call in calls]


def _call(call: object, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(
            f"{place}: a tool call should have a function with a name, found {_shown(call)}"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise RowError(
                f"{place}: the arguments of {function['name']} should be JSON, but are not: {error}"
            ) from error
    named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    assert isinstance(call, Mapping)
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**kept, "type": "function", "function": named}


def _list_of_json(value: object, place: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise RowError(f"{place} should be JSON, but is not: {error}") from error
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise RowError(f"{place} should be a list, found {_shown(value)}")
    return list(value)


def _valid_text(text: str) -> str:
    """Without lone surrogates, which JSON can contain and which are no text."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _shown(value: object) -> str:
    """A value for an error: its beginning, or its type where it is large."""
    if isinstance(value, list | tuple | Mapping):
        return f"{type(value).__name__} of {len(value)}"
    return f"{value!r:.40}"
