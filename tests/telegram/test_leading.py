"""Two real bot processes on one database: one answers, the other stands by and takes over."""

import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from full_stack_transformer.errors import UsageError
from full_stack_transformer.telegram.state.database import check_owner
from full_stack_transformer.telegram.state.store import Store
from full_stack_transformer.telegram.texts import ENGLISH
from tests.fake_bot_api.process import FakeBotApi
from tests.telegram.bot_forks import QUICK, BotForks, ForkedBot
from tests.telegram.bot_process import bot_command, unused_port
from tests.telegram.stand_in_service import StandInService, serving
from tests.telegram.watching import finals

NOWHERE = "http://127.0.0.1:9"
SECRET = "a-secret-of-the-webhook"

WITH_LIMITS = False


@pytest.fixture
def database(quick_path: Path) -> Path:
    return quick_path / "bot.sqlite3"


@contextmanager
def two_bots(
    forks: BotForks,
    telegram: FakeBotApi,
    service_url: str,
    database: Path,
    options: Sequence[Sequence[str]] = ((), ()),
) -> Iterator[tuple[ForkedBot, ForkedBot]]:
    """One that answers, and one that stands by."""
    monitored = ("--database", str(database), "--monitoring_port", "0")
    environment = {**QUICK, "TELEGRAM_WEBHOOK_SECRET": SECRET}
    leader, stand_by = (
        forks.bot(
            bot_command(service_url, telegram.url, *monitored, *more), telegram.token, environment
        )
        for more in options
    )
    try:
        leader.start()
        stand_by.begin()
        stand_by.wait_for_log("standing by: another process of this bot uses")
        yield leader, stand_by
    finally:
        leader.kill()
        stand_by.kill()


def status_of(bot: ForkedBot, path: str, log: str = "monitoring at") -> tuple[int, str]:
    match = re.search(r"http://127.0.0.1:\d+", bot.wait_for_log(log))
    assert match is not None
    found = httpx.get(f"{match.group()}{path}")
    return found.status_code, found.json()["status"]


def test_the_stand_by_answers_everything_when_the_leader_is_killed_in_mid_text(
    telegram: FakeBotApi, forks: BotForks, database: Path, chat_id: int
) -> None:
    prompt, chats = f"killed {chat_id}", [chat_id * 1000 + number for number in range(5)]
    with (
        serving(StandInService()) as service,
        two_bots(forks, telegram, service.url, database) as (leader, stand_by),
    ):
        service.continuations[prompt] = lambda: " word" * 200
        assert status_of(leader, "/ready") == (200, "ok")
        assert status_of(stand_by, "/ready") == (503, "standing by")
        assert status_of(stand_by, "/health") == (200, "standing by")
        with service.holding(prompt, after_pieces=10):
            telegram.write(chat_id, prompt)
            telegram.write(-chat_id, f"@fake_bot {prompt}", user_id=5)
            telegram.draft(chat_id, " word")
            telegram.bot_messages(-chat_id, at_least=1)
            telegram.write(chat_id, "waiting behind it")
            for chat in chats:
                telegram.write(chat, "at the same time")
            leader.kill()
        stand_by.wait_for_log("answering as @")
        assert "taking over: the process that used" in stand_by.log
        assert status_of(stand_by, "/ready") == (200, "ok")
        for chat in chats:
            finals(telegram, chat)
        first, second = finals(telegram, chat_id, at_least=2)
        assert first["text"] == prompt + " word" * 200
        assert second["text"].startswith("waiting behind it")
        finals(telegram, -chat_id)
        # As after a restart: a message that arrived unseen is sent again, and the first one deleted.
        telegram.write(-chat_id, "/settings", user_id=5)
        telegram.bot_messages(-chat_id, at_least=1, button=f"• {ENGLISH.presets[1]}")
        answer, _ = telegram.bot_messages(-chat_id)
        assert answer["text"] == prompt + " word" * 200
        requests = [request for request in service.requests if prompt in str(request)]
        assert len({request.seed for request in requests}) == 2, "the same texts are continued"
        assert all(len(telegram.bot_messages(chat)) == 1 for chat in chats)
        # And the one that was killed stands by when it comes back, until a SIGTERM hands over.
        leader.begin()
        leader.wait_for_log("standing by")
        with service.holding("to the end") as hold:
            telegram.write(chat_id, "to the end")
            hold.wait()
            telegram.state(idle=1)
            stand_by.send_signal(signal.SIGTERM)
            stand_by.wait_for_log("finishing the replies")
            telegram.write(chat_id, "for the next one")
        assert stand_by.wait() == 0
        leader.wait_for_log("answering as @")
        texts = [message["text"] for message in finals(telegram, chat_id, at_least=4)]
        assert [text.split(" goes on")[0] for text in texts[2:]] == [
            "to the end",
            "for the next one",
        ]
        assert "Traceback" not in leader.log + stand_by.log


