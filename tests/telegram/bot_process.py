"""The real bot, `fst telegram_bot`, as its own process whose log can be awaited."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.logged_process import LoggedProcess

_REPOSITORY = Path(__file__).parents[2]
_MEMORY = Path("/dev/shm")  # of Linux; elsewhere the usual directory
_TIMEOUT_SECONDS = 300


def quick_directory() -> Path | None:
    """Where to put databases of tests: in memory if possible, as a busy disk takes seconds to sync.

    A killed process loses nothing there; only a power cut would.
    """
    return _MEMORY if os.access(_MEMORY, os.W_OK) else None


def bot_command(service_url: str, telegram_api_base: str, *more: str) -> list[str]:
    """What a person types."""
    return [
        *(sys.executable, "-m", "full_stack_transformer", "telegram_bot"),
        *("--service_url", service_url, "--telegram_api_base", telegram_api_base, *more),
    ]


def bot_environment(token: str | None) -> dict[str, str]:
    """This environment with a token, or without."""
    kept = {name: value for name, value in os.environ.items() if name != "TELEGRAM_BOT_TOKEN"}
    return kept if token is None else {**kept, "TELEGRAM_BOT_TOKEN": token}


def run_to_the_end(
    command: list[str], token: str | None, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a bot that is expected to exit by itself."""
    return subprocess.run(
        command,
        env={**bot_environment(token), **(more or {})},
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )


def unused_port(above: int = 0) -> int:
    """A port above another one, below the system's range for port 0: no other test gets it meanwhile."""
    for port in itertools.count(max(above + 1, 20_000 + os.getpid() % 10_000)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError


class BotProcess(LoggedProcess):
    """One run of the bot, with a new database; `start` waits until it takes updates."""

    def __init__(self, command: list[str], token: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fst-bot-", dir=quick_directory())
        database = Path(self._directory.name) / "bot.sqlite3"
        command = [*command, "--database", str(database)]
        super().__init__(command, "answering as @", bot_environment(token))

    def kill(self) -> None:
        """Kill it, and delete its database."""
        super().kill()
        self._directory.cleanup()
