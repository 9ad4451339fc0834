"""Invalid and hostile updates; 10,000 of them with FST_HOSTILE_UPDATES=10000."""

import json
import os
import random
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

NUM_HOSTILE = int(os.environ.get("FST_HOSTILE_UPDATES", "300"))

_ANYTHING: list[Any] = [
    None, True, 0, -1, 2**63, 2**64, -(2**70), 1e308, "", "x" * 5000, "\ud800", "\x00", "‮",
    "<b>&amp;", "/settings " + "9" * 400, "/start" * 900, "/why", "/forget", "/settings seed 1",
    "/allow 1", "/stop@fake_bot", "@fake_bot", [], [[]], {}, {"id": 1}, "2/set/5/temperature/+",
    "2/show/1/0", "2/forget/5", "2/repeat/999999999999999999", "private", "channel", "group",
]  # fmt: skip
_PERSON = {"id": 5, "is_bot": False, "first_name": "User", "language_code": "ru"}
_CHAT = {"id": -5, "type": "supergroup", "title": "Group"}
_CONTENT = {
    "message_id": 7, "date": 1, "chat": _CHAT, "from": _PERSON, "text": "Hostile words",
    "message_thread_id": 3, "is_topic_message": True, "entities": [],
    "reply_to_message": {"message_id": 6, "date": 1, "chat": _CHAT, "from": _PERSON},
}  # fmt: skip
_TEMPLATES: list[Json] = [
    {"message": _CONTENT},
    {"callback_query": {"id": "1", "from": _PERSON, "chat_instance": "1", "data": "2/set/5/seed/0",
                        "message": _CONTENT}},
    {"stopped_message_generation": {"chat": _CHAT, "draft_id": 1}},
    {"my_chat_member": {"chat": _CHAT, "from": _PERSON, "date": 1,
                        "old_chat_member": {"status": "member", "user": _PERSON},
                        "new_chat_member": {"status": "kicked", "user": _PERSON,
                                            "until_date": 0}}},
    {"edited_message": _CONTENT}, {"channel_post": _CONTENT}, {"unknown_kind": _CONTENT},
]  # fmt: skip


def hostile_updates(number: int, seed: int) -> Iterator[Any]:
    """Valid updates with random parts replaced by anything, and values that are not updates."""
    chance = random.Random(seed)
    for _ in range(number):
        if chance.random() < 0.05:
            yield chance.choice(_ANYTHING)
            continue
        update = json.loads(json.dumps(chance.choice(_TEMPLATES)))
        for _ in range(chance.randint(0, 3)):
            place = update
            while True:
                key = chance.choice(list(place))
                if isinstance(place[key], dict) and place[key] and chance.random() < 0.85:
                    place = place[key]
                    continue
                if chance.random() < 0.2:
                    del place[key]
                else:
                    place[key] = chance.choice(_ANYTHING)
                break
            if not update:
                break
        yield update
