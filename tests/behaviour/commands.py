"""The program from outside: one command at a time, and commands that run until they are stopped.

Every process computes with one thread, offline, without a GPU, with the code of this checkout.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

REPOSITORY = Path(__file__).resolve().parents[2]
_TIMEOUT_SECONDS = 300
_LOOK_SECONDS = 0.05
_END_OF_LOG = 1500
# They would change what a command does.
_DROPPED = (
    *("GLIBC_TUNABLES", "TELEGRAM_BOT_TOKEN", "TELEGRAM_WEBHOOK_SECRET"),
    *("FST_API_KEYS", "SERVICE_API_KEY"),
)
T = TypeVar("T")


def environment(work: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a process that works in `work`."""
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    return {
        **kept,
        "PYTHONPATH": str(REPOSITORY),
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NO_COLOR"), "1"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        # The harness keeps data sets there.
        "HF_HOME": str(work / "cache"),
        "COLUMNS": "400",
        "TZ": "UTC",
        **(more or {}),
    }


def fst_words(*words: str | Path) -> list[str]:
    """What a person types."""
    return [sys.executable, "-m", "full_stack_transformer", *map(str, words)]


def fst(work: Path, *words: str | Path, stdin: str = "") -> str:
    """Run a command in `work` and return what it wrote to standard output.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        fst_words(*words),
        cwd=work,
        env=environment(work),
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"fst {' '.join(map(str, words))}: exit code {done.returncode}\n{done.stderr[-_END_OF_LOG:]}"
        )
    return done.stdout


class Running:
    """A command that runs until it is stopped; its lines can be awaited."""

    def __init__(self, work: Path, words: list[str], more: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            words,
            cwd=work,
            env=environment(work, more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return "".join(list(self._lines))

    @property
    def is_over(self) -> bool:
        """Whether it has left."""
        return self._process.poll() is not None

    def wait_for(self, words: str) -> str:
        """The first line that holds `words`.

        Raises:
            RuntimeError: it left, or the line did not come in time.
        """

        def found() -> str | None:
            is_over = self.is_over
            line = next((line for line in list(self._lines) if words in line), None)
            if line is None and is_over:
                raise RuntimeError(f"it left before {words!r}: {self.log[-_END_OF_LOG:]}")
            return line

        return wait_until(found, f"a line with {words!r}")

    def stop(self) -> int:
        """Ask it to leave, and return the exit code."""
        if not self.is_over:
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(_TIMEOUT_SECONDS)
        self._reader.join()
        return code

    def end(self) -> None:
        """End it however it is."""
        if not self.is_over:
            self._process.kill()
        self._process.wait(_TIMEOUT_SECONDS)
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            self._lines.extend(output)


@contextmanager
def running(
    work: Path, words: list[str], more: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A command that runs inside the `with`."""
    process = Running(work, words, more)
    try:
        yield process
    finally:
        process.end()


def wait_until(look: Callable[[], T | None], what: str, pause: float = _LOOK_SECONDS) -> T:
    """What `look` returns, once it is something.

    Raises:
        RuntimeError: it did not come in time.
    """
    until = time.monotonic() + _TIMEOUT_SECONDS
    while (found := look()) is None:
        if time.monotonic() > until:
            raise RuntimeError(f"there was no {what} in {_TIMEOUT_SECONDS} s")
        time.sleep(pause)
    return found
