"""Runs chat templates in a process of its own, with bounds on memory and time.

    messages and other variables, program --pipe--> process with little memory and time --pipe--> text

Jinja's sandbox keeps a template from files and from Python, but not from taking all memory
({{ 'a' * 10**10 }}) or time. The system keeps a process from both, whatever the template does.
"""

import atexit
import fcntl
import json
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

from jinja2 import Template

from full_stack_transformer.errors import RequestError, ServiceBusyError
from full_stack_transformer.tokenization.templates import Program, compiled

# Of the process, with the interpreter's own 50 MB. A conversation of a million characters takes 60 MB.
_MAX_BYTES = 512 << 20
_MAX_CHARACTERS = 1 << 24
# Of processor time; a long conversation takes a hundredth of one.
_MAX_SECONDS = 20.0
# As long as the processor is busy with other work, the clock runs on.
_MAX_SECONDS_BY_THE_CLOCK = 300.0
# For those of other threads.
_MAX_SECONDS_OF_WAITING = 60.0
# That a process keeps.
_MAX_PROGRAMS = 64
# Of the environment; the rest, such as keys, is not for a template.
_VARIABLES = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
# As much as Linux gives; a long conversation then goes through at once.
_PIPE_BYTES = 1 << 20
_PROGRAM, _RENDER = 0, 1
_LENGTH = struct.Struct("<Q")


# ---------------------------------------------------------------------- running it


def run(program: Program, variables: Mapping[str, Any]) -> str:
    """What the template writes.

    Raises:
        RequestError: it refuses the variables, is wrong, or takes too much memory or time.
        ServiceBusyError: those of other threads take long.
    """
    return _processes.run(program, variables)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """In the body, all templates together take so much processor time at most."""
    token = _seconds_left.set([seconds, seconds])
    try:
        yield
    finally:
        _seconds_left.reset(token)


# Seconds that are left, and those at the start.
_seconds_left: ContextVar[list[float] | None] = ContextVar("seconds_left", default=None)


