"""How the real bot process starts, stops, is killed, and continues."""

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from full_stack_transformer.command_line import run
from full_stack_transformer.telegram.texts import ENGLISH
from tests.fake_bot_api.process import FakeBotApi
from tests.telegram.bot_forks import BotForks, ForkedBot
from tests.telegram.bot_process import BotProcess, bot_command, run_to_the_end, unused_port
from tests.telegram.stand_in_service import StandInService, bound_socket, serving, url_of
from tests.telegram.watching import finals, words_of

NOWHERE = "http://127.0.0.1:9"  # the discard port, where nothing listens
SECRET = "a-secret-of-the-webhook"


@contextmanager
def stopped_bot(
    forks: BotForks, service_url: str, telegram: FakeBotApi, *more: str, **environment: str
) -> Iterator[ForkedBot]:
    """A bot that the test starts; killed at the end."""
    command = bot_command(service_url, telegram.url, *more)
    bot = forks.bot(command, telegram.token, environment)
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


def test_a_signal_lets_the_bot_finish_what_runs_and_the_next_start_does_the_rest(
    telegram: FakeBotApi, forks: BotForks, chat_id: int
) -> None:
    prompt = f"pending {chat_id}"
    with (
        serving(StandInService()) as service,
        stopped_bot(forks, service.url, telegram) as bot,
    ):
        bot.start()
        with service.holding(prompt) as hold:
            telegram.write(chat_id, prompt)
            telegram.write(chat_id, "waiting behind it")
            hold.wait()
            bot.wait_for_log("answering")
            telegram.state(idle=1)
            bot.send_signal(signal.SIGTERM)
            bot.wait_for_log("finishing the replies")
        assert bot.wait() == 0
        assert "1 jobs are left for the next start" in bot.log
        (first,) = finals(telegram, chat_id)
        assert first["text"].startswith(prompt)
        bot.start()
        _, second = finals(telegram, chat_id, at_least=2)
        assert second["text"].startswith("waiting behind it")
        assert "Traceback" not in bot.log
        with service.holding("cut short") as hold:
            telegram.write(chat_id, "cut short")
            hold.wait()
            bot.send_signal(signal.SIGTERM)
            bot.wait_for_log("finishing the replies")
            bot.send_signal(signal.SIGTERM)
            assert bot.wait() == 0
        bot.start()
        assert finals(telegram, chat_id, at_least=3)[-1]["text"].startswith("cut short")


def test_killed_in_mid_text_the_bot_goes_on_with_the_same_text(
    telegram: FakeBotApi, forks: BotForks, chat_id: int
) -> None:
    with (
        serving(StandInService()) as service,
        stopped_bot(forks, service.url, telegram) as bot,
    ):
        prompt = f"killed {chat_id}"
        service.continuations[prompt] = lambda: " word" * 200
        bot.start()
        with service.holding(prompt, after_pieces=10):
            telegram.write(chat_id, prompt)
            telegram.write(-chat_id, f"@fake_bot {prompt}", user_id=5)
            telegram.draft(chat_id, " word")
            telegram.bot_messages(-chat_id, at_least=1)
            bot.kill()
        bot.start()
        (answer,) = finals(telegram, chat_id)
        assert answer["text"] == prompt + " word" * 200
        finals(telegram, -chat_id)
        # The bot may have been killed before it knew that the group's message had arrived; then it sent
        # it again and deletes the first one before it says anything else.
        telegram.write(-chat_id, "/settings", user_id=5)
        telegram.bot_messages(-chat_id, at_least=1, button=f"• {ENGLISH.presets[1]}")
        answer, _ = telegram.bot_messages(-chat_id)
        assert answer["text"] == prompt + " word" * 200
        seeds = {request.seed for request in service.requests}
        assert len(service.requests) == 4
        assert len(seeds) == 2


def test_a_text_waits_for_the_service_and_comes_when_it_is_back(
    telegram: FakeBotApi, forks: BotForks, chat_id: int
) -> None:
    with (
        bound_socket() as bound,
        stopped_bot(forks, url_of(bound), telegram) as bot,
    ):
        bot.start()
        assert "does not answer (ServiceUnavailableError)" in bot.log
        telegram.write(chat_id, "Patient")
        (apology,) = telegram.bot_messages(chat_id, at_least=1)
        assert apology["text"] == ENGLISH.service_away
        bot.kill()
        bot.start()
        with serving(StandInService(), bound):
            (answer,) = finals(telegram, chat_id)
            assert answer["text"].startswith("Patient goes on")
            telegram.requests("deleteMessage", chat_id, at_least=1)


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(401, "does not accept the bot's token"), (409, "another process polls")],
)
def test_a_lost_token_and_a_second_poller_end_the_bot_with_a_sentence(
    telegram: FakeBotApi, forks: BotForks, status: int, sentence: str
) -> None:
    with stopped_bot(forks, NOWHERE, telegram) as bot:
        bot.start()
        telegram.fail("getUpdates", "error", times=9, status=status, description="Conflict")
        telegram.write(1, "wakes the poll")
        assert bot.wait() == 1
        assert sentence in bot.log.splitlines()[-1]
        assert telegram.token not in bot.log
    telegram.clear_faults()
    telegram.http.post(f"/bot{telegram.token}/deleteWebhook", json={"drop_pending_updates": True})


