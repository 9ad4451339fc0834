"""The real bot, `fst telegram_bot`, as its own process whose log can be awaited."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]
_TIMEOUT_SECONDS = 30
_READY = "Start polling"


def bot_command(service_url: str, telegram_api_base: str, *more: str) -> list[str]:
    """What a person types."""
    return [
        *(sys.executable, "-m", "full_stack_transformer", "telegram_bot"),
        *("--service_url", service_url, "--telegram_api_base", telegram_api_base, *more),
    ]


def bot_environment(token: str | None) -> dict[str, str]:
    """This environment with that token, or with none."""
    kept = {name: value for name, value in os.environ.items() if name != "TELEGRAM_BOT_TOKEN"}
    return kept if token is None else {**kept, "TELEGRAM_BOT_TOKEN": token}


def run_to_the_end(command: list[str], token: str | None) -> subprocess.CompletedProcess[str]:
    """Run a bot that is expected to leave by itself."""
    return subprocess.run(
        command,
        env=bot_environment(token),
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )


class BotProcess:
    """One run of the bot; `log` holds all of its lines."""

    def __init__(self, command: list[str], token: str) -> None:
        self._command = command
        self._token = token
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._grown = threading.Condition()
        self._lines: list[str] = []

    @property
    def log(self) -> str:
        """Everything that was written to standard error and output so far."""
        with self._grown:
            return "".join(self._lines)

    def start(self) -> None:
        """Start, and return when the bot polls."""
        self._process = subprocess.Popen(
            self._command,
            env=bot_environment(self._token),
            cwd=_REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.wait_for_log(_READY)

    def wait_for_log(self, words: str) -> None:
        """Return when a line holds `words`."""
        with self._grown:
            found = self._grown.wait_for(
                lambda: any(words in line for line in self._lines), _TIMEOUT_SECONDS
            )
        assert found, f"no {words!r} in: {self.log}"

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, without waiting for what it does."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Exit code, once the bot has left."""
        assert self._process is not None
        assert self._reader is not None
        exit_code = self._process.wait(_TIMEOUT_SECONDS)
        self._reader.join()
        return exit_code

    def stop(self) -> int:
        """Ask the bot to leave and return its exit code."""
        self.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it however it is; for the end of a test run."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self.wait()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                with self._grown:
                    self._lines.append(line)
                    self._grown.notify_all()
