"""How the real bot process starts, ends, and starts again."""

import asyncio
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from full_stack_transformer.errors import MachineError
from full_stack_transformer.serving.schemas import GeneratedTextsRequest
from full_stack_transformer.telegram import texts
from full_stack_transformer.telegram.polling import answer_messages
from tests.fake_bot_api.process import FakeBotApi
from tests.telegram.bot_process import BotProcess, bot_command, run_to_the_end
from tests.telegram.stand_in_service import StandInService, serving

NOWHERE = "http://127.0.0.1:9"  # the discard port, where nothing listens


@contextmanager
def stopped_bot(service: StandInService, telegram: FakeBotApi) -> Iterator[BotProcess]:
    """A bot to start; it is gone afterwards."""
    bot = BotProcess(bot_command(service.url, telegram.url), telegram.token)
    try:
        yield bot
    finally:
        bot.kill()


def assert_one_sentence(finished: subprocess.CompletedProcess[str], exit_code: int) -> None:
    lines = finished.stderr.splitlines()
    assert [line for line in lines if line.startswith("fst: ")] == lines[-1:]
    assert finished.returncode == exit_code
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""


def test_a_signal_lets_the_bot_deliver_what_it_owes(telegram: FakeBotApi, chat_id: int) -> None:
    prompt = f"owed {chat_id}"
    with serving(StandInService()) as service, stopped_bot(service, telegram) as bot:
        bot.start()
        with service.holding(prompt) as arrived:
            telegram.write(chat_id, prompt)
            telegram.write(chat_id, "waiting behind it")
            assert arrived.wait(10)
            bot.send_signal(signal.SIGTERM)
            bot.wait_for_log("2 answers are owed")
        assert bot.wait() == 0
        answers = telegram.bot_messages(chat_id, at_least=2, timeout=0)
    assert answers[0]["text"].startswith(prompt)
    assert answers[1]["text"].startswith("waiting behind it")
    assert "Traceback" not in bot.log


def test_buttons_outlive_the_bot_and_the_service_may_come_back(
    telegram: FakeBotApi, chat_id: int
) -> None:
    service = StandInService()
    with serving(service), stopped_bot(service, telegram) as bot:
        num_polls = len(telegram.requests("getUpdates"))
        bot.start()
        telegram.requests("getUpdates", at_least=num_polls + 1)
        # The poll that would confirm the message fails; it must not be answered twice.
        telegram.fail("getUpdates", "bad_gateway")
        telegram.write(chat_id, "Before the restart")
        (first,) = telegram.bot_messages(chat_id, at_least=1)
        bot.wait_for_log("Failed to fetch updates")
        bot.send_signal(signal.SIGINT)
        assert bot.wait() == 0
    telegram.http.post(f"/bot{telegram.token}/setWebhook", json={"url": "https://example.org"})
    telegram.press(chat_id, first["message_id"])
    with stopped_bot(service, telegram) as bot:
        bot.start()
        assert "does not answer (ServiceUnavailableError)" in bot.log
        _, apology = telegram.bot_messages(chat_id, at_least=2)
        assert apology["text"] == texts.SERVICE_AWAY
        with serving(service, port=int(service.url.rpartition(":")[2])):
            telegram.press(chat_id, first["message_id"])
            *_, second = telegram.bot_messages(chat_id, at_least=3)
            assert second["text"].startswith("Before the restart goes on")
            leave_at_once(bot, telegram, service, chat_id)


def leave_at_once(
    bot: BotProcess, telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    with service.holding("never answered") as arrived:
        telegram.write(chat_id, "never answered")
        assert arrived.wait(10)
        bot.send_signal(signal.SIGTERM)
        bot.wait_for_log("1 answers are owed")
        bot.send_signal(signal.SIGTERM)
        assert bot.wait() == 0
    assert "abandoned 1 answers" in bot.log


def test_a_missing_token_is_one_sentence() -> None:
    finished = run_to_the_end(bot_command(NOWHERE, NOWHERE), token=None)
    assert_one_sentence(finished, exit_code=2)
    assert "TELEGRAM_BOT_TOKEN" in finished.stderr


def test_a_wrong_token_is_one_sentence_without_the_token(
    telegram: FakeBotApi, tmp_path: Path
) -> None:
    wrong = "42:a-token-of-nobody"
    token_file = tmp_path / "token"
    token_file.write_text(f"{wrong}\n", encoding="utf-8")
    command = bot_command(NOWHERE, telegram.url, "--token_file", str(token_file))
    finished = run_to_the_end(command, token=telegram.token)
    assert_one_sentence(finished, exit_code=1)
    assert "token" in finished.stderr
    assert wrong not in finished.stderr


def test_an_unreachable_telegram_is_a_matter_of_the_machine() -> None:
    settings = GeneratedTextsRequest()
    with pytest.raises(MachineError, match=re.escape("127.0.0.1:9")) as raised:
        asyncio.run(answer_messages("42:secret-token", NOWHERE, NOWHERE, settings))
    assert "secret-token" not in str(raised.value)
    assert raised.value.__suppress_context__