class _Processes:
    """The process that runs templates for this one: started when it is needed, one template at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: set[bytes] = set()
        self._seconds = 0.0

    def run(self, program: Program, variables: Mapping[str, Any]) -> str:
        """See the function `run`."""
        left = _seconds_left.get() or [_MAX_SECONDS, _MAX_SECONDS]
        content = pickle.dumps((_RENDER, program.key, variables, left[0]))
        if not self._lock.acquire(timeout=_MAX_SECONDS_OF_WAITING):
            raise ServiceBusyError(
                "the chat templates of other requests take long; try again later"
            )
        try:
            before = self._seconds
            answer = self._ask(program, content, left[1])
            self._seconds = answer["seconds"]
            # A difference of totals: some systems count in hundredths.
            left[0] -= self._seconds - min(before, self._seconds)
        finally:
            self._lock.release()
        if left[0] <= 0:
            raise _too_slow(left[1])
        if "error" in answer:
            raise _refused(str(answer["error"]))
        return str(answer["text"])

    def _ask(self, program: Program, content: bytes, seconds: float) -> dict[str, Any]:
        if program.key not in self._known and len(self._known) >= _MAX_PROGRAMS:
            self.stop()  # their compiled code counts as memory
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if program.key not in self._known:
                words = (_PROGRAM, program.key, program.tree, program.shows_blocks)
                _write(process.stdin, pickle.dumps(words))
                self._known.add(program.key)
            _write(process.stdin, content)
            answer = _read_answer(process.stdout)
        except (OSError, EOFError) as error:
            self.stop()
            if process.returncode == -signal.SIGXCPU:
                raise _too_slow(seconds) from error
            raise _refused(
                f"the process that ran it ended with {process.returncode}, mostly for lack of memory"
            ) from error
        except BaseException:  # such as Ctrl-C: an answer is on its way to nobody
            self.stop()
            raise
        if answer.get("ends"):
            self.stop()
            answer["seconds"] = 0.0
        return answer

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.stop()
            # -P: modules of the working directory are not for it.
            words = [sys.executable, "-P", "-m", __name__]
            root = str(Path(__file__).resolve().parents[2])
            path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
            kept = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # a fork has no part of what is being written
                stderr=subprocess.DEVNULL,
                env={**kept, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for this one
            )
            for pipe in (self._process.stdin, self._process.stdout):
                # Another system has no such call, and a user may have too many pipes.
                with suppress(OSError, AttributeError):
                    assert pipe is not None
                    fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        return self._process

    def stop(self) -> None:
        """End the process; the next template starts another."""
        process, self._process, self._known = self._process, None, set()
        self._seconds = 0.0
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def forget(self) -> None:
        """In a fork: the process belongs to the one that forked."""
        if self._process is not None:
            self._process.returncode = 0  # so that nobody misses its end
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
        self.__init__()  # type: ignore[misc]


def _refused(reason: str) -> RequestError:
    return RequestError(f"the chat template refuses these messages: {reason}")


def _too_slow(seconds: float) -> RequestError:
    return RequestError(
        f"the chat template takes more than {seconds:g} s of processor time for this conversation"
    )


def _write(pipe: Any, content: bytes) -> None:
    rest = memoryview(_LENGTH.pack(len(content)) + content)
    while rest:
        rest = rest[pipe.write(rest) :]
    pipe.flush()


def _read_answer(pipe: Any) -> dict[str, Any]:
    """JSON, since what runs there is not trusted.

    Raises:
        EOFError: the process ended, or does not answer.
    """
    end = time.monotonic() + _MAX_SECONDS_BY_THE_CLOCK
    content, length = bytearray(), _LENGTH.size
    has_length = False
    poll = (
        select.poll()
    )  # select knows no descriptors above 1,023, which a service with many clients has
    poll.register(pipe, select.POLLIN)
    while len(content) < length:
        ready = poll.poll(1000 * max(0.0, end - time.monotonic()))
        part = os.read(pipe.fileno(), length - len(content)) if ready else b""
        if not part:
            raise EOFError
        content += part
        if not has_length and len(content) == length:
            has_length, length = True, _LENGTH.unpack(content)[0]
            content.clear()
    found: dict[str, Any] = json.loads(content)
    return found


_processes = _Processes()
atexit.register(_processes.stop)
os.register_at_fork(after_in_child=_processes.forget)


# ---------------------------------------------------------------------- the process


def _serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Run templates until nobody asks any more."""
    programs: dict[bytes, tuple[bytes, bool] | Template] = {}
    while header := stdin.read(_LENGTH.size):
        # Of the process that started this one.
        kind, key, *words = pickle.loads(stdin.read(_LENGTH.unpack(header)[0]))  # noqa: S301
        if kind == _PROGRAM:
            tree, shows_blocks = words
            programs[key] = (tree, shows_blocks)
            continue
        variables, seconds = words
        began = time.process_time()
        # The system ends the process, also inside of a function of C. It counts whole seconds.
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        most = int(began + max(seconds, 0.0)) + 1
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))
        answer = _rendered(programs, key, variables)
        answer["seconds"] = time.process_time()
        _write(stdout, json.dumps(answer).encode())


def _rendered(
    programs: dict[bytes, tuple[bytes, bool] | Template], key: bytes, variables: dict[str, Any]
) -> dict[str, Any]:
    """The text or the error, and whether the process should end."""
    try:
        found = programs[key]
        if isinstance(found, tuple):
            found = programs[key] = compiled(found[0], shows_blocks=found[1])
        text = found.render(variables)
        if len(text) <= _MAX_CHARACTERS:
            return {"text": text}
        return {"error": f"it writes more than {_MAX_CHARACTERS:,} characters"}
    except MemoryError:
        return {"error": f"it takes more than {_MAX_BYTES >> 20} MiB of memory", "ends": True}
    except Exception as error:  # a template can raise anything
        return {"error": f"{error!s:.1000}"}


def _limit(kind: int, most: int) -> None:
    """Not above what this process may have; nothing where the system has no such limit."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (most, most))


def _main() -> None:
    _limit(resource.RLIMIT_AS, _MAX_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    _serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    _main()
