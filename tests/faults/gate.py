"""A gate before file system calls: whoever holds it lets each one pass, fails it or kills its process.

    process: write(…) ──> kernel holds it ──> gate: pass | errno | kill ──> kernel goes on

Linux's seccomp user notification (seccomp_unotify(2)). One counter runs over all threads and child
processes, and calls are chosen by what they touch. strace's injection can do neither: it counts in
every thread on its own and `-P` compares whole paths (strace 6.1). Knows nothing of what is run.
"""

import ctypes
import errno
import fcntl
import functools
import os
import platform
import select
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Numbers of the x86-64 table (linux/arch/x86/entry/syscalls/syscall_64.tbl) with the kinds of their
# first arguments: "f" an open file, "p" a path, "d" a directory that the next path is relative to.
_SYSTEM_CALLS: dict[int, tuple[str, str]] = {
    0: ("read", "f"),
    1: ("write", "f"),
    2: ("open", "p"),
    3: ("close", "f"),
    4: ("stat", "p"),
    5: ("fstat", "f"),
    6: ("lstat", "p"),
    8: ("lseek", "f"),
    17: ("pread64", "f"),
    18: ("pwrite64", "f"),
    19: ("readv", "f"),
    20: ("writev", "f"),
    40: ("sendfile", "f"),
    73: ("flock", "f"),
    74: ("fsync", "f"),
    75: ("fdatasync", "f"),
    76: ("truncate", "p"),
    77: ("ftruncate", "f"),
    82: ("rename", "pp"),
    83: ("mkdir", "p"),
    84: ("rmdir", "p"),
    85: ("creat", "p"),
    86: ("link", "pp"),
    87: ("unlink", "p"),
    217: ("getdents64", "f"),
    257: ("openat", "dp"),
    258: ("mkdirat", "dp"),
    262: ("newfstatat", "dp"),
    263: ("unlinkat", "dp"),
    264: ("renameat", "dpdp"),
    265: ("linkat", "dpdp"),
    277: ("sync_file_range", "f"),
    285: ("fallocate", "f"),
    296: ("pwritev", "f"),
    306: ("syncfs", "f"),
    316: ("renameat2", "dpdp"),
    326: ("copy_file_range", "f f"),
    332: ("statx", "dp"),
}
_AUDIT_ARCH_X86_64 = 0xC000003E
_SECCOMP, _SET_MODE_FILTER, _FLAG_NEW_LISTENER = 317, 1, 8
_PR_SET_NO_NEW_PRIVS = 38
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # classic BPF
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
_NOTIFICATION = struct.Struct("=QII iIQ 6Q")  # seccomp_notif with its seccomp_data
_RESPONSE = struct.Struct("=QqiI")
_LET_PASS = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_AT_CURRENT_DIRECTORY = 0xFFFFFF9C
_LONGEST_PATH = 4096
_CREATE_FLAGS = os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_TRUNC

