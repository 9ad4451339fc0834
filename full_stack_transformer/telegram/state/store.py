"""What survives a restart: updates, jobs, replies, settings and tokens, as rows of the database.

    update ──one transaction──> jobs, replies, settings ──commit──> confirmed to Telegram
    job ──> text (committed) ──> messages (each announced, sent, committed) ──> job deleted

Knows neither Telegram's API nor the service.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from full_stack_transformer.telegram.state.database import Database, day_of
from full_stack_transformer.telegram.state.database_file import DatabaseFile
from full_stack_transformer.telegram.state.settings import Settings

# Tables whose rows belong to a chat, and are deleted with it.
_CHAT_TABLES = ("chats", "settings", "replies", "messages", "jobs", "sends", "taken")

Lane = Literal["answers", "words"]
"""`answers`: texts of the model; `words`: the bot's own messages."""
LANES: tuple[Lane, ...] = get_args(Lane)


@dataclass
class Reply:
    """A text of the model, pending or finished; the fields after `user_id` are JSON in the database."""

    id: int
    chat_id: int
    thread_id: int
    """The topic of a forum; 0 elsewhere."""
    user_id: int
    language: str
    mode: Literal["continue", "chat"]
    prompt: str
    """What the user wrote, or the text that is continued."""
    prompt_message_id: int
    settings: Settings
    seed: int
    file: dict[str, str] | None = None
    """Id and name of a text file that belongs to the prompt and has not been read yet."""
    parent_id: int | None = None
    """The reply before this one in its conversation."""
    texts: list[str] = field(default_factory=list)
    """One for each variant; empty while the reply is pending."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """The body of the request that gave each text."""
    shown: int = 0
    finish: str = ""
    """stop, length, stopped (by the user), refused or failed; empty while the reply is pending."""
    model: str = ""
    checkpoint: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The variant that is shown."""
        return self.texts[self.shown] if self.texts else ""


@dataclass
class Job:
    """Something to do for a chat."""

    id: int
    chat_id: int
    kind: str
    reply_id: int | None
    content: dict[str, Any]
    created: float


