"""The steps of a demo: commands that are shown, then run as processes of their own.

Ctrl-C reaches a command once, from here. Knows nothing of what the commands do.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

from full_stack_transformer.errors import FullStackTransformerError, MachineError
from full_stack_transformer.machine import listen

_SECONDS_TO_START = 120.0


class StepFailedError(FullStackTransformerError):
    """A command of the demo failed and has shown its own error."""


def run(*words: str) -> None:
    """Show a command, then run it.

    Raises:
        StepFailedError: it failed.
    """
    say(f"\n$ fst {shlex.join(words)}\n")
    _check(words, wait(start(*words)))


def run_for_json(*words: str) -> Any:
    """Show a command, run it, and return the JSON that it prints, a page at most.

    Raises:
        StepFailedError: it failed.
    """
    say(f"\n$ fst {shlex.join(words)}\n")
    process = start(*words, stdout=subprocess.PIPE)
    _check(words, wait(process))  # a page fits into the pipe
    assert process.stdout is not None
    return json.loads(process.stdout.read())


def _check(words: Sequence[str], exit_code: int) -> None:
    if exit_code:
        raise StepFailedError(f"fst {words[0]} failed with exit code {exit_code}; the demo stops")


def start(*words: str, stdout: int | None = None) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, so that Ctrl-C reaches it once: from here."""
    command = [sys.executable, "-m", "full_stack_transformer", *words]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, process_group=0)


def wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a command; hands Ctrl-C on to it, since a training writes a checkpoint first."""
    is_interrupted = False
    while True:
        try:
            exit_code = process.wait()
            break
        except KeyboardInterrupt:
            is_interrupted = True
            process.send_signal(signal.SIGINT)
    if is_interrupted:
        if exit_code == 0:
            raise KeyboardInterrupt
        sys.exit(exit_code)  # the command has said why
    return exit_code


def free_port(port: int, flag: str) -> int:
    """`port`, or a free one for 0."""
    with listen("127.0.0.1", port, flag) as listener:
        return int(listener.getsockname()[1])


def wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait for a server.

    Raises:
        StepFailedError: its process ended.
        MachineError: it does not answer in two minutes.
    """
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StepFailedError(f"the process of {url} exited with code {process.returncode}")
        try:
            httpx.get(url, timeout=5.0)
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise MachineError(f"{url} does not respond after {_SECONDS_TO_START:.0f} s")


def say(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
