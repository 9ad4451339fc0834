"""The bot's SQLite file: schema, lock, transactions.

Write-ahead log with `synchronous=FULL`: what is committed survives kill -9 and a power cut. A lock
admits one process at a time, `check` notices a file that was deleted, moved, replaced or overwritten,
and `rescue` saves what it held. Knows the tables, not what their rows mean.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shlex
import sqlite3
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from full_stack_transformer.errors import MachineError, UsageError

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
# SQLite's own locks are at 2**30, https://www.sqlite.org/src/file/src/os.h; this byte is never reached.
# A lock of the open file: SQLite, which opens and closes the file, would end a lock of the process.
# `struct flock` of fcntl(2): type, whence, start, length, process.
_ONE_BYTE_LOCK = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 2**40, 1, 0)
# Where a number of each process stands in the file's header: https://www.sqlite.org/fileformat2.html
_VERSION_OFFSET, _VERSION_BYTES = 60, 4
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


class _File:
    """The file at the path of a database: private, locked for one process, and watched.

    The lock belongs to the file, not to its name: it is the same through links and other paths. The
    descriptor stays open until SQLite has closed its own: closing it would end SQLite's locks.

    Raises:
        MachineError: another process uses the file, or it cannot be opened or made private.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.real_path = path.resolve()
            if path.exists() and not path.is_file():
                raise MachineError(f"--database {path} is not a regular file; pass another file")
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise MachineError(
                f"--database {path} cannot be written: {error.strerror}; pass another file"
            ) from None
        try:
            self._lock()
            self._make_private()
        except BaseException:
            self.close()
            raise
        self._identities: dict[Path, tuple[int, int] | None] = {}
        self._version: bytes | None = None

    def sibling(self, ending: str) -> Path:
        """A file beside the database; SQLite puts its log beside what a symbolic link points to."""
        return self.real_path.with_name(self.real_path.name + ending)

    def _lock(self) -> None:
        try:
            if hasattr(fcntl, "F_OFD_SETLK"):
                fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _ONE_BYTE_LOCK)
            else:  # not Linux: a lock of the name, links to which are followed
                self._lock_file = self.sibling(".lock").open("w")
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise MachineError(
                f"--database {self.path} is used by another bot process; stop it, or pass another file"
            ) from None
        except OSError as error:
            raise MachineError(
                f"--database {self.path} cannot be locked: {error.strerror}; put it on a local disk"
            ) from None

    def _make_private(self) -> None:
        """Let nobody else read users' texts, whatever the umask; SQLite's log gets the same mode."""
        found = os.fstat(self._descriptor)
        mode = stat.S_IMODE(found.st_mode)
        try:
            if mode != 0o600:
                os.fchmod(self._descriptor, 0o600)
            for ending in ("-wal", "-shm", ".lock"):
                with contextlib.suppress(FileNotFoundError):
                    self.sibling(ending).chmod(0o600)
        except OSError:
            raise MachineError(
                f"--database {self.path} belongs to another user (its mode is {mode:04o}), so it cannot "
                f"be made private; as that user, type: chmod 600 {shlex.quote(str(self.path))}*"
            ) from None
        if mode & 0o077 and found.st_size:
            logger.warning(
                "--database %s could be read by other users (mode %04o); now only by its owner (0600)",
                *(self.path, mode),
            )
        if found.st_nlink > 1:
            logger.warning(
                "--database %s has %d names (hard links); always start the bot with this one, as "
                "SQLite's log belongs to one name",
                *(self.path, found.st_nlink),
            )

    def watch(self, version: int | None) -> None:
        """Remember what the file and its log are now; `version` is in the header, if known."""
        self._version = None if version is None else version.to_bytes(_VERSION_BYTES, "big")
        paths = (self.path, self.real_path, self.sibling("-wal"))
        self._identities = {path: _identity(path) for path in paths}

    @property
    def is_complete(self) -> bool:
        """Whether the file and its log are still at their paths."""
        return all(_identity(path) == known for path, known in self._identities.items())

    @property
    def has_log(self) -> bool:
        """Whether what is beside the path is still the log."""
        path = self.sibling("-wal")
        return _identity(path) == self._identities[path]

    @property
    def is_at_its_path(self) -> bool:
        """Whether the file is at its path, with or without its log."""
        return all(_identity(p) == self._identities[p] for p in (self.path, self.real_path))

    @property
    def is_overwritten(self) -> bool:
        """Whether somebody else has written into the file, such as by copying another one over it."""
        found = os.pread(self._descriptor, _VERSION_BYTES, _VERSION_OFFSET)
        return self._version not in (None, found)

    @contextlib.contextmanager
    def spared(self) -> Iterator[None]:
        """Inside, SQLite does not write its log into a file that somebody else has written."""
        if not (self.is_overwritten and self.is_at_its_path):
            yield
            return
        aside = self.sibling(f".{secrets.token_hex(4)}")
        self.real_path.rename(aside)  # SQLite leaves a file alone that is not at its path
        try:
            yield
        finally:
            aside.rename(self.real_path)
            for ending in ("-wal", "-shm"):
                self.sibling(ending).unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Database:
    """The file of one bot; its methods are quick and are called from the event loop's thread.

    Raises:
        MachineError: another process uses the file, or it cannot be written.
        UsageError: the file belongs to another bot or another version.
    """

    def __init__(self, path: Path, bot_id: int) -> None:
        self._has_deleted = False
        self.is_failing = False
        """Whether the last attempt to write failed, such as on a full disk."""
        self._file = _File(path)
        try:
            self._connection = self._open(path, bot_id)
        except BaseException:
            self._file.close()
            raise

    def _open(self, path: Path, bot_id: int) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file.real_path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA secure_delete=ON")  # /forget leaves no text in free pages
            connection.executescript(_SCHEMA)
            for name, value in (("format", _FORMAT_VERSION), ("bot", bot_id)):
                connection.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, str(value)))
            facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
            if facts["bot"] != str(bot_id) or facts["format"] != str(_FORMAT_VERSION):
                raise UsageError(
                    f"--database {path} belongs to bot {facts['bot']} (format {facts['format']}), this "
                    f"is bot {bot_id} (format {_FORMAT_VERSION}); pass another file"
                )
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
        if self._file.is_overwritten or not self._file.is_complete:
            raise DatabaseLostError

    def rescue(self) -> str:
        """Save the content of a file that was lost; one sentence that says where, for the operator.

        It goes back to its path if nothing is there now, else beside it.
        """
        path, num_jobs = self._file.path, "the"
        begin = (
            f"--database {path} was deleted, moved, replaced or overwritten while the bot ran, so it "
            "stopped"
        )
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
            return _moved_to_a_free_name(copy, file.path)
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
    if "locked" in str(error):
        return "close the program that uses it"
    return "move it away, or pass another file"


def _moved_to_a_free_name(file: Path, path: Path) -> Path:
    """Move a file to a path, or beside it if the path is taken; where it is now."""
    number = 0
    while True:
        ending = ".rescued" + (f"-{number}" if number > 1 else "") if number else ""
        target = path.with_name(path.name + ending)
        try:
            os.link(file, target)  # unlike a renaming it never replaces a file
        except FileExistsError:
            number += 1
        else:
            file.unlink()
            return target


def day_of(seconds: float) -> str:
    """The day of a timestamp, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