# fmt: off
_CHANGING = frozenset((
    "write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range", "fallocate", "truncate",
    "ftruncate", "creat", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir", "unlink",
    "unlinkat", "link", "linkat", "fsync", "fdatasync", "syncfs", "sync_file_range",
))
# fmt: on


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("operand", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (
        ("length", ctypes.c_ushort),
        ("instructions", ctypes.POINTER(_Instruction)),
    )


@functools.cache
def missing() -> str | None:
    """Why there can be no gate on this machine, or None."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"needs Linux on x86-64, found {platform.system()} on {platform.machine()}"
    # Leaves at once: the gate would hold every further call of this process, for nobody to answer.
    program = "import os; from tests.faults import gate; gate.install(); os._exit(0)"
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    return f"needs seccomp user notification (Linux 5.9): {done.stderr.strip().splitlines()[-1]}"


def install() -> int:
    """Put the gate before every later file system call of this process; return its other end.

    Raises:
        OSError: the kernel, or the container around this process, forbids it.
    """
    library = ctypes.CDLL(None, use_errno=True)
    instructions = _filter()
    program = _Program(len(instructions), instructions)
    if library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    listener = library.syscall(
        _SECCOMP, _SET_MODE_FILTER, _FLAG_NEW_LISTENER, ctypes.byref(program)
    )
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(listener)


def _filter() -> "ctypes.Array[_Instruction]":
    numbers = sorted(_SYSTEM_CALLS)
    lines = [
        (_LOAD, 0, 0, 4),  # the architecture; a 32-bit program passes
        (_JUMP_IF_EQUAL, 0, len(numbers) + 1, _AUDIT_ARCH_X86_64),
        (_LOAD, 0, 0, 0),  # the number
        *((_JUMP_IF_EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _NOTIFY),
    ]
    return (_Instruction * len(lines))(*(_Instruction(*line) for line in lines))


@dataclass(frozen=True)
class Call:
    """One file system call before it happens."""

    name: str
    paths: tuple[str, ...]
    """What it touches, absolute; a rename has two."""
    creates: bool
    """Whether it opens a file for writing."""
    thread_id: int

    @property
    def process_id(self) -> int:
        """The process of the thread that is held."""
        status = Path(f"/proc/{self.thread_id}/status").read_text(errors="replace")
        return int(status.partition("\nTgid:")[2].split("\n", 1)[0])

    @property
    def changes(self) -> bool:
        """Whether the disk differs afterwards: a kill anywhere else equals one before the next change."""
        return self.creates or self.name in _CHANGING

    def __str__(self) -> str:
        return f"{self.name}({' -> '.join(self.paths)}{', for writing' if self.creates else ''})"


Decide = Callable[[Call], int]
"""Answers 0 to let a call pass, or the errno that it fails with."""


def hold(listener: int, decide: Decide, *, patience_seconds: float) -> bool:
    """Ask `decide` about each call until every process behind the gate has ended.

    Returns False when there was no call for `patience_seconds` and still no end.
    """
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while events := poll.poll(patience_seconds * 1000):
        if events[0][1] & select.POLLIN:
            _answer(listener, decide)
        elif events[0][1] & (select.POLLHUP | select.POLLERR):
            return True
    return False


def _answer(listener: int, decide: Decide) -> None:
    notification = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, notification)
        call_id, thread_id, _, number, _, _, *arguments = _NOTIFICATION.unpack(notification)
        call = _describe(thread_id, number, arguments)
        error = decide(call) if call is not None else 0
        flags = 0 if error else _LET_PASS
        fcntl.ioctl(listener, _SEND, _RESPONSE.pack(call_id, 0, -error, flags))
    except OSError as failure:
        # The process died while it was held: by our hand, or by that of another thread of it.
        if failure.errno not in (errno.ENOENT, errno.ESRCH):
            raise


def _describe(thread_id: int, number: int, arguments: list[int]) -> Call | None:
    name, kinds = _SYSTEM_CALLS[number]
    try:
        paths = tuple(_paths(thread_id, kinds, arguments))
    except OSError:  # a descriptor that is not open, an address that is none: the kernel's affair
        return None
    flags = {"open": arguments[1], "openat": arguments[2]}.get(name, 0)
    return Call(name, paths, bool(flags & _CREATE_FLAGS), thread_id)


def _paths(thread_id: int, kinds: str, arguments: list[int]) -> Iterator[str]:
    directory = f"/proc/{thread_id}/cwd"
    for kind, argument in zip(kinds, arguments, strict=False):
        if kind == "f":
            yield _of_descriptor(thread_id, argument)
        elif kind == "d":
            here = argument & 0xFFFFFFFF == _AT_CURRENT_DIRECTORY
            directory = f"/proc/{thread_id}/{'cwd' if here else f'fd/{argument & 0xFFFFFFFF}'}"
        elif kind == "p":
            path = _string_at(thread_id, argument)
            yield os.path.normpath(Path(directory).readlink() / path)


def _of_descriptor(thread_id: int, descriptor: int) -> str:
    link = Path(f"/proc/{thread_id}/fd/{descriptor & 0xFFFFFFFF}")
    return str(link.readlink()).removesuffix(" (deleted)")


def _string_at(thread_id: int, address: int) -> str:
    with Path(f"/proc/{thread_id}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        # Never over the border of a page: the next one may not be there.
        text = memory.read(_LONGEST_PATH - address % _LONGEST_PATH)
        if b"\0" not in text:
            text += memory.read(_LONGEST_PATH)
    return os.fsdecode(text.partition(b"\0")[0])
