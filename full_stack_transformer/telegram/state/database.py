"""The bot's SQLite file: schema, lock, transactions.

Write-ahead log with `synchronous=FULL`: what is committed survives kill -9 and a power cut. A lock
admits one process at a time. Knows the tables, not what their rows mean.
"""

import contextlib
import fcntl
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from full_stack_transformer.errors import MachineError, UsageError

_FORMAT_VERSION = 1
# Telegram keeps unconfirmed updates for a day; https://core.telegram.org/bots/api#getupdates
_KEEP_UPDATES_SECONDS = 8 * 24 * 3600
_KEEP_REPLIES_SECONDS = 90 * 24 * 3600

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS updates (update_id INTEGER PRIMARY KEY, recorded REAL NOT NULL);
CREATE TABLE IF NOT EXISTS chats (
    chat_id INTEGER PRIMARY KEY,
    newest_message_id INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS settings (
    chat_id INTEGER, thread_id INTEGER, content TEXT, history_start INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (chat_id, thread_id)
);
CREATE TABLE IF NOT EXISTS tokens (
    user_id INTEGER, day TEXT, num_tokens INTEGER NOT NULL, PRIMARY KEY (user_id, day)
);
CREATE TABLE IF NOT EXISTS guests (id INTEGER PRIMARY KEY, is_allowed INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS replies (
    id INTEGER PRIMARY KEY AUTOINCREMENT, chat_id INTEGER NOT NULL, thread_id INTEGER NOT NULL,
    user_id INTEGER NOT NULL, created REAL NOT NULL, is_finished INTEGER NOT NULL DEFAULT 0,
    content TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS replies_of_chat ON replies (chat_id, thread_id, id);
CREATE TABLE IF NOT EXISTS messages (
    chat_id INTEGER, message_id INTEGER, reply_id INTEGER, position INTEGER,
    PRIMARY KEY (chat_id, message_id)
);
CREATE INDEX IF NOT EXISTS messages_of_reply ON messages (reply_id, position);
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, chat_id INTEGER NOT NULL, lane TEXT NOT NULL,
    kind TEXT NOT NULL, reply_id INTEGER, content TEXT NOT NULL, created REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_of_lane ON jobs (lane, chat_id, id);
CREATE INDEX IF NOT EXISTS jobs_of_reply ON jobs (reply_id);
CREATE TABLE IF NOT EXISTS sends (
    chat_id INTEGER, key TEXT, floor INTEGER NOT NULL, message_id INTEGER,
    PRIMARY KEY (chat_id, key)
);
"""


class Database:
    """The file of one bot; its methods are quick and are called from the event loop's thread.

    Raises:
        MachineError: another process uses the file, or it cannot be written.
        UsageError: the file belongs to another bot or another version.
    """

    def __init__(self, path: Path, bot_id: int) -> None:
        self._has_deleted = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.with_name(path.name + ".lock").open("w")
        except OSError as error:
            raise MachineError(
                f"--database {path} cannot be written: {error.strerror}; pass another file"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise MachineError(
                f"--database {path} is used by another bot process; stop it, or pass another file"
            ) from None
        try:
            self._connection = self._open(path, bot_id)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, path: Path, bot_id: int) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(path, isolation_level=None)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA secure_delete=ON")  # /forget leaves no text in free pages
            connection.executescript(_SCHEMA)
            for name, value in (("format", _FORMAT_VERSION), ("bot", bot_id)):
                connection.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, str(value)))
            facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
        except sqlite3.Error as error:
            raise MachineError(
                f"--database {path} cannot be used: {error}; move it away, or pass another file"
            ) from None
        if facts["bot"] != str(bot_id) or facts["format"] != str(_FORMAT_VERSION):
            connection.close()
            raise UsageError(
                f"--database {path} belongs to bot {facts['bot']} (format {facts['format']}), this is "
                f"bot {bot_id} (format {_FORMAT_VERSION}); pass another file"
            )
        now = time.time()
        connection.execute("DELETE FROM updates WHERE recorded < ?", (now - _KEEP_UPDATES_SECONDS,))
        connection.execute(
            "DELETE FROM replies WHERE is_finished AND created < ?", (now - _KEEP_REPLIES_SECONDS,)
        )
        connection.execute("DELETE FROM tokens WHERE day < ?", (day_of(now - 8 * 86400),))
        return connection

    def close(self) -> None:
        """Close the file and release its lock."""
        self._connection.close()
        self._lock.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all changes of the block or none; may be nested."""
        name = "SAVEPOINT step" if self._connection.in_transaction else "BEGIN IMMEDIATE"
        nested = self._connection.in_transaction
        self._connection.execute(name)
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK TO step" if nested else "ROLLBACK")
            if nested:
                self._connection.execute("RELEASE step")
            raise
        self._connection.execute("RELEASE step" if nested else "COMMIT")

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(query, values).fetchall()

    def _one(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        found: tuple[Any, ...] | None = self._connection.execute(query, values).fetchone()
        return found

    def _run(self, query: str, *values: Any) -> int:
        cursor = self._connection.execute(query, values)
        return cursor.lastrowid or 0

    def _integer(self, query: str, *values: Any) -> int:
        row = self._one(query, *values)
        return int(row[0] or 0) if row else 0

    def erase(self) -> None:
        """Remove deleted rows from the write-ahead log too; call it outside of a transaction."""
        if self._has_deleted and not self._connection.in_transaction:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._has_deleted = False


def day_of(seconds: float) -> str:
    """The day of a timestamp, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
