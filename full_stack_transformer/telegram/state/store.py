"""Everything that must outlive the process, in one SQLite file: updates, jobs, replies, settings.

    update ──one transaction──> jobs, replies, settings ──commit──> confirmed to Telegram
    job ──> text (committed) ──> messages (each intended, sent, committed) ──> job deleted

Knows neither Telegram's API nor the service.
"""

import json
import time
from dataclasses import asdict
from typing import Any

from full_stack_transformer.telegram.state.database import Database, day_of
from full_stack_transformer.telegram.state.records import Job, Lane, Reply, pack_reply, unpack_reply
from full_stack_transformer.telegram.state.settings import Settings

# Tables whose rows belong to a chat: they move when the chat does, and go when it does.
_CHAT_TABLES = ("chats", "settings", "replies", "messages", "jobs", "sends")


class Store(Database):
    """Everything that the bot owes and remembers."""

    # Updates

    def take_update(self, update_id: int) -> bool:
        """Record an update; false where it is recorded already."""
        cursor = self._connection.execute(
            "INSERT OR IGNORE INTO updates VALUES (?, ?)", (update_id, time.time())
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
        """Owe something to a chat."""
        return self._run(
            "INSERT INTO jobs (chat_id, lane, kind, reply_id, content, created) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            *(chat_id, lane, kind, reply_id, json.dumps(content or {}), time.time()),
        )

    def next_job(self, chat_id: int, lane: Lane) -> Job | None:
        """The oldest thing that is owed to a chat."""
        return self._job("lane = ? AND chat_id = ? ORDER BY id LIMIT 1", lane, chat_id)

    def job_of_reply(self, reply_id: int) -> Job | None:
        """The job that makes a reply, while it is owed."""
        return self._job("reply_id = ? AND kind = 'answer'", reply_id)

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
        """A job, while it is owed."""
        return self._job("id = ?", job_id)

    def remember(self, job_id: int, **values: Any) -> None:
        """Add to what a job remembers."""
        with self.transaction():
            job = self.job(job_id)
            if job is not None:
                content = json.dumps(job.content | values)
                self._run("UPDATE jobs SET content = ? WHERE id = ?", content, job_id)

    def has_newer_panel(self, job: Job) -> bool:
        """Whether the same message will be shown anew anyway."""
        query = (
            "SELECT 1 FROM jobs WHERE chat_id = ? AND lane = 'words' AND kind = 'panel' AND id > ? "
            "AND json_extract(content, '$.message_id') = ?"
        )
        return self._one(query, job.chat_id, job.id, job.content["message_id"]) is not None

    def end_job(self, job_id: int) -> None:
        """It is given, or given up; with the memory of how it was sent."""
        with self.transaction():
            row = self._one("SELECT chat_id FROM jobs WHERE id = ?", job_id)
            if row is not None:
                self._run(
                    "DELETE FROM sends WHERE chat_id = ? AND key LIKE ?", row[0], f"{job_id}:%"
                )
                self._run("DELETE FROM jobs WHERE id = ?", job_id)

    def chats_with_jobs(self, lane: Lane) -> list[int]:
        """Chats that something is owed to, the longest waiting first."""
        rows = self._all(
            "SELECT chat_id FROM jobs WHERE lane = ? GROUP BY chat_id ORDER BY min(id)", lane
        )
        return [row[0] for row in rows]

    def num_jobs(self, chat_id: int | None = None, lane: Lane = "answers") -> int:
        """Jobs of a lane, of one chat or of all."""
        if chat_id is None:
            return self._number("SELECT count(*) FROM jobs WHERE lane = ?", lane)
        return self._number(
            "SELECT count(*) FROM jobs WHERE lane = ? AND chat_id = ?", lane, chat_id
        )

    def num_unwritten(self, chat_id: int) -> int:
        """Texts of a chat that wait or are being written; not those that are being sent."""
        return self._number(
            "SELECT count(*) FROM jobs JOIN replies ON replies.id = jobs.reply_id "
            "WHERE lane = 'answers' AND jobs.chat_id = ? AND NOT is_finished",
            chat_id,
        )

    def waiting_answers(self, chat_id: int, user_id: int) -> list[tuple[int, int]]:
        """(job, reply) of a user's owed replies in a chat, oldest first."""
        rows = self._all(
            "SELECT jobs.id, replies.id FROM jobs JOIN replies ON replies.id = jobs.reply_id "
            "WHERE jobs.lane = 'answers' AND kind = 'answer' AND jobs.chat_id = ? "
            "AND replies.user_id = ? ORDER BY jobs.id",
            *(chat_id, user_id),
        )
        return [(row[0], row[1]) for row in rows]

    # Replies

    def add_reply(self, reply: Reply) -> int:
        """Keep a new reply; its number is given here."""
        reply.id = self._run(
            "INSERT INTO replies (chat_id, thread_id, user_id, created, content) VALUES (?, ?, ?, ?, ?)",
            *(reply.chat_id, reply.thread_id, reply.user_id, time.time(), pack_reply(reply)),
        )
        return reply.id

    def save_reply(self, reply: Reply) -> None:
        """Keep what became of a reply."""
        self._run(
            "UPDATE replies SET content = ?, is_finished = ? WHERE id = ?",
            *(pack_reply(reply), int(bool(reply.texts or reply.finish)), reply.id),
        )

    def reply(self, reply_id: int) -> Reply | None:
        """A reply by its number."""
        return self._reply("id = ?", reply_id)

    def reply_of_message(self, chat_id: int, message_id: int) -> Reply | None:
        """The reply that a message of the bot belongs to."""
        return self._reply(
            "id = (SELECT reply_id FROM messages WHERE chat_id = ? AND message_id = ?)",
            *(chat_id, message_id),
        )

    def newest_reply(
        self, chat_id: int, thread_id: int, mode: str | None = None, user_id: int | None = None
    ) -> Reply | None:
        """The last reply since /reset, also one that is still owed; of one mode and user if given."""
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
        return None if row is None else unpack_reply(row)

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

    def drop_reply(self, reply_id: int) -> None:
        """A reply that is not wanted any more, with its job."""
        with self.transaction():
            job = self.job_of_reply(reply_id)
            if job is not None:
                self.end_job(job.id)
            self._run("DELETE FROM replies WHERE id = ?", reply_id)

    # Messages of the bot

    def messages_of_reply(self, reply_id: int) -> list[int]:
        """Messages that show a reply, in order."""
        rows = self._all(
            "SELECT message_id FROM messages WHERE reply_id = ? ORDER BY position", reply_id
        )
        return [row[0] for row in rows]

    def forget_message(self, chat_id: int, message_id: int) -> None:
        """A message that is gone."""
        self._run("DELETE FROM messages WHERE chat_id = ? AND message_id = ?", chat_id, message_id)

    def is_own_message(self, chat_id: int, message_id: int) -> bool:
        """Whether a message was sent by us, as far as we know."""
        query = "SELECT 1 FROM messages WHERE chat_id = ? AND message_id = ?"
        return self._one(query, chat_id, message_id) is not None

    def saw_message(self, chat_id: int, message_id: int) -> None:
        """Remember the highest number of a message in a chat."""
        self._run(
            "INSERT INTO chats VALUES (?, ?) ON CONFLICT (chat_id) DO UPDATE "
            "SET newest_message_id = max(newest_message_id, excluded.newest_message_id)",
            *(chat_id, message_id),
        )

    # Sends: an intention before, a number after

    def intend_send(self, chat_id: int, key: str) -> tuple[bool, int, int | None]:
        """Write down that a message is about to be sent.

        Returns:
            Whether an earlier attempt may have succeeded; the highest message number known before the
            first attempt; the message's number where it is known to be sent.
        """
        row = self._one(
            "SELECT floor, message_id FROM sends WHERE chat_id = ? AND key = ?", chat_id, key
        )
        if row is not None:
            return True, row[0], row[1]
        floor = self._number("SELECT newest_message_id FROM chats WHERE chat_id = ?", chat_id)
        self._run("INSERT INTO sends VALUES (?, ?, ?, NULL)", chat_id, key, floor)
        return False, floor, None

    def withdraw_send(self, chat_id: int, key: str) -> None:
        """Telegram said no: nothing was sent."""
        self._run("DELETE FROM sends WHERE chat_id = ? AND key = ?", chat_id, key)

    def sent(
        self, chat_id: int, key: str, message_id: int, reply_id: int | None, position: int
    ) -> None:
        """Telegram took a message; remembered together with whose it is."""
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
        """Of a chat or topic."""
        row = self._one(
            "SELECT content FROM settings WHERE chat_id = ? AND thread_id = ?", chat_id, thread_id
        )
        return default if row is None or row[0] is None else Settings.from_json(row[0])

    def save_settings(self, chat_id: int, thread_id: int, settings: Settings) -> None:
        """Keep the settings of a chat or topic."""
        self._run(
            "INSERT INTO settings (chat_id, thread_id, content) VALUES (?, ?, ?) "
            "ON CONFLICT (chat_id, thread_id) DO UPDATE SET content = excluded.content",
            *(chat_id, thread_id, settings.as_json()),
        )

    def begin_conversation(self, chat_id: int, thread_id: int) -> None:
        """Replies so far are no part of what comes."""
        newest = self._number("SELECT max(id) FROM replies WHERE chat_id = ?", chat_id)
        self._run(
            "INSERT INTO settings (chat_id, thread_id, history_start) VALUES (?, ?, ?) "
            "ON CONFLICT (chat_id, thread_id) DO UPDATE SET history_start = excluded.history_start",
            *(chat_id, thread_id, newest),
        )

    def _history_start(self, chat_id: int, thread_id: int) -> int:
        return self._number(
            "SELECT history_start FROM settings WHERE chat_id = ? AND thread_id = ?",
            *(chat_id, thread_id),
        )

    # People

    def tokens_today(self, user_id: int) -> int:
        """New tokens that were made for a user since midnight UTC."""
        return self._number(
            "SELECT num_tokens FROM tokens WHERE user_id = ? AND day = ?",
            *(user_id, day_of(time.time())),
        )

    def charge(self, user_id: int, num_tokens: int) -> None:
        """Count tokens that were made for a user."""
        self._run(
            "INSERT INTO tokens VALUES (?, ?, ?) ON CONFLICT (user_id, day) DO UPDATE "
            "SET num_tokens = num_tokens + excluded.num_tokens",
            *(user_id, day_of(time.time()), num_tokens),
        )

    def allow(self, guest_id: int, is_allowed: bool) -> None:
        """Let a user or chat in, or shut it out; stronger than the option."""
        self._run("INSERT OR REPLACE INTO guests VALUES (?, ?)", guest_id, int(is_allowed))

    def guests(self) -> dict[int, bool]:
        """Users and chats that admins decided on."""
        return {row[0]: bool(row[1]) for row in self._all("SELECT id, is_allowed FROM guests")}

    # The end of a chat

    def move_chat(self, old_id: int, new_id: int) -> None:
        """A group became a supergroup: everything follows it, and its messages have new numbers."""
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
        """Delete all rows of a chat."""
        self._has_forgotten = True
        with self.transaction():
            for table in _CHAT_TABLES:
                self._run(f"DELETE FROM {table} WHERE chat_id = ?", chat_id)  # noqa: S608

    def forget_user_in_chat(self, chat_id: int, user_id: int) -> None:
        """Delete a user's replies and jobs in a group."""
        self._has_forgotten = True
        with self.transaction():
            mine = "(SELECT id FROM replies WHERE chat_id = ? AND user_id = ?)"
            for table in ("jobs", "messages"):
                self._run(f"DELETE FROM {table} WHERE reply_id IN {mine}", chat_id, user_id)  # noqa: S608
            self._run("DELETE FROM replies WHERE chat_id = ? AND user_id = ?", chat_id, user_id)

    def export_chat(self, chat_id: int, user_id: int) -> dict[str, Any]:
        """Everything that is kept about a private chat and its user."""
        replies = [
            {"created": created, **asdict(unpack_reply(row))}
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
