"""The bot's SQLite file: schema, lock, transactions.

Write-ahead log with `synchronous=FULL`: what is committed survives kill -9 and a power cut. A lock
admits one process at a time, `check` notices a file that was deleted, moved, replaced or overwritten,
and `rescue` saves what it held. Knows the tables, not what their rows mean.
"""

import contextlib
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from full_stack_transformer.errors import MachineError, UsageError
from full_stack_transformer.telegram.state.database_file import DatabaseFile, moved_to_a_free_name

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
# Telegram keeps unconfirmed updates for a day; https://core.telegram.org/bots/api#getupdates
_KEEP_UPDATES_SECONDS = 8 * 24 * 3600
_KEEP_REPLIES_SECONDS = 90 * 24 * 3600

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS updates (update_id INTEGER PRIMARY KEY, recorded REAL NOT NULL);
CREATE TABLE IF NOT EXISTS taken (
    chat_id INTEGER, what TEXT, recorded REAL NOT NULL, PRIMARY KEY (chat_id, what)
);
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


class DatabaseLostError(Exception):
    """What was committed is not in the file at the database's path any more."""


def is_fault(error: BaseException) -> bool:
    """Whether an error is one of the file or the disk, and not a mistake in a query."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError


class Database:
    """The file of one bot; its methods are quick and are called from the event loop's thread.

    Args:
        path: of the file.
        bot_id: of the bot.
        file: the same file, where this process has locked it already.

    Raises:
        MachineError: another process uses the file, or it cannot be written.
        UsageError: the file belongs to another bot or another version.
    """

    def __init__(self, path: Path, bot_id: int, file: DatabaseFile | None = None) -> None:
        self._has_deleted = False
        self.is_failing = False
        """Whether the last attempt to write failed, such as on a full disk."""
        self._file = file or DatabaseFile(path)
        try:
            if file is None and not self._file.lock():
                raise MachineError(
                    f"--database {path} is used by another bot process; stop it, or pass another file"
                )
            self._connection = self._open(path, bot_id)
        except BaseException:
            self._file.close()
            raise

    def _open(self, path: Path, bot_id: int) -> sqlite3.Connection:
        # A short time-out, as waiting for another program's lock holds up all chats.
        connection = sqlite3.connect(self._file.real_path, timeout=1.0, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA secure_delete=ON")  # /forget leaves no text in free pages
            connection.executescript(_SCHEMA)
            for name, value in (("format", _FORMAT_VERSION), ("bot", bot_id)):
                connection.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, str(value)))
            _check_owner(connection, path, bot_id)
            _prune(connection)
            version = secrets.randbelow(2**31)
            connection.execute(f"PRAGMA user_version={version}")
            (is_busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._file.watch(None if is_busy else version)
        except sqlite3.Error as error:
            connection.close()
            raise MachineError(
                f"--database {path} cannot be used: {error}; {_advice(error)}"
            ) from None
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close the file and release its lock."""
        with self._file.spared():
            self._connection.close()
        self._file.close()

    def check(self) -> None:
        """Make sure that what is committed will be found at the next start.

        Raises:
            DatabaseLostError: the file or its log was deleted, moved, replaced or overwritten.
        """
        if self._file.loss is not None:
            raise DatabaseLostError

    def rescue(self) -> str:
        """Save the content of a file that was lost; one sentence that says where, for the operator.

        It goes back to its path if nothing is there now, else beside it.
        """
        path, num_jobs = self._file.path, "the"
        begin = f"--database {path} {self._file.loss} while the bot was running, so it stopped"
        try:
            num_jobs = str(self._integer("SELECT count(*) FROM jobs"))
            saved = self._saved()
        except (OSError, sqlite3.Error) as error:
            return (
                f"{begin}; {num_jobs} pending messages are lost, as they cannot be saved: {error}"
            )
        kept = f"{begin}; its {num_jobs} pending messages and all that it stored are in {saved}"
        if saved == path:
            return f"{kept}: start it again"
        return f"{kept}: move that to {path}, and start it again"

    def _saved(self) -> Path:
        """The path of a file with everything that was committed."""
        file = self._file
        if file.is_at_its_path and not file.is_overwritten:  # only the log is gone
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            file.sibling("-wal").unlink(missing_ok=True)
            return file.path
        copy = file.path.with_name(f"{file.path.name}.{secrets.token_hex(4)}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        copy.chmod(0o600)
        try:
            with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as target:
                self._connection.backup(target)
                (verdict,) = target.execute("PRAGMA quick_check").fetchone()
                if verdict != "ok":
                    raise sqlite3.DatabaseError(verdict)
            if file.has_log and not file.path.exists():
                # SQLite would take the log for that of the file that comes here now.
                for ending in ("-wal", "-shm"):
                    file.sibling(ending).unlink(missing_ok=True)
            return moved_to_a_free_name(copy, file.path)
        finally:
            copy.unlink(missing_ok=True)

    def report(self, error: sqlite3.Error) -> None:
        """Say once that the file cannot be written; `transaction` says when it can be again."""
        if not self.is_failing:
            logger.error(
                "--database %s cannot be written (%s); %s. The bot waits, and loses nothing",
                *(self._file.path, error, _advice(error)),
            )
        self.is_failing = True

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all changes of the block or none; may be nested."""
        nested = self._connection.in_transaction
        self._connection.execute("SAVEPOINT step" if nested else "BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("RELEASE step" if nested else "COMMIT")
        except BaseException:
            # A full disk makes SQLite roll back by itself, or leaves a COMMIT undone.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK TO step" if nested else "ROLLBACK")
                if nested:
                    self._connection.execute("RELEASE step")
            raise
        if self.is_failing and not nested:
            self.is_failing = False
            logger.info("--database %s can be written again", self._file.path)

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
            with contextlib.suppress(sqlite3.OperationalError):  # then the next call does it
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._has_deleted = False


def check_owner(path: Path, bot_id: int) -> None:
    """Refuse the file of another bot while another process uses it; changes nothing.

    Raises:
        UsageError: it belongs to another bot or another version.
        sqlite3.Error: it cannot be read, such as one in which nothing stands yet.
    """
    address = f"{path.resolve().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=1.0)) as connection:
        _check_owner(connection, path, bot_id)


def _check_owner(connection: sqlite3.Connection, path: Path, bot_id: int) -> None:
    facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
    if facts.get("bot") != str(bot_id) or facts.get("format") != str(_FORMAT_VERSION):
        raise UsageError(
            f"--database {path} belongs to bot {facts.get('bot')} (format {facts.get('format')}), this is "
            f"bot {bot_id} (format {_FORMAT_VERSION}); pass another file"
        )


def _prune(connection: sqlite3.Connection) -> None:
    now = time.time()
    for table in ("updates", "taken"):
        connection.execute(
            f"DELETE FROM {table} WHERE recorded < ?",  # noqa: S608
            (now - _KEEP_UPDATES_SECONDS,),
        )
    connection.execute(
        "DELETE FROM replies WHERE is_finished AND created < ?", (now - _KEEP_REPLIES_SECONDS,)
    )
    connection.execute("DELETE FROM tokens WHERE day < ?", (day_of(now - 8 * 86400),))


def _advice(error: sqlite3.Error) -> str:
    if any(words in str(error) for words in ("full", "disk I/O")):
        return "free some space"
    if "readonly" in str(error):
        return "make it and its folder writable"
    if "locked" in str(error):
        return "close the program that uses it"
    return "move it away, or pass another file"


def day_of(seconds: float) -> str:
    """The day of a timestamp, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
