"""Malformed, repeated and random updates; and what is recorded for valid ones."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiogram.methods import AnswerCallbackQuery
from aiogram.types import User

from full_stack_transformer.serving.client import ServiceClient
from full_stack_transformer.telegram.conversation.answers import Answers
from full_stack_transformer.telegram.conversation.commands import Commands
from full_stack_transformer.telegram.conversation.requests import MAX_WAITING, Policy, Requests
from full_stack_transformer.telegram.conversation.writing import Writer
from full_stack_transformer.telegram.monitoring import Metrics
from full_stack_transformer.telegram.state.settings import Settings
from full_stack_transformer.telegram.state.store import Store
from full_stack_transformer.telegram.texts import ENGLISH
from full_stack_transformer.telegram.updates.intake import Intake
from tests.telegram.hostile_updates import NUM_HOSTILE, hostile_updates

Json = dict[str, Any]


class IntakeLab:
    """An intake with a database, without Telegram and service."""

    def __init__(self, path: Path) -> None:
        self.store = Store(path, 42)
        self.metrics = Metrics()
        writer = Writer(ServiceClient("http://service"))
        self.now = 1000.0
        self.press_answers: list[AnswerCallbackQuery] = []
        policy = Policy(self.store, max_tokens_per_day=100, clock=lambda: self.now)
        nothing: Any = None  # of what sends: no job is ever done here
        answers = Answers(self.store, nothing, nothing, writer, self.metrics, asyncio.Event())
        requests = Requests(self.store, answers, writer, policy, Settings())
        parts = (self.store, answers, policy, requests)
        commands = Commands(*parts, writer, service_url="", log_texts=False)
        me = User(id=42, is_bot=True, first_name="Bot", username="fake_bot")
        self.intake = Intake(*parts, commands, writer, self.metrics, me, self.press_answers.append)

    def said(self) -> list[str]:
        """The bot's own pending messages."""
        rows = self.store._all("SELECT content FROM jobs WHERE lane = 'words' AND kind = 'say'")
        return [json.loads(row[0])["text"] for row in rows]

    def outcomes(self) -> dict[str, float]:
        """Number of updates by outcome."""
        samples = next(iter(self.metrics.updates.collect())).samples
        return {s.labels["outcome"]: s.value for s in samples if s.name.endswith("_total")}


@pytest.fixture
def lab(quick_path: Path) -> Iterator[IntakeLab]:
    opened = IntakeLab(quick_path / "bot.sqlite3")
    yield opened
    opened.store.close()


def message(update_id: int, text: str, **more: Any) -> Json:
    """A private message of user 5."""
    person = {"id": 5, "is_bot": False, "first_name": "User"}
    chat = {"id": 5, "type": "private"}
    content = {"message_id": update_id, "date": 1, "chat": chat, "from": person, "text": text}
    return {"update_id": update_id, "message": content | more}


def test_a_repeated_update_is_dropped(lab: IntakeLab) -> None:
    lab.intake.take([message(1, "Hello"), message(1, "Hello")])
    lab.intake.take([message(1, "Hello")])
    assert lab.store.num_jobs() == 1
    assert lab.outcomes() == {"handled": 1, "repeated": 2}


def test_a_user_with_too_many_waiting_texts_is_told_once_in_a_while(lab: IntakeLab) -> None:
    lab.intake.take([message(number, "More") for number in range(1, 15)])
    assert lab.store.num_jobs() == MAX_WAITING + 1
    assert lab.said() == [ENGLISH.too_many]
    lab.now += 11
    lab.intake.take([message(number, "More") for number in range(15, 18)])
    assert lab.said() == [ENGLISH.too_many] * 2


def test_a_user_who_floods_with_commands_is_ignored_for_a_while(lab: IntakeLab) -> None:
    lab.intake.take([message(number, "/help") for number in range(1, 100)])
    assert lab.said() == [ENGLISH.help] * 30 + [ENGLISH.too_many]
    lab.now += 5
    lab.intake.take([message(number, "/help") for number in range(100, 105)])
    assert lab.said().count(ENGLISH.help) == 35


@pytest.mark.parametrize(
    "more",
    [
        {"message_thread_id": 2**70, "is_topic_message": True},
        {
            "reply_to_message": {
                "message_id": 2**64,
                "date": 1,
                "chat": {"id": 5, "type": "private"},
            }
        },
        {"message_id": -(2**63)},
    ],
    ids=["thread", "replied", "message"],
)
def test_ids_that_no_database_holds_are_ignored(lab: IntakeLab, more: Json) -> None:
    lab.intake.take([message(1, "/why", **more), message(2, "Hello")])
    assert lab.outcomes() == {"ignored": 1, "handled": 1}


def test_lone_surrogates_and_zeros_are_kept_as_text(lab: IntakeLab) -> None:
    lab.intake.take([message(1, "a\ud83d\udc4bb\ud800c\x00d")])
    job = lab.store.next_job(5, "answers")
    assert job is not None
    assert job.reply_id is not None
    reply = lab.store.reply(job.reply_id)
    assert reply is not None
    assert reply.prompt == "a👋b\ufffdc\x00d"


def test_a_full_disk_records_nothing_and_confirms_nothing(lab: IntakeLab) -> None:
    import sqlite3

    lab.store._connection.execute("PRAGMA max_page_count=1")
    with pytest.raises(sqlite3.OperationalError):
        lab.intake.take([message(1, "x" * 4000) for _ in range(1)])
    lab.store._connection.execute("PRAGMA max_page_count=100000")
    lab.intake.take([message(1, "x" * 4000)])
    assert lab.outcomes()["handled"] >= 1
    assert lab.store.num_jobs() == 1


def test_hostile_updates_are_all_recorded_and_none_is_quoted(
    lab: IntakeLab, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        for number, update in enumerate(hostile_updates(NUM_HOSTILE, seed=1), start=1):
            lab.now += 5  # nobody floods
            numbered = {"update_id": number, **update} if isinstance(update, dict) else update
            lab.intake.take([numbered])
    outcomes = lab.outcomes()
    assert "failed" not in outcomes
    assert sum(outcomes.values()) == NUM_HOSTILE
    assert outcomes["handled"] > NUM_HOSTILE / 20
    assert outcomes["malformed"] > NUM_HOSTILE / 20
    assert "Hostile" not in caplog.text
    # What the bot would say: its own sentences only, with nothing of an update in them.
    for content in lab.store._all("SELECT content FROM jobs WHERE lane = 'words'"):
        said = json.loads(content[0]).get("text", "")
        assert "Hostile" not in said
        assert "<b>" not in said
        assert len(said) < 2000