class Store(Database):
    """The rows of one bot; methods raise sqlite3.Error where the file cannot be written."""

    def __init__(self, path: Path, bot_id: int, file: DatabaseFile | None = None) -> None:
        super().__init__(path, bot_id, file)
        self.has_new_jobs = asyncio.Event()
        """Set when a job is added or moved to another chat; cleared by whoever does the jobs."""

    # Updates

    def record_update(self, update_id: int) -> bool:
        """Record an update; false if it was recorded before."""
        cursor = self._connection.execute(
            "INSERT OR IGNORE INTO updates VALUES (?, ?)", (update_id, time.time())
        )
        return cursor.rowcount == 1

    def take_once(self, chat_id: int, what: str) -> bool:
        """Record a message or press of a chat; false if it came before, under any update id."""
        cursor = self._connection.execute(
            "INSERT OR IGNORE INTO taken VALUES (?, ?, ?)", (chat_id, what, time.time())
        )
        return cursor.rowcount == 1

    # Jobs

    def add_job(
        self,
        chat_id: int,
        lane: Lane,
        kind: str,
        content: dict[str, Any] | None = None,
        reply_id: int | None = None,
    ) -> int:
        """Add a pending job; its id."""
        self.has_new_jobs.set()
        return self._run(
            "INSERT INTO jobs (chat_id, lane, kind, reply_id, content, created) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            *(chat_id, lane, kind, reply_id, json.dumps(content or {}), time.time()),
        )

    def next_job(self, chat_id: int, lane: Lane) -> Job | None:
        """The oldest pending job of a chat."""
        return self._job("lane = ? AND chat_id = ? ORDER BY id LIMIT 1", lane, chat_id)

    def _job(self, condition: str, *values: Any) -> Job | None:
        row = self._one(
            "SELECT id, chat_id, kind, reply_id, content, created FROM jobs WHERE "  # noqa: S608
            + condition,
            *values,
        )
        if row is None:
            return None
        job_id, chat_id, kind, reply_id, content, created = row
        return Job(job_id, chat_id, kind, reply_id, json.loads(content), created)

    def job(self, job_id: int) -> Job | None:
        """A job, or None once it has ended."""
        return self._job("id = ?", job_id)

    def update_job(self, job_id: int, **values: Any) -> None:
        """Add values to a job's content."""
        with self.transaction():
            job = self.job(job_id)
            if job is not None:
                content = json.dumps(job.content | values)
                self._run("UPDATE jobs SET content = ? WHERE id = ?", content, job_id)

    def has_newer_panel(self, job: Job) -> bool:
        """Whether a later job updates the same message."""
        query = (
            "SELECT 1 FROM jobs WHERE chat_id = ? AND lane = 'words' AND kind = 'panel' AND id > ? "
            "AND json_extract(content, '$.message_id') = ?"
        )
        return self._one(query, job.chat_id, job.id, job.content["message_id"]) is not None

    def end_job(self, job_id: int) -> None:
        """Delete a job, done or given up, and the record of its sends."""
        with self.transaction():
            row = self._one("SELECT chat_id FROM jobs WHERE id = ?", job_id)
            if row is not None:
                self._run(
                    "DELETE FROM sends WHERE chat_id = ? AND key LIKE ?", row[0], f"{job_id}:%"
                )
                self._run("DELETE FROM jobs WHERE id = ?", job_id)

    def chats_with_jobs(self, lane: Lane) -> list[int]:
        """Chats with pending jobs, the longest waiting first."""
        rows = self._all(
            "SELECT chat_id FROM jobs WHERE lane = ? GROUP BY chat_id ORDER BY min(id)", lane
        )
        return [row[0] for row in rows]

    def num_jobs(self, chat_id: int | None = None, lane: Lane = "answers") -> int:
        """Number of pending jobs of a lane, in one chat or in all."""
        if chat_id is None:
            return self._integer("SELECT count(*) FROM jobs WHERE lane = ?", lane)
        return self._integer(
            "SELECT count(*) FROM jobs WHERE lane = ? AND chat_id = ?", lane, chat_id
        )

    def num_unwritten(self, chat_id: int) -> int:
        """Number of texts of a chat that wait or are being written; not those that are being sent."""
        return self._integer(
            "SELECT count(*) FROM jobs JOIN replies ON replies.id = jobs.reply_id "
            "WHERE lane = 'answers' AND jobs.chat_id = ? AND NOT is_finished",
            chat_id,
        )

    def pending_replies(self, chat_id: int, user_id: int) -> list[Reply]:
        """A user's replies in a chat that are not delivered yet, oldest first."""
        rows = self._all(
            "SELECT replies.id, replies.chat_id, thread_id, user_id, replies.content "
            "FROM jobs JOIN replies ON replies.id = jobs.reply_id "
            "WHERE jobs.lane = 'answers' AND kind = 'answer' AND jobs.chat_id = ? "
            "AND replies.user_id = ? ORDER BY jobs.id",
            *(chat_id, user_id),
        )
        return [_unpack(row) for row in rows]

    # Replies

    def add_reply(self, reply: Reply) -> int:
        """Store a new reply, and set its id."""
        reply.id = self._run(
            "INSERT INTO replies (chat_id, thread_id, user_id, created, content) VALUES (?, ?, ?, ?, ?)",
            *(reply.chat_id, reply.thread_id, reply.user_id, time.time(), _pack(reply)),
        )
        return reply.id

    def save_reply(self, reply: Reply) -> None:
        """Store a reply that has changed."""
        self._run(
            "UPDATE replies SET content = ?, is_finished = ? WHERE id = ?",
            *(_pack(reply), int(bool(reply.texts or reply.finish)), reply.id),
        )

    def reply(self, reply_id: int) -> Reply | None:
        """A reply by its id."""
        return self._reply("id = ?", reply_id)

    def reply_of_message(self, chat_id: int, message_id: int) -> Reply | None:
        """The reply that a message of the bot shows.

        One whose id did not arrive here, since Telegram's response is slow or was lost, can only show what
        is being sent: a chat has one message at a time.
        """
        if self.is_own_message(chat_id, message_id):
            return self._reply(
                "id = (SELECT reply_id FROM messages WHERE chat_id = ? AND message_id = ?)",
                *(chat_id, message_id),
            )
        return self._reply(
            "id = (SELECT jobs.reply_id FROM sends "
            "JOIN jobs ON jobs.id = CAST(substr(key, 1, instr(key, ':') - 1) AS INTEGER) "
            "WHERE sends.chat_id = ? AND kind = 'answer' AND floor < ? "
            "AND (message_id IS NULL OR message_id > ?))",
            *(chat_id, message_id, message_id),
        )

    def newest_reply(
        self, chat_id: int, thread_id: int, mode: str | None = None, user_id: int | None = None
    ) -> Reply | None:
        """The last reply since /reset, pending ones included; of one mode and user if given."""
        return self._reply(
            "chat_id = ? AND thread_id = ? AND id > ? AND (? IS NULL OR user_id = ?) "
            "AND (? IS NULL OR json_extract(content, '$.mode') = ?) ORDER BY id DESC LIMIT 1",
            *(chat_id, thread_id, self._history_start(chat_id, thread_id)),
            *(user_id, user_id, mode, mode),
        )

    def _reply(self, condition: str, *values: Any) -> Reply | None:
        row = self._one(
            "SELECT id, chat_id, thread_id, user_id, content FROM replies WHERE "  # noqa: S608
            + condition,
            *values,
        )
        return None if row is None else _unpack(row)

    def conversation(self, reply_id: int | None, limit: int = 200) -> list[Reply]:
        """A reply and those before it, oldest first."""
        found: list[Reply] = []
        while reply_id is not None and len(found) < limit:
            reply = self.reply(reply_id)
            if reply is None:
                break
            found.append(reply)
            reply_id = reply.parent_id
        return found[::-1]

    # Messages of the bot

    def messages_of_reply(self, reply_id: int) -> list[int]:
        """Ids of the messages that show a reply, in order."""
        rows = self._all(
            "SELECT message_id FROM messages WHERE reply_id = ? ORDER BY position", reply_id
        )
        return [row[0] for row in rows]

    def forget_message(self, chat_id: int, message_id: int) -> None:
        """Drop the record of a message that exists no more."""
        self._run("DELETE FROM messages WHERE chat_id = ? AND message_id = ?", chat_id, message_id)

    def is_own_message(self, chat_id: int, message_id: int) -> bool:
        """Whether a message is recorded as sent by the bot."""
        query = "SELECT 1 FROM messages WHERE chat_id = ? AND message_id = ?"
        return self._one(query, chat_id, message_id) is not None

    def saw_message(self, chat_id: int, message_id: int) -> None:
        """Keep the highest message id of a chat."""
        self._run(
            "INSERT INTO chats VALUES (?, ?) ON CONFLICT (chat_id) DO UPDATE "
            "SET newest_message_id = max(newest_message_id, excluded.newest_message_id)",
            *(chat_id, message_id),
        )

    # Sends: recorded before they are tried, and again with the message's id

    def begin_send(self, chat_id: int, key: str) -> tuple[bool, int, int | None]:
        """Record that a message is about to be sent.

        Returns:
            Whether an earlier attempt may have succeeded; the highest message id known before the
            first attempt; the message's id if it is known to be sent.
        """
        row = self._one(
            "SELECT floor, message_id FROM sends WHERE chat_id = ? AND key = ?", chat_id, key
        )
        if row is not None:
            return True, row[0], row[1]
        floor = self._integer("SELECT newest_message_id FROM chats WHERE chat_id = ?", chat_id)
        self._run("INSERT INTO sends VALUES (?, ?, ?, NULL)", chat_id, key, floor)
        return False, floor, None

    def cancel_send(self, chat_id: int, key: str) -> None:
        """Record that nothing was sent, because Telegram refused the message."""
        self._run("DELETE FROM sends WHERE chat_id = ? AND key = ?", chat_id, key)

    def end_send(
        self, chat_id: int, key: str, message_id: int, reply_id: int | None, position: int
    ) -> None:
        """Record that a message was sent, and which part of which reply it shows."""
        with self.transaction():
            self._run(
                "UPDATE sends SET message_id = ? WHERE chat_id = ? AND key = ?",
                *(message_id, chat_id, key),
            )
            self._run(
                "INSERT OR REPLACE INTO messages VALUES (?, ?, ?, ?)",
                *(chat_id, message_id, reply_id, position),
            )
            self.saw_message(chat_id, message_id)

    # Settings and conversations

    def settings(self, chat_id: int, thread_id: int, default: Settings) -> Settings:
        """The settings of a chat or topic."""
        row = self._one(
            "SELECT content FROM settings WHERE chat_id = ? AND thread_id = ?", chat_id, thread_id
        )
        return default if row is None or row[0] is None else Settings.from_json(row[0])

    def save_settings(self, chat_id: int, thread_id: int, settings: Settings) -> None:
        """Store the settings of a chat or topic."""
        self._run(
            "INSERT INTO settings (chat_id, thread_id, content) VALUES (?, ?, ?) "
            "ON CONFLICT (chat_id, thread_id) DO UPDATE SET content = excluded.content",
            *(chat_id, thread_id, settings.as_json()),
        )

    def begin_conversation(self, chat_id: int, thread_id: int) -> None:
        """Begin a new conversation: earlier replies do not belong to it."""
        newest = self._integer("SELECT max(id) FROM replies WHERE chat_id = ?", chat_id)
        self._run(
            "INSERT INTO settings (chat_id, thread_id, history_start) VALUES (?, ?, ?) "
            "ON CONFLICT (chat_id, thread_id) DO UPDATE SET history_start = excluded.history_start",
            *(chat_id, thread_id, newest),
        )

    def _history_start(self, chat_id: int, thread_id: int) -> int:
        return self._integer(
            "SELECT history_start FROM settings WHERE chat_id = ? AND thread_id = ?",
            *(chat_id, thread_id),
        )

    # People

    def tokens_today(self, user_id: int) -> int:
        """Number of tokens generated for a user since midnight UTC."""
        return self._integer(
            "SELECT num_tokens FROM tokens WHERE user_id = ? AND day = ?",
            *(user_id, day_of(time.time())),
        )

    def add_tokens(self, user_id: int, num_tokens: int) -> None:
        """Count tokens that were generated for a user."""
        self._run(
            "INSERT INTO tokens VALUES (?, ?, ?) ON CONFLICT (user_id, day) DO UPDATE "
            "SET num_tokens = num_tokens + excluded.num_tokens",
            *(user_id, day_of(time.time()), num_tokens),
        )

    def allow(self, guest_id: int, is_allowed: bool) -> None:
        """Allow or deny a user or chat; this overrides --allowed_ids."""
        self._run("INSERT OR REPLACE INTO guests VALUES (?, ?)", guest_id, int(is_allowed))

    def guests(self) -> dict[int, bool]:
        """Users and chats that admins allowed or denied."""
        return {row[0]: bool(row[1]) for row in self._all("SELECT id, is_allowed FROM guests")}

    # Chats that move or are deleted

    def move_chat(self, old_id: int, new_id: int) -> None:
        """Move everything to the new id of a group; its messages have new ids, so those are dropped."""
        self.has_new_jobs.set()
        with self.transaction():
            for table in ("settings", "replies", "jobs"):
                self._run(
                    f"UPDATE OR REPLACE {table} SET chat_id = ? WHERE chat_id = ?",  # noqa: S608
                    *(new_id, old_id),
                )
            for table in ("chats", "messages", "sends"):
                self._run(f"DELETE FROM {table} WHERE chat_id = ?", old_id)  # noqa: S608
            self._run("UPDATE OR REPLACE guests SET id = ? WHERE id = ?", new_id, old_id)

    def forget_chat(self, chat_id: int) -> None:
        """Delete everything of a chat."""
        self._has_deleted = True
        with self.transaction():
            for table in _CHAT_TABLES:
                self._run(f"DELETE FROM {table} WHERE chat_id = ?", chat_id)  # noqa: S608

    def forget_user_in_chat(self, chat_id: int, user_id: int) -> None:
        """Delete a user's replies and jobs in a group."""
        self._has_deleted = True
        with self.transaction():
            mine = "(SELECT id FROM replies WHERE chat_id = ? AND user_id = ?)"
            for table in ("jobs", "messages"):
                self._run(f"DELETE FROM {table} WHERE reply_id IN {mine}", chat_id, user_id)  # noqa: S608
            self._run("DELETE FROM replies WHERE chat_id = ? AND user_id = ?", chat_id, user_id)

    def export_chat(self, chat_id: int, user_id: int) -> dict[str, Any]:
        """Everything that is stored about a private chat and its user."""
        replies = [
            {"created": created, **asdict(_unpack(row))}
            for *row, created in self._all(
                "SELECT id, chat_id, thread_id, user_id, content, created FROM replies "
                "WHERE chat_id = ? ORDER BY id",
                chat_id,
            )
        ]
        settings = self._all(
            "SELECT thread_id, content, history_start FROM settings WHERE chat_id = ?", chat_id
        )
        return {
            "chat_id": chat_id,
            "user_id": user_id,
            "tokens_by_day": dict(
                self._all("SELECT day, num_tokens FROM tokens WHERE user_id = ?", user_id)
            ),
            "settings": [
                {
                    "thread_id": thread_id,
                    "values": None if content is None else json.loads(content),
                    "history_start": history_start,
                }
                for thread_id, content, history_start in settings
            ],
            "replies": replies,
        }


def _pack(reply: Reply) -> str:
    """The column `content`: all fields that have no column of their own."""
    content = asdict(reply)
    for name in ("id", "chat_id", "thread_id", "user_id"):
        del content[name]
    return json.dumps(content)


def _unpack(row: Sequence[Any]) -> Reply:
    """A reply from the columns id, chat_id, thread_id, user_id, content."""
    reply_id, chat_id, thread_id, user_id, packed = row
    content = json.loads(packed)
    content["settings"] = Settings(**content["settings"])
    return Reply(id=reply_id, chat_id=chat_id, thread_id=thread_id, user_id=user_id, **content)
