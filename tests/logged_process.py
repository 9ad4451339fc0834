"""A command as its own process whose log can be awaited; nothing here sleeps."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_REPOSITORY = Path(__file__).parents[1]
_TIMEOUT_SECONDS = 300


class LoggedProcess:
    """One run of a command; `log` holds all of its lines.

    Args:
        command: what to run, from the repository.
        ready: words of the line that says that it is up.
        environment: this one, unless another is given.
    """

    def __init__(
        self, command: Sequence[str], ready: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = list(command)
        self._ready = ready
        self._environment = dict(os.environ if environment is None else environment)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._grown = threading.Condition()
        self._lines: list[str] = []
        self._has_ended = False

    @property
    def log(self) -> str:
        """Everything that was written to standard error and output so far."""
        with self._grown:
            return "".join(self._lines)

    @property
    def pid(self) -> int:
        """Number of the process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> str:
        """Start, and return the line that says that it is up."""
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            cwd=_REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._has_ended = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self.wait_for_log(self._ready)

    def wait_for_log(self, words: str) -> str:
        """The first line that holds `words`, once there is one."""

        def first() -> str | None:
            return next((line for line in self._lines if words in line), None)

        with self._grown:
            self._grown.wait_for(lambda: first() or self._has_ended, _TIMEOUT_SECONDS)
            line = first()
        assert line is not None, f"no {words!r} in: {self.log}"
        return line

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, without waiting for what it does."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Exit code, once the process has left."""
        assert self._process is not None
        assert self._reader is not None
        exit_code = self._process.wait(_TIMEOUT_SECONDS)
        self._reader.join()
        return exit_code

    def stop(self) -> int:
        """Ask the process to leave and return its exit code."""
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
        with self._grown:
            self._has_ended = True
            self._grown.notify_all()


@contextmanager
def running_service(model: Path, *options: str) -> Iterator[tuple[str, LoggedProcess]]:
    """`fst serve` on a free port: its address and its process."""
    command = [sys.executable, "-m", "full_stack_transformer", "serve", str(model)]
    if taskset := shutil.which("taskset"):
        # On one core: the two threads of a tiny model's decoder wait for each other, and on a machine that
        # others use too that takes ten times as long as computing.
        core = max(os.sched_getaffinity(0))
        command = [taskset, "--cpu-list", str(core), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    device = () if "--device" in options else ("--device", "cpu")
    port = () if "--port" in options else ("--port", "0")
    process = LoggedProcess([*command, *port, *device, *options], "serving ", environment)
    try:
        address = re.search(r"http://[0-9.]+:[0-9]+", process.start())
        assert address is not None
        yield address.group(), process
    finally:
        process.kill()