def test_users_who_are_not_allowed_or_have_no_tokens_left_are_told_so(
    telegram: FakeBotApi, forks: BotForks, chat_id: int
) -> None:
    admin, stranger = chat_id, chat_id + 500_000
    options = ("--allowed_ids", "7777", "--admin_ids", str(admin), "--max_tokens_per_day", "2")
    with (
        serving(StandInService()) as service,
        stopped_bot(forks, service.url, telegram, *options) as bot,
    ):
        bot.start()
        refused = words_of(telegram, stranger, "Let me in")
        assert refused["text"] == ENGLISH.not_allowed.format(user_id=stranger)
        assert words_of(telegram, admin, "/allow")["text"] == ENGLISH.admin_usage.format(
            command="allow"
        )
        assert words_of(telegram, admin, f"/allow {stranger}")["text"] == ENGLISH.admin_done
        telegram.write(stranger, "Now then")
        (answer,) = finals(telegram, stranger)
        query_id = telegram.press(stranger, answer["message_id"], button="Repeat")
        assert telegram.query_answer(query_id)["text"] == ENGLISH.quota.format(quota=2)
        assert words_of(telegram, stranger, "More")["text"] == ENGLISH.quota.format(quota=2)
        assert str(stranger) in words_of(telegram, admin, "/status")["text"]
        telegram.write(admin, "Without limits")
        finals(telegram, admin)
        words_of(telegram, admin, f"/deny {stranger}")
        query_id = telegram.press(stranger, answer["message_id"], button="Repeat")
        assert telegram.query_answer(query_id)["text"] == ENGLISH.alert_foreign


def test_updates_come_by_webhook_with_the_secret_only(
    telegram: FakeBotApi, forks: BotForks, chat_id: int
) -> None:
    port = unused_port()
    address = f"http://127.0.0.1:{port}/updates"
    options = ("--webhook_url", address, "--webhook_port", str(port), "--monitoring_port", "0")
    with (
        serving(StandInService()) as service,
        stopped_bot(forks, service.url, telegram, *options, TELEGRAM_WEBHOOK_SECRET=SECRET) as bot,
    ):
        bot.start()
        update = {"update_id": 10**9, "message": {}}
        header = "X-Telegram-Bot-Api-Secret-Token"
        assert httpx.post(address, json=update).status_code == 401
        for wrong in (b"wrong", "é".encode()):
            headers = {header.encode(): wrong}
            assert httpx.post(address, json=update, headers=headers).status_code == 401
        for content, status in ((b"[", 400), (b"[]", 400), (b'"' + b"x" * (1 << 20), 413)):
            posted = httpx.post(address, content=content, headers={header: SECRET})
            assert posted.status_code == status
        telegram.write(chat_id, "By webhook")
        (answer,) = finals(telegram, chat_id)
        assert answer["text"].startswith("By webhook goes on")
        assert telegram.state()["webhook_failures"] == 0
        match = re.search(r"http://127.0.0.1:\d+", bot.wait_for_log("monitoring at"))
        assert match is not None
        assert httpx.get(f"{match.group()}/health").json() == {"status": "ok"}
        metrics = httpx.get(f"{match.group()}/metrics").text
        assert 'telegram_bot_replies_total{finish="stop"} 1.0' in metrics
        assert 'telegram_bot_jobs{lane="answers"} 0.0' in metrics
        assert bot.stop() == 0
        assert SECRET not in bot.log
    telegram.http.post(f"/bot{telegram.token}/deleteWebhook")


