"""Telegram's exports (`result.json`) -> conversations.

    one chat          {"name": …, "type": …, "id": …, "messages": […]}
    all chats         {"chats": {"list": […]}, …}

The answers are those of the person who made the export, or of the one who is named. Messages of one side that
follow each other become one; a new conversation begins after a pause. In groups the others' messages begin
with their names. Calls, pictures without a text and notices are left out.
"""

import itertools
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from full_stack_transformer.conversations.messages import ANSWERER, Conversation, checked
from full_stack_transformer.errors import RowError

# A pause after which people rarely go on where they were.
_PAUSE_SECONDS = 3 * 3600
_PRIVATE = ("personal_chat", "bot_chat")
_LEFT_OUT = ("saved_messages", "private_channel", "public_channel")


def is_export(content: object) -> bool:
    """Whether this is what Telegram writes."""
    if not isinstance(content, Mapping):
        return False
    chats = content.get("chats")
    if isinstance(chats, Mapping) and isinstance(chats.get("list"), list):
        return True
    messages = content.get("messages")
    return "type" in content and isinstance(messages, list) and "id" in content


def conversations_of(
    export: Mapping[str, Any], place: str, answers_of: str | None
) -> Iterator[Conversation]:
    """The conversations of an export.

    Args:
        export: the content of the file.
        place: the file, for errors.
        answers_of: name of the person whose messages are answers; by default who made the export.

    Raises:
        RowError: it cannot be told whose messages are answers, or they are none of this person.
    """
    chats = export["chats"]["list"] if "chats" in export else [export]
    owner = (export.get("personal_information") or {}).get("user_id")
    found = False
    for chat in chats:
        if chat.get("type") in _LEFT_OUT:
            continue
        for conversation in _of_chat(chat, place, answers_of, owner):
            found = True
            yield conversation
    if not found:
        names = sorted({str(one.get("from")) for chat in chats for one in _messages(chat)})
        raise RowError(
            f"{place}: no message of {answers_of or 'the person who exported it'} answers another one; name "
            f"the person whose answers are learned with --answers_of; found {', '.join(names[:8])}"
        )


def _of_chat(
    chat: Mapping[str, Any], place: str, answers_of: str | None, owner: object
) -> Iterator[Conversation]:
    is_private = chat.get("type") in _PRIVATE
    messages = _messages(chat)
    place = f"{place}, chat {chat.get('name') or chat.get('id')}"

    def answers(message: Mapping[str, Any]) -> bool:
        if answers_of is not None:
            return answers_of in (message.get("from"), message.get("from_id"))
        if owner is not None:
            return message.get("from_id") == f"user{owner}"
        return message.get("from_id") != f"user{chat.get('id')}"

    if answers_of is None and owner is None and not is_private:
        raise RowError(
            f"{place} is a group: name the person whose answers are learned with --answers_of; found "
            f"{', '.join(sorted({str(one.get('from')) for one in messages})[:8])}"
        )
    for part in _parts(messages):
        turns: list[dict[str, str]] = []
        for is_answer, group in itertools.groupby(part, key=answers):
            texts = [
                _text(one) if is_answer or is_private else f"{one.get('from')}: {_text(one)}"
                for one in group
            ]
            if turns or not is_answer:  # an answer to nothing is none
                role = ANSWERER if is_answer else "user"
                turns.append({"role": role, "content": "\n".join(texts)})
        if turns and turns[-1]["role"] != ANSWERER:
            turns.pop()
        if turns:
            yield checked(turns, f"{place}, message {part[0].get('id')}")


def _messages(chat: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [
        one
        for one in chat.get("messages", [])
        if isinstance(one, Mapping) and one.get("type") == "message" and _text(one).strip()
    ]


def _parts(messages: list[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The messages, cut at pauses."""
    part: list[Mapping[str, Any]] = []
    for message in messages:
        if part and _seconds(message) - _seconds(part[-1]) > _PAUSE_SECONDS:
            yield part
            part = []
        part.append(message)
    if part:
        yield part


def _seconds(message: Mapping[str, Any]) -> float:
    try:
        if "date_unixtime" in message:
            return float(message["date_unixtime"])
        return datetime.fromisoformat(str(message.get("date"))).timestamp()
    except ValueError:
        return 0.0


def _text(message: Mapping[str, Any]) -> str:
    """The text; parts with a format are objects."""
    text = message.get("text", "")
    parts = text if isinstance(text, list) else [text]
    return "".join(
        str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in parts
    )
