"""`python -m tests.benchmarks.bot_latency`: time until a user sees text, and whether rate limits are kept.

The real bot, the real service with a tiny model (two layers, width 64), the fake Bot API; one prompt
after the other, each in its own chat. Measured from the user's message to the first call of the bot
that shows text, a draft or the message itself, as the fake server saw it.

Then, for `--stream_minutes`, a private chat and a group of 20 messages a minute, in which somebody
writes again as soon as the last text has come, and the model is slow: the fake server counts every
message and edit, and answers 429 beyond its limits.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiogram

from full_stack_transformer.telegram.texts import ENGLISH
from tests.fake_bot_api.process import FakeBotApi, running_fake_bot_api
from tests.logged_process import running_service
from tests.telegram.bot_forks import BotForks, bot_forks
from tests.telegram.bot_process import bot_command
from tests.telegram.stand_in_service import StandInService, serving
from tests.tiny_model import make_tiny_model

_GROUP, _PRIVATE = -7, 7


def first_text_seconds(telegram: FakeBotApi, chat_id: int) -> float:
    """Write once and wait for the whole answer; returns when its first text was shown."""
    written = time.monotonic()  # the same clock in all processes of a machine
    telegram.write(chat_id, "The reader looks for")
    telegram.requests("sendMessage", chat_id, at_least=1)
    shown = [
        record["at"]
        for method in ("sendMessageDraft", "sendMessage")
        for record in telegram.requests(method, chat_id)
    ]
    return float(min(shown) - written)


def measure_first_texts(forks: BotForks, num_prompts: int) -> str:
    """One prompt after the other, each in its own chat."""
    with (
        tempfile.TemporaryDirectory() as directory,
        running_service(make_tiny_model(Path(directory))) as (url, _),
        running_fake_bot_api() as telegram,
    ):
        bot = forks.bot(bot_command(url, telegram.url), telegram.token)
        try:
            bot.start()
            seconds = sorted(
                first_text_seconds(telegram, 1000 + number) for number in range(num_prompts)
            )
            num_limited = telegram.state()["num_limited"]
        finally:
            bot.kill()
    return (
        f"first text: n = {len(seconds)}, median {statistics.median(seconds):.3f} s, "
        f"p95 {seconds[int(0.95 * (len(seconds) - 1))]:.3f} s, slowest {seconds[-1]:.3f} s; "
        f"429 of the fake server: {num_limited}"
    )


def measure_streams(forks: BotForks, minutes: float) -> str:
    """Texts of 12 s, one after the other, in a private chat and a group at once."""
    with serving(StandInService()) as service, running_fake_bot_api() as telegram:
        service.seconds_between_pieces = 0.05
        service.continuations["On and on"] = lambda: " and on" * 240
        bot = forks.bot(bot_command(service.url, telegram.url), telegram.token)
        until = time.monotonic() + 60 * minutes

        def converse(chat_id: int) -> int:
            num_texts = 0
            mention = "@fake_bot " if chat_id < 0 else ""
            while time.monotonic() < until:
                telegram.write(chat_id, f"{mention}On and on", user_id=7)
                num_texts += 1
                telegram.bot_messages(chat_id, num_texts, button=ENGLISH.repeat_button)
            return num_texts

        try:
            bot.start()
            with ThreadPoolExecutor() as pool:
                num_texts = sum(pool.map(converse, (_GROUP, _PRIVATE)))
            num_edits = len(telegram.requests("editMessageText", _GROUP))
            num_drafts = len(telegram.requests("sendMessageDraft", _PRIVATE))
            num_limited = telegram.state()["num_limited"]
        finally:
            bot.kill()
    return (
        f"streams of {minutes:g} minutes: {num_texts} texts, {num_edits} edits in the group, "
        f"{num_drafts} drafts in private; 429 of the fake server: {num_limited}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="From a message to the first text")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--stream_minutes", type=float, default=5.0)
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"Python {platform.python_version()}, aiogram {aiogram.__version__}")
    with bot_forks() as forks:
        print(measure_first_texts(forks, options.prompts))
        if options.stream_minutes:
            print(measure_streams(forks, options.stream_minutes))


if __name__ == "__main__":
    main()