def test_a_webhook_that_stands_by_answers_503_until_it_takes_over(
    telegram: FakeBotApi, forks: BotForks, database: Path, chat_id: int
) -> None:
    first = unused_port()
    ports = [first, unused_port(above=first)]
    urls = [f"http://127.0.0.1:{port}/updates" for port in ports]
    options = [
        ("--webhook_url", url, "--webhook_port", str(port))
        for url, port in zip(urls, ports, strict=True)
    ]
    headers = {"X-Telegram-Bot-Api-Secret-Token": SECRET}
    with (
        serving(StandInService()) as service,
        two_bots(forks, telegram, service.url, database, options) as (leader, stand_by),
    ):
        update = {"update_id": 10**9, "message": {}}
        assert httpx.post(urls[1], json=update).status_code == 401
        assert httpx.post(urls[1], json=update, headers=headers).status_code == 503
        assert status_of(stand_by, "/ready", "webhook at") == (503, "standing by")
        telegram.write(chat_id, "Before")
        finals(telegram, chat_id)
        leader.kill()
        telegram.write(chat_id, "Nobody is there")
        stand_by.wait_for_log("answering as @")
        telegram.write(chat_id, "After")
        texts = [message["text"] for message in finals(telegram, chat_id, at_least=3)]
        assert [text.split(" goes on")[0] for text in texts] == [
            "Before",
            "Nobody is there",
            "After",
        ]
        assert status_of(stand_by, "/ready", "webhook at") == (200, "ok")
        assert stand_by.stop() == 0
    telegram.http.post(f"/bot{telegram.token}/deleteWebhook")


def test_a_stand_by_of_another_bot_or_with_a_wrong_token_is_refused(
    telegram: FakeBotApi, forks: BotForks, database: Path
) -> None:
    with two_bots(forks, telegram, NOWHERE, database) as (leader, stand_by):
        command = bot_command(NOWHERE, telegram.url, "--database", str(database))
        for token, code, words in (
            ("43:another-bot", 1, "does not know the bot's token"),
            ("42:wrong", 1, "does not know the bot's token"),
        ):
            other = forks.bot(command, token)
            other.begin()
            assert other.wait() == code
            assert words in other.log
        assert stand_by.stop() == 0, "SIGTERM ends one that stands by at once"
        assert leader.stop() == 0
    other = forks.bot(command, "43:another-bot")
    other.begin()
    assert other.wait() == 2
    assert "belongs to bot 42" in other.log


def test_the_owner_of_a_database_is_checked_while_another_process_uses_it(database: Path) -> None:
    store = Store(database, 42)
    check_owner(database, 42)
    with pytest.raises(UsageError, match=r"belongs to bot 42 .* this is bot 43"):
        check_owner(database, 43)
    store.check()
    store.close()


def test_a_stand_by_does_not_take_over_what_is_not_the_file_it_waited_for(
    telegram: FakeBotApi, forks: BotForks, database: Path
) -> None:
    with two_bots(forks, telegram, NOWHERE, database) as (leader, stand_by):
        for path in database.parent.glob(f"{database.name}*"):
            path.unlink()
        assert leader.wait() == 1
        assert stand_by.wait() == 1
        assert "was deleted, moved or replaced while this process stood by" in stand_by.log
        assert f"are in {database}: start it again" in leader.log
    Store(database, 42).close()
