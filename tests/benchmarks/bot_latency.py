"""`python -m tests.benchmarks.bot_latency`: how soon a user sees text, and that no limit is met.

The real bot, the real service with a tiny model (two layers, width 64), the fake Bot API; one prompt
after the other, each in its own chat. Measured from the user's message to the first call of the bot
that shows text, a draft or the message itself, as the fake server saw it.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import aiogram

from tests.fake_bot_api.process import FakeBotApi, running_fake_bot_api
from tests.logged_process import running_service
from tests.telegram.bot_forks import bot_forks
from tests.telegram.bot_process import bot_command
from tests.tiny_model import make_tiny_model


def first_text_seconds(telegram: FakeBotApi, chat_id: int) -> float:
    """Write once and wait for the whole answer; when its first text was shown."""
    written = time.monotonic()  # the same clock in all processes of a machine
    telegram.write(chat_id, "The reader looks for")
    telegram.requests("sendMessage", chat_id, at_least=1)
    shown = [
        record["at"]
        for method in ("sendMessageDraft", "sendMessage")
        for record in telegram.requests(method, chat_id)
    ]
    return float(min(shown) - written)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="From a message to the first text")
    parser.add_argument("--prompts", type=int, default=100)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        running_service(make_tiny_model(Path(directory))) as (url, _),
        running_fake_bot_api() as telegram,
        bot_forks() as forks,
    ):
        bot = forks.bot(bot_command(url, telegram.url), telegram.token)
        try:
            bot.start()
            seconds = sorted(
                first_text_seconds(telegram, 1000 + number) for number in range(options.prompts)
            )
            num_limited = telegram.state()["num_limited"]
        finally:
            bot.kill()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"Python {platform.python_version()}, aiogram {aiogram.__version__}, n = {len(seconds)}")
    p95 = seconds[int(0.95 * (len(seconds) - 1))]
    print(
        f"first text: median {statistics.median(seconds):.3f} s, p95 {p95:.3f} s, "
        f"slowest {seconds[-1]:.3f} s; 429 of the fake server: {num_limited}"
    )


if __name__ == "__main__":
    main()
