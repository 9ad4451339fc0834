"""Runs `fst …` many times, each in a fresh process with or without a gate before its file system calls.

    GatedRunner ──request──> server (package imported once) ──fork──> the command
        └──────────── holds the gate of the command <──listener───────────┘

A run costs a fork (about 0.1 s for a small preparation) instead of a start (0.4 s). Knows nothing of
what the commands do.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.faults import gate

_MESSAGE_BYTES = 1 << 16
_PACKAGE = "full_stack_transformer"
# What commands import when they run; imported before the fork, so that it is paid once.
_PRELOADED = (f"{_PACKAGE}.command_line", f"{_PACKAGE}.preparation.prepare")
_PATIENCE_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    exit_code: int
    """Negative: the number of the signal that ended it."""
    stdout: str
    stderr: str
    hung: bool = False
    """Whether it was ended by us, after a minute without a file system call."""


class GateError(Exception):
    """The gate could not be installed, or the server ended."""


class GatedRunner:
    """Runs commands one after the other; made by `gated_runner`."""

    def __init__(self, connection: socket.socket, output: Path) -> None:
        self._connection = connection
        self._output = output

    def run(self, words: list[str], decide: gate.Decide | None = None) -> Finished:
        """Run `fst words`; with `decide`, ask it before every file system call.

        Raises:
            GateError: the gate could not be installed, or the server ended.
        """
        request = {"words": words, "gated": decide is not None, "output": str(self._output)}
        self._connection.send(json.dumps(request).encode())
        message, listeners, _, _ = socket.recv_fds(self._connection, _MESSAGE_BYTES, 1)
        hung = False
        if decide is not None and listeners:
            hung = not _hold(listeners[0], decide, json.loads(message)["process_id"])
            message = self._connection.recv(_MESSAGE_BYTES)
        stdout, stderr = (
            self._output.with_suffix(end).read_text("utf-8") for end in (".out", ".err")
        )
        if not message or (decide is not None and not listeners):
            raise GateError(f"the command could not be put behind a gate:\n{stderr}")
        return Finished(json.loads(message)["exit_code"], stdout, stderr, hung)


def _hold(listener: int, decide: gate.Decide, process_id: int) -> bool:
    try:
        ended = gate.hold(listener, decide, patience_seconds=_PATIENCE_SECONDS)
        if not ended:
            os.killpg(process_id, signal.SIGKILL)
        return ended
    finally:
        os.close(listener)


@contextlib.contextmanager
def gated_runner(
    output: Path, constants: Mapping[str, float] | None = None
) -> Iterator[GatedRunner]:
    """A runner whose commands write to `output` with the endings .out and .err; its server ends with it.

    Args:
        output: a path in an existing directory.
        constants: values of module constants in the commands, such as "preparation.prepare.SIZE".
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # One thread: forking with live ones can dead-lock, and OpenBLAS starts some on import.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = (sys.executable, "-m", "tests.faults.runner")
    with ours, theirs:
        ours.settimeout(2 * _PATIENCE_SECONDS)
        server = subprocess.Popen(
            [*command, str(theirs.fileno()), json.dumps(constants or {})],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[2],
            env=environment,
        )
        theirs.close()
        try:
            yield GatedRunner(ours, output)
        finally:
            ours.close()
            server.wait(_PATIENCE_SECONDS)


def _set_constants(constants: Mapping[str, float]) -> None:
    """Set them before any other module of the package copies them."""
    for path, value in constants.items():
        module_name, _, name = path.rpartition(".")
        module = importlib.import_module(f"{_PACKAGE}.{module_name}")
        if not hasattr(module, name):
            raise GateError(f"{_PACKAGE}.{path} does not exist")
        setattr(module, name, value)


def _serve(connection: socket.socket) -> None:
    """Fork a command for every request, until there is none."""
    for name in _PRELOADED:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork could dead-lock with threads"
    while message := connection.recv(_MESSAGE_BYTES):
        request = json.loads(message)
        process_id = os.fork()
        if process_id == 0:
            _become_command(connection, **request)
        _, status = os.waitpid(process_id, 0)
        answer = {"exit_code": os.waitstatus_to_exitcode(status)}
        connection.send(json.dumps(answer).encode())


def _become_command(
    connection: socket.socket, words: list[str], gated: bool, output: str
) -> NoReturn:
    # A group of its own, so that all of it can be ended, and an end with the server's.
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for descriptor, end in ((1, ".out"), (2, ".err")):
        file = os.open(Path(output).with_suffix(end), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    if gated:
        process_id = json.dumps({"process_id": os.getpid()}).encode()
        listener = gate.install()
        socket.send_fds(connection, [process_id], [listener])
        os.close(listener)
    connection.close()
    from full_stack_transformer.command_line import run

    sys.exit(run(words))


if __name__ == "__main__":
    _set_constants(json.loads(sys.argv[2]))
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        _serve(requests)
