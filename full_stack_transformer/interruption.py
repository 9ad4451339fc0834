"""What Ctrl-C does to a command: one line and exit code 130, whatever the process is doing.

    start   imports and first checks   end the process at once: there is nothing to clean up
    work    the command itself         KeyboardInterrupt, but not where it would be lost
    end     the interpreter's exit     end the process at once

Python raises KeyboardInterrupt between any two of its instructions. In an import the exception can come out
as an ImportError or be dropped, since libraries import optional packages inside `try`; in a destructor Python
drops it; a long call of native code delays it. Where it cannot be raised soon, the process is ended as by
`kill -9`, which no command's files suffer from. Only the process of a command line is changed, never a
program that imports the package.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

EXIT_CODE = 130
_MESSAGE = b"fst: interrupted\n"
_IMPORT_FILES = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
_SECONDS_BETWEEN_TRIES = 0.02
# Then an import is ended. Those of a few modules while a command works take less.
_MAX_TRIES = 25
# Then a call of native code is ended, such as the merges of a BPE of a large corpus.
_SECONDS_OF_NATIVE_CODE = 1.0

_is_held = False
_is_waiting = False
_was_raised = False
_num_tries = 0
_last_handled = 0.0  # time.monotonic()


def end_at_once() -> None:
    """From now on Ctrl-C ends the process; where a shell switched it off for a job, it stays off."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        with contextlib.suppress(ValueError):  # another thread than the main one
            signal.signal(signal.SIGINT, _end)
    release()


def raise_where_safe() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt; does nothing in a program without `end_at_once`."""
    if signal.getsignal(signal.SIGINT) is not _end:
        return
    sys.unraisablehook = _try_again_if_lost
    signal.signal(signal.SIGINT, _raise_unless_importing)
    _watch_native_code()


def hold() -> None:
    """Let Ctrl-C wait until `release`; processes that are started meanwhile never get one."""
    global _is_held
    _is_held = True  # for a signal that another thread receives
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def release() -> None:
    """End `hold`, also of the process that this one replaced."""
    global _is_held, _is_waiting
    _is_held = False
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if _is_waiting:
        _is_waiting = False
        os.kill(os.getpid(), signal.SIGINT)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """`hold` inside."""
    hold()
    try:
        yield
    finally:
        release()


def was_raised() -> bool:
    """Whether Ctrl-C was a KeyboardInterrupt in this process, whatever became of it."""
    return _was_raised


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to, instead of an exception in the middle of what is done inside."""
    received: list[int] = []

    def collect(number: int, frame: FrameType | None) -> None:
        global _last_handled
        _last_handled = time.monotonic()
        received.append(number)

    before = signal.signal(signal.SIGINT, collect)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        if (
            "multiprocessing" in sys.modules
        ):  # a process that has just begun complains of its parent
            for child in sys.modules["multiprocessing"].active_children():
                child.kill()
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes of one training one speaks
        os.write(2, _MESSAGE)
    os._exit(EXIT_CODE)


def _raise_unless_importing(number: int, frame: FrameType | None) -> None:
    global _is_waiting, _last_handled, _num_tries, _was_raised
    _last_handled = time.monotonic()
    if _is_held:
        _is_waiting = True
        return
    if not _is_importing(frame):
        _num_tries = 0
        _was_raised = True
        raise KeyboardInterrupt
    if _num_tries == _MAX_TRIES:
        _end(number, frame)
    _num_tries += 1
    _try_again()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename in _IMPORT_FILES:
            return True
        frame = frame.f_back
    return False


def _try_again_if_lost(lost: "sys.UnraisableHookArgs") -> None:
    """Python calls it for exceptions that nothing can catch, such as those in a destructor."""
    if lost.exc_type is KeyboardInterrupt:
        _try_again()
    else:
        sys.__unraisablehook__(lost)


def _try_again() -> None:
    def interrupt() -> None:
        time.sleep(_SECONDS_BETWEEN_TRIES)
        os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread, as raise_signal here would not

    _start_thread(interrupt)


def _watch_native_code() -> None:
    """End the process where a signal arrives and Python does not get to handle it."""
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    # Python writes the number of a signal as it arrives, whatever the main thread does.
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)

    def watch() -> None:
        while numbers := os.read(receiver, 1):
            if numbers[0] != signal.SIGINT:
                continue
            # The handler may have been faster than this thread.
            earliest = time.monotonic() - _SECONDS_OF_NATIVE_CODE / 2
            time.sleep(_SECONDS_OF_NATIVE_CODE)
            is_ours = signal.getsignal(signal.SIGINT) is _raise_unless_importing
            if is_ours and _last_handled < earliest:
                _end(signal.SIGINT, None)

    _start_thread(watch)


def _start_thread(target: Any) -> None:
    import threading  # here, since it takes milliseconds of the start

    threading.Thread(target=target, daemon=True).start()
