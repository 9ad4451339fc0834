"""The real bot in a forked process: the packages are imported once, so that a start costs 0.1 s, not 3.

    BotForks ──start, poll──> server (has imported the bot) ──fork──> `fst telegram_bot …`

What runs is the command line itself, with its own process id, signals, environment and log.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.telegram.bot_process import bot_environment, quick_directory

_REPOSITORY = Path(__file__).parents[2]
_TIMEOUT_SECONDS = 300.0
_LOOK_SECONDS = 0.02
# For tests that are not about limits: the bot and its users may write without limits.
QUICK = {"TESTS_QUICK_PACE": "1"}


class BotForks:
    """Starts bots; made by `bot_forks`."""

    def __init__(self, process: "subprocess.Popen[str]", directory: Path) -> None:
        self._process = process
        self._directory = directory
        self._num_bots = 0

    def ask(self, **request: object) -> int | None:
        """The server's answer to a request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: int | None = json.loads(self._process.stdout.readline())
        return answer

    def bot(
        self, command: Sequence[str], token: str | None, more: Mapping[str, str] | None = None
    ) -> "ForkedBot":
        """A bot that is not started yet; `command` as `bot_command` gives it.

        Where that names no database, the bot gets a new one.
        """
        self._num_bots += 1
        log = self._directory / f"bot-{self._num_bots}.log"
        words = list(command)[3:]
        if "--database" not in words:
            database = self._directory / f"bot-{self._num_bots}" / "bot.sqlite3"
            words += ["--database", str(database)]
        environment = {**bot_environment(token), **(more or {})}
        return ForkedBot(self, words, environment, log)


class ForkedBot:
    """One bot; may be started again after its end, as a new process with the same command."""

    def __init__(
        self, forks: BotForks, words: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self._forks = forks
        self.words = words
        self._environment = environment
        self._log = log
        self._log.write_text("")
        self._log_start = 0
        self.process_id: int | None = None

    @property
    def log(self) -> str:
        """The log of all its processes."""
        return self._log.read_text("utf-8", "replace")

    def begin(self) -> None:
        """Start without waiting until it is up."""
        self._log_start = self._log.stat().st_size
        self.process_id = self._forks.ask(
            do="start", words=self.words, environment=self._environment, log=str(self._log)
        )

    def start(self) -> str:
        """Start, and return the line that says that it is up."""
        self.begin()
        return self.wait_for_log("answering as @")

    def wait_for_log(self, words: str, timeout: float = _TIMEOUT_SECONDS) -> str:
        """The first line of this run that holds `words`, once there is one."""
        until = time.monotonic() + timeout
        while True:
            # Asked before its log is read: what one that has ended wrote is all there.
            is_running = self.is_running
            new = self._log.read_bytes()[self._log_start :].decode("utf-8", "replace")
            for line in new.splitlines():
                if words in line:
                    return line
            assert is_running, f"it ended: {new}"
            assert time.monotonic() < until, f"no {words!r} in: {new}"
            time.sleep(_LOOK_SECONDS)

    @property
    def is_running(self) -> bool:
        """Whether its process runs."""
        return (
            self.process_id is not None and self._forks.ask(do="poll", pid=self.process_id) is None
        )

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, without waiting for its effect."""
        assert self.process_id is not None
        os.kill(self.process_id, number)

    def wait(self, timeout: float = _TIMEOUT_SECONDS) -> int:
        """Exit code, once it has ended; negative for the number of a signal."""
        until = time.monotonic() + timeout
        while (code := self._forks.ask(do="poll", pid=self.process_id)) is None:
            assert time.monotonic() < until, f"it does not end: {self.log}"
            time.sleep(_LOOK_SECONDS)
        self.process_id = None
        return code

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill it, if it runs."""
        if self.process_id is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process_id, signal.SIGKILL)
            self.wait()


@contextmanager
def running_bot(bot: ForkedBot) -> Iterator[ForkedBot]:
    """A bot that works, and at the end stops of itself."""
    try:
        bot.start()
        yield bot
        assert bot.stop() == 0
    finally:
        bot.kill()


@contextmanager
def bot_forks() -> Iterator[BotForks]:
    """The server that forks bots."""
    with tempfile.TemporaryDirectory(prefix="fst-bots-", dir=quick_directory()) as directory:
        command = [sys.executable, "-m", "tests.telegram.bot_forks"]
        with subprocess.Popen(
            command, cwd=_REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            yield BotForks(process, Path(directory))
            assert process.stdin is not None
            process.stdin.close()


def _serve() -> None:
    from full_stack_transformer import command_line
    from full_stack_transformer.telegram import bot, run

    assert bot and run
    exit_codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            answer: int | None = os.fork()
            if answer == 0:
                _become_bot(request, command_line.run)
        else:
            pid = request["pid"]
            if pid not in exit_codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    exit_codes[pid] = os.waitstatus_to_exitcode(status)
            answer = exit_codes.get(pid)
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


def _become_bot(request: dict[str, object], run: object) -> None:
    assert callable(run)
    os.setpgid(0, 0)
    log = os.open(str(request["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    environment = request["environment"]
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update(environment)
    from full_stack_transformer.telegram import bot
    from full_stack_transformer.telegram.conversation import requests
    from full_stack_transformer.telegram.sending import delivery, display

    # A busy machine answers late, and what is late here is not lost.
    bot._CALL_TIMEOUT_SECONDS = bot._SERVICE_CHECK_SECONDS = display._MAX_CLOSING_SECONDS = 120.0
    if "TESTS_QUICK_PACE" in environment:
        requests._FLOOD_BURST = 1e6
        delivery._PRIVATE = delivery._GROUP = delivery._ALL = (1e6, 1e6)
    code = 70
    try:
        code = run(request["words"])
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
