"""The Telegram bot with a real service, against the fake Bot API: its answers and its database.

The database that one life leaves is opened by another: settings hold, earlier texts are known.
"""

import json
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.behaviour.commands import Running, fst_words, running, wait_until
from tests.behaviour.facts import Facts, key_paths, plain
from tests.behaviour.steps import Step
from tests.behaviour.trainings import LANGUAGE_MODEL

_TOKEN = "42:FAKE-token_of-the-only-bot"
_USER, _ADMIN = 7, 99
_WAIT_SECONDS = 240
_DATABASE = "bot.sqlite3"
_PROMPT = "Every sample"
# Messages of the chat that a fresh fake Bot API has to have had for its numbers to go on.
_NUM_EARLIER = 100
# Tables whose rows are dropped after some days.
_FORGOTTEN = ("updates", "tokens")
_OPTIONS = (
    *("--mode", "continue", "--max_new_tokens", "6", "--temperature", "0.9", "--top_k", "40"),
    *("--top_p", "0.95", "--repetition_penalty", "1.1", "--admin_ids", str(_ADMIN)),
    *("--device", "cpu"),
)


def bot_steps() -> list[Step]:
    """Of the bot."""
    return [
        Step("bot/first_life", _first_life, (f"train/{LANGUAGE_MODEL}",)),
        Step("bot/second_life", _second_life, ("bot/first_life",), goes_on=True),
    ]


class _Chat:
    """A user's side of the fake Bot API."""

    def __init__(self, url: str, chat_id: int = _USER) -> None:
        self._http = httpx.Client(base_url=url, timeout=2 * _WAIT_SECONDS, trust_env=False)
        self._chat_id = chat_id
        self._num_seen = 0

    def says(self, text: str, num_new: int = 1, **more: Any) -> list[Any]:
        """Write, and read the bot's next messages."""
        body = {"chat_id": self._chat_id, "text": text, **more}
        self._http.post("/user/messages", json=body).raise_for_status()
        return self.sees(num_new)

    def presses(self, message: dict[str, Any], button: str) -> None:
        """Press a button below a message."""
        body = {"chat_id": self._chat_id, "message_id": message["message_id"], "button": button}
        self._http.post("/user/presses", json=body).raise_for_status()

    def sees(self, num_new: int) -> list[Any]:
        """The bot's next messages, once none of them grows any more."""

        def new() -> list[Any] | None:
            query: dict[str, Any] = {"sender": "bot", "at_least": self._num_seen + num_new}
            path = f"/user/chats/{self._chat_id}/messages"
            answer = self._http.get(path, params={**query, "timeout": _WAIT_SECONDS})
            messages = answer.raise_for_status().json()[self._num_seen :]
            grows = any("Stop" in json.dumps(one.get("reply_markup")) for one in messages)
            return None if grows else messages

        found = wait_until(new, "message of the bot")
        self._num_seen += len(found)
        return found

    def forget_the_past(self) -> None:
        """Let so many messages and updates have been before, as a bot that polls would confirm them."""
        for number in range(_NUM_EARLIER):
            body = {"chat_id": self._chat_id, "text": str(number)}
            self._http.post("/user/messages", json=body).raise_for_status()
        query: dict[str, Any] = {"offset": _NUM_EARLIER + 1, "timeout": 0}
        self._http.get(f"/bot{_TOKEN}/getUpdates", params=query).raise_for_status()

    def close(self) -> None:
        """Free the connection."""
        self._http.close()


@contextmanager
def _fake_bot_api(work: Path) -> Iterator[str]:
    words = [sys.executable, "-m", "tests.fake_bot_api", "--port", "0", "--token", _TOKEN]
    with running(work, [*words, "--no_limits"]) as process:
        yield process.wait_for("http://").strip()


@contextmanager
def _bot(work: Path, url: str, database: Path) -> Iterator[Running]:
    """The bot with a service of its own."""
    words = fst_words(
        *("telegram_bot", "--checkpoint", f"experiments/{LANGUAGE_MODEL}/0"),
        *("--telegram_api_base", url, "--database", database, *_OPTIONS),
    )
    with running(work, words, {"TELEGRAM_BOT_TOKEN": _TOKEN}) as process:
        process.wait_for("answering as @")
        yield process
        if (code := process.stop()) != 0:
            raise RuntimeError(f"the bot left with {code}: {process.log[-1000:]}")


def _first_life(work: Path) -> Facts:
    database = work / _DATABASE
    with _fake_bot_api(work) as url, closing(_Chat(url)) as chat, _bot(work, url, database):
        chat.says("/settings seed 14")
        chat.says("/settings temperature 0.6")
        [answer] = chat.says(_PROMPT)
        chat.presses(answer, "Continue")
        [longer] = chat.sees(1)
        with closing(_Chat(url, _ADMIN)) as admin:
            admin.says("/allow 12345")
    return {"answer": _shown(answer), "longer": _shown(longer), **_database_facts(database)}


def _second_life(work: Path) -> Facts:
    """With a copy of the database of the first one."""
    database = work / "second_life.sqlite3"
    for path in work.glob(f"{database.name}*"):
        path.unlink()
    shutil.copyfile(work / _DATABASE, database)
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT message_id FROM messages WHERE chat_id = ? ORDER BY message_id LIMIT 1"
        (first_message_id,) = connection.execute(query, (_USER,)).fetchone()
    with _fake_bot_api(work) as url, closing(_Chat(url)) as chat:
        chat.forget_the_past()
        with _bot(work, url, database):
            [answer] = chat.says(_PROMPT)
            [settings] = chat.says("/settings")
            reasons = chat.says("/why", num_new=3, reply_to_message_id=first_message_id)
    return {
        "answer": _shown(answer),
        "settings": _shown(settings)["buttons"],
        # The last one names the service's port.
        "reasons": [_shown(one) for one in reasons[:2]],
        **_database_facts(database),
    }


def _shown(message: dict[str, Any]) -> dict[str, Any]:
    rows = message.get("reply_markup", {}).get("inline_keyboard", [])
    return {
        "text": message.get("text"),
        "entities": message.get("entities", []),
        "buttons": [[button["text"] for button in row] for row in rows],
    }


def _database_facts(path: Path) -> Facts:
    """Schema, numbers of rows, and the names in columns that hold JSON."""
    with closing(sqlite3.connect(path)) as connection:
        schema = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        tables = sorted(name for name, sql in schema if sql and sql.startswith("CREATE TABLE"))
        own = [name for name in tables if not name.startswith("sqlite_")]
        rows = {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in own}
    contents = [
        json.loads(value)
        for name in own
        for row in rows[name]
        for value in row
        if isinstance(value, str) and value.startswith("{")
    ]
    return {
        "schema": {name: re.sub(r"\s+", " ", sql or "") for name, sql in schema},
        "num_rows": {name: len(rows[name]) for name in own if name not in _FORGOTTEN},
        "facts": plain(dict(rows.get("facts", []))),
        "content_keys": key_paths(contents),
    }
