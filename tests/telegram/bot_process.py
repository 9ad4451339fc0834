"""The real bot, `fst telegram_bot`, as its own process whose log can be awaited."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.logged_process import LoggedProcess

_REPOSITORY = Path(__file__).parents[2]
_TIMEOUT_SECONDS = 30


def bot_command(service_url: str, telegram_api_base: str, *more: str) -> list[str]:
    """What a person types; the database is a new one where `more` names none."""
    database = Path(tempfile.mkdtemp(prefix="fst-bot-")) / "bot.sqlite3"
    if "--database" not in more:
        more = (*more, "--database", str(database))
    return [
        *(sys.executable, "-m", "full_stack_transformer", "telegram_bot"),
        *("--service_url", service_url, "--telegram_api_base", telegram_api_base, *more),
    ]


def bot_environment(token: str | None) -> dict[str, str]:
    """This environment with that token, or with none."""
    kept = {name: value for name, value in os.environ.items() if name != "TELEGRAM_BOT_TOKEN"}
    return kept if token is None else {**kept, "TELEGRAM_BOT_TOKEN": token}


def run_to_the_end(
    command: list[str], token: str | None, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a bot that is expected to leave by itself."""
    return subprocess.run(
        command,
        env={**bot_environment(token), **(more or {})},
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )


class BotProcess(LoggedProcess):
    """One run of the bot; started when it takes updates."""

    def __init__(
        self, command: list[str], token: str, more: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(command, "answering as @", {**bot_environment(token), **(more or {})})