def test_a_model_is_served_by_the_bot_itself_and_its_lines_give_the_same_bytes(
    telegram: FakeBotApi,
    forks: BotForks,
    chat_id: int,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--checkpoint", str(model_dir), "--device", "cpu", "--max_new_tokens", "12")
    with stopped_bot(forks, NOWHERE, telegram, *options, OMP_NUM_THREADS="1") as bot:
        bot.start()
        telegram.write(chat_id, "The reader")
        (answer,) = finals(telegram, chat_id)
        exported = words_of(telegram, chat_id, "/export")["document"]["content"]
        telegram.write(chat_id, "/why", reply_to_message_id=answer["message_id"])
        *_, generate, call = telegram.bot_messages(chat_id, at_least=5)
        (reply,) = json.loads(exported)["replies"]
        whole = reply["prompt"] + reply["texts"][0]
        assert answer["text"] == whole.strip()
        program, *words = shlex.split(generate["text"].split("\n", 1)[1])
        assert (program, run([*words, "--device", "cpu"])) == ("fst", 0)
        assert capsys.readouterr().out == whole + "\n"
        answered = json.loads(
            subprocess.check_output(["bash", "-c", call["text"].split("\n", 1)[1]])
        )
        assert answered["choices"][0]["text"] == reply["texts"][0]
        line = bot.wait_for_log("service: serving")
        assert bot.stop() == 0
    url = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert url is not None
    with pytest.raises(httpx.ConnectError):
        httpx.get(url.group())


def test_the_real_command_answers_and_ends(telegram: FakeBotApi, chat_id: int) -> None:
    with serving(StandInService()) as service:
        bot = BotProcess(bot_command(service.url, telegram.url), telegram.token)
        try:
            bot.start()
            telegram.write(chat_id, "Not forked")
            finals(telegram, chat_id)
            assert bot.stop() == 0
        finally:
            bot.kill()


def test_a_missing_token_is_one_sentence() -> None:
    finished = run_to_the_end(bot_command(NOWHERE, NOWHERE), token=None)
    assert_one_sentence(finished, exit_code=2)
    assert "TELEGRAM_BOT_TOKEN" in finished.stderr


def test_a_wrong_token_is_one_sentence_without_the_token(
    telegram: FakeBotApi, forks: BotForks, tmp_path: Path
) -> None:
    wrong = "42:a-token-of-nobody"
    token_file = tmp_path / "token"
    token_file.write_text(f"{wrong}\n", encoding="utf-8")
    with stopped_bot(forks, NOWHERE, telegram, "--token_file", str(token_file)) as bot:
        bot.begin()
        assert bot.wait() == 1
        (line,) = bot.log.splitlines()
        assert line.startswith("fst: ")
        assert "token" in line
        assert wrong not in line


def test_an_unreachable_telegram_is_one_sentence(telegram: FakeBotApi, forks: BotForks) -> None:
    bot = forks.bot(bot_command(NOWHERE, NOWHERE), "42:secret-token")
    bot.begin()
    assert bot.wait() == 1
    (line,) = bot.log.splitlines()
    assert "Telegram cannot be reached at 127.0.0.1:9" in line
    assert "secret-token" not in line


def test_failures_of_telegram_at_the_start_are_retried(
    telegram: FakeBotApi, forks: BotForks
) -> None:
    telegram.fail("getMe", "bad_gateway", times=2)
    with stopped_bot(forks, NOWHERE, telegram) as bot:
        bot.start()
        assert bot.stop() == 0


def test_a_hanging_telegram_does_not_hold_up_other_chats(
    telegram: FakeBotApi, forks: BotForks, chat_id: int
) -> None:
    other = chat_id + 500_000
    with (
        serving(StandInService()) as service,
        stopped_bot(forks, service.url, telegram) as bot,
    ):
        bot.start()
        telegram.fail("sendMessage", "hang", times=1000, chat_id=chat_id)
        telegram.write(chat_id, "hangs")
        telegram.requests("sendMessage", chat_id, at_least=1, answered=False)
        telegram.write(other, "does not")
        finals(telegram, other)
        assert not telegram.bot_messages(chat_id)
        telegram.clear_faults()
        finals(telegram, chat_id)
        assert bot.stop() == 0


def test_streaming_stays_within_the_limits_of_every_chat(
    telegram: FakeBotApi, forks: BotForks, chat_id: int
) -> None:
    """Long enough for some drafts and edits; `tests.benchmarks.bot_latency` streams for minutes."""
    num_limited = telegram.state()["num_limited"]
    prompt = f"streams long {chat_id}"
    with (
        serving(StandInService()) as service,
        stopped_bot(forks, service.url, telegram) as bot,
    ):
        service.seconds_between_pieces = 0.02
        service.continuations[prompt] = lambda: " word" * 300
        bot.start()
        with service.holding(prompt, after_pieces=150):
            for place in (chat_id, -chat_id):
                mention = "@fake_bot " if place < 0 else ""
                telegram.write(place, mention + prompt, user_id=chat_id)
            telegram.requests("sendMessageDraft", chat_id, at_least=2)
            telegram.bot_messages(-chat_id, at_least=1)
        for place in (chat_id, -chat_id):
            (answer,) = finals(telegram, place)
            assert answer["text"] == prompt + " word" * 300
    assert telegram.state()["num_limited"] == num_limited
