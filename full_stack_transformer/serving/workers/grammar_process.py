"""The process that follows grammars, apart from the service: small ones can explode, in time and in memory.

    service --control: start, end--> this process, with a vocabulary --fork--> one child for each grammar
            <------------------ masks of allowed tokens ---------------------/

Run as a file by `grammars`. A child has bounds on processor time and memory; what passes them ends it, and
it alone. All end with the service. Imports llguidance and the standard library only, so that it starts in a
tenth of a second. Knows nothing of requests and models.
"""

import array
import contextlib
import ctypes
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Usual schemas take milliseconds, an enumeration of 2,000 objects half a second and 26 MB.
SECONDS_TO_COMPILE = 2.0
MAX_MEGABYTES = 64
# Usual steps take 0.01 to 2 ms; the model waits meanwhile, and with it all texts.
SECONDS_OF_TEXT, SECONDS_OF_STEP = 0.1, 0.002

# What the service says over the control socket: which child to start, with its socket, or to end.
CONTROL = struct.Struct("<cq")
START, END = b"+", b"-"
# The first byte of a message to it: an answer, a refusal in words, or the signal that ended the child.
ANSWER, REFUSAL, DEATH = b"A", b"R", b"D"

TOO_LARGE = "too large"
TOO_SLOW = "too slow"
_INVALID = "invalid"
# Without white space between the parts: a small model would fill its answer with it.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What llguidance says when one of its own bounds is passed.
_WORDS_OF_BOUNDS = (
    "too large",
    "too big",
    "too many",
    "too complex",
    "fuel",
    "max is",
    "unable to",
)
_COMPILING_PRIORITY = 10
_PR_SET_PDEATHSIG = 1


def main(control_fd: int, tokenizer_file: str, vocab_size: int, end_id: int) -> None:
    """Serve until the other end of the control socket is closed."""
    import llguidance

    # The service ends this, not a terminal's Ctrl-C nor a supervisor that tells all processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    control = socket.socket(fileno=control_fd)
    try:
        vocabulary = llguidance.LLTokenizer(tokenizer_file, n_vocab=vocab_size, eos_token=end_id)
    except ValueError as error:
        control.send(REFUSAL + str(error)[:500].encode())
        return
    control.send(ANSWER)
    _Parent(control, vocabulary).run()


class _Parent:
    """Starts, ends and buries the children."""

    def __init__(self, control: socket.socket, vocabulary: Any) -> None:
        self._control = control
        self._vocabulary = vocabulary
        self._pids: dict[int, int] = {}
        # Copies of the children's sockets, to report a death to whoever waits for an answer.
        self._reports: dict[int, Connection] = {}
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)

    def run(self) -> None:
        """Obey; each start is followed by one end."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        while True:
            ready, _, _ = select.select([self._control, self._woken], [], [])
            if self._woken in ready:
                self._woken.recv(4096)
            self._bury()
            if self._control in ready:
                message, fds, _, _ = socket.recv_fds(self._control, CONTROL.size, 1)
                if not message:
                    break
                what, number = CONTROL.unpack(message)
                if what == START:
                    self._start(number, Connection(fds[0]))
                elif number in self._pids:
                    os.kill(self._pids.pop(number), signal.SIGKILL)
        for pid in self._reports:
            os.kill(pid, signal.SIGKILL)

    def _start(self, number: int, service: Connection) -> None:
        try:
            pid = os.fork()
        except (
            OSError
        ):  # too many processes, or no memory: its end is told by the closed connection
            service.close()
            return
        if pid:
            self._pids[number] = pid
            self._reports[pid] = service
            return
        try:
            signal.set_wakeup_fd(-1)
            for mine in (self._control, self._woken, self._waker):
                mine.close()
            for report in self._reports.values():
                report.close()
            _follow(service, self._vocabulary)
        finally:
            os._exit(0)

    def _bury(self) -> None:
        """Take note of children that have ended, and tell who waits for them why."""
        while self._reports:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            report = self._reports.pop(pid)
            self._pids = {number: one for number, one in self._pids.items() if one != pid}
            with report, contextlib.suppress(OSError):
                report.send_bytes(DEATH + str(os.WTERMSIG(status)).encode())


# ---------------------------------------------------------------------- a child


def _follow(service: Connection, vocabulary: Any) -> None:
    """Compile the grammar that comes first, then answer for its texts until nobody asks any more."""
    _bound()
    try:
        kind, _, text = service.recv_bytes().decode().partition(" ")
        compiled = _compile(kind, text, vocabulary)
        if isinstance(compiled, str):
            service.send_bytes(REFUSAL + compiled.encode())
            return
        service.send_bytes(ANSWER)
        texts: dict[int, _Text] = {}
        while True:
            asked = array.array("q")
            asked.frombytes(service.recv_bytes())
            number, *token_ids = asked
            if number < 0:
                texts.clear()
                continue
            if number not in texts:
                texts[number] = _Text(compiled.deep_copy())
            service.send_bytes(texts[number].step(token_ids))
    except EOFError:
        return
    except MemoryError:
        service.send_bytes(REFUSAL + TOO_LARGE.encode())


def _bound() -> None:
    """Bounds on memory and files; the end of the parent is the child's end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MAX_MEGABYTES * 1024 * 1024
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where llguidance is surprised it prints the grammar, which is the client's.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _compile(kind: str, text: str, vocabulary: Any) -> Any:
    """A matcher that knows its first mask; in words why there is none."""
    found: list[Any] = []

    def compile_() -> None:
        if sys.platform == "linux":  # where threads have priorities of their own
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, _COMPILING_PRIORITY)
        try:
            found.append(_new_matcher(kind, text, vocabulary))
        except MemoryError:
            found.append(TOO_LARGE)
        except BaseException:  # such as what PyO3 makes of a panic
            found.append(_INVALID)

    # The kernel's answer to a timer that has run out is to end the process, whatever it does.
    signal.setitimer(signal.ITIMER_PROF, SECONDS_TO_COMPILE)
    compiling = threading.Thread(target=compile_)
    compiling.start()
    compiling.join()
    signal.setitimer(signal.ITIMER_PROF, 0)
    return found[0]


def _new_matcher(kind: str, text: str, vocabulary: Any) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    if kind == "regex":
        grammar = LLMatcher.grammar_from_regex(text)
    else:
        grammar = LLMatcher.grammar_from_json_schema(text, defaults=_JSON_OPTIONS)
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return _refusal(matcher)
    return matcher


def _refusal(matcher: Any) -> str:
    """Why a matcher does not go on, without llguidance's own message: it repeats the grammar."""
    message = matcher.get_error().lower()
    return TOO_LARGE if any(words in message for words in _WORDS_OF_BOUNDS) else _INVALID


class _Text:
    """One text that follows the grammar, and what it may take of the processor until its next step."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._seconds = SECONDS_OF_TEXT

    def step(self, token_ids: list[int]) -> bytes:
        """The answer after some more tokens: whether the text may end, and which tokens may come."""
        before = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        matcher = self._matcher
        if token_ids:
            matcher.consume_tokens(token_ids)
        mask = b"" if matcher.is_stopped() else matcher.compute_bitmask()
        signal.setitimer(signal.ITIMER_PROF, 0)
        if matcher.is_error():
            return REFUSAL + _refusal(matcher).encode()
        left = self._seconds - (time.process_time() - before)
        if left <= 0:
            return REFUSAL + TOO_SLOW.encode()
        self._seconds = min(SECONDS_OF_TEXT, left + SECONDS_OF_STEP)
        may_end = matcher.is_accepting() or matcher.is_stopped()
        return ANSWER + bytes([may_end]) + mask


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
