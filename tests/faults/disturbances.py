"""Which faults a sequence of file system calls offers, and causing one of them at the gate."""

import errno
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tests.faults.gate import Call

Kind = Literal["kill", "resumed", "errno", "full"]
"""kill: the process dies just before a call.
resumed: so does the one that goes on after a kill half-way.
errno: a call fails, once, with each error that it can have.
full: the disk is full from a call on."""
KINDS: tuple[Kind, ...] = get_args(Kind)

# What a call can fail with, where it is not each of these:
_ON_THE_DISK = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
_READING = (
    "read",
    "readv",
    "pread64",
    "getdents64",
    "stat",
    "lstat",
    "fstat",
    "newfstatat",
    "statx",
)
_ERRORS_OF_CALL = {
    **dict.fromkeys((*_READING, "close"), (errno.EIO,)),
    **dict.fromkeys(("open", "openat", "creat"), (errno.EIO, errno.EACCES)),
    "flock": (errno.ENOLCK,),
    "lseek": (),  # it moves a number in memory
}
# What a full disk refuses; it lets files be renamed and deleted.
# fmt: off
_TAKE_SPACE = frozenset((
    "write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range", "fallocate", "creat",
    "mkdir", "mkdirat",
))
# fmt: on


@dataclass(frozen=True)
class Point:
    """One disturbance: of which kind, and at which call of the run."""

    kind: Kind
    number: int
    error: int
    """The errno; 0 for a kill."""
    call: str

    def __str__(self) -> str:
        name = {
            "kill": "killed before",
            "resumed": "killed again before",
            "errno": errno.errorcode.get(self.error, "") + " at",
            "full": "disk full from",
        }[self.kind]
        return f"{self.kind}:{self.number} {name} {self.call}"


def points_of(calls: Sequence[Call], kind: Kind) -> list[Point]:
    """Every disturbance of this kind in a run with these calls."""
    return [
        Point(kind, number, error, str(call))
        for number, call in enumerate(calls)
        for error in _errors(call, kind)
    ]


def _errors(call: Call, kind: Kind) -> tuple[int, ...]:
    if kind == "errno":
        return _ON_THE_DISK if call.creates else _ERRORS_OF_CALL.get(call.name, _ON_THE_DISK)
    if kind == "full":
        return (errno.ENOSPC,) if _takes_space(call) else ()
    return (0,) if call.changes else ()


def _takes_space(call: Call) -> bool:
    return call.creates or call.name in _TAKE_SPACE


class Disturbance:
    """Decides at the gate: counts the calls on paths that it `concerns` and disturbs at one."""

    def __init__(self, concerns: Callable[[str], bool], point: Point | None = None) -> None:
        self.calls: list[Call] = []
        self.performed: list[Call] = []
        """Those of the calls that did not fail by our hand."""
        self._concerns = concerns
        self._point = point

    @property
    def happened(self) -> bool:
        """Whether the run came as far as the point."""
        return self._point is not None and len(self.calls) > self._point.number

    def __call__(self, call: Call) -> int:
        """The errno that the call fails with, 0 for none."""
        if not any(map(self._concerns, call.paths)):
            return 0
        error = self._error_at(len(self.calls), call)
        self.calls.append(call)
        if not error:
            self.performed.append(call)
        return error

    def _error_at(self, number: int, call: Call) -> int:
        if self._point is None or number < self._point.number:
            return 0
        if self._point.kind == "full":
            return self._point.error if _takes_space(call) else 0
        if number == self._point.number and not self._point.error:
            os.kill(call.process_id, signal.SIGKILL)
        return self._point.error if number == self._point.number else 0


def spread(points: Sequence[Point], num_points: int) -> list[Point]:
    """So many of the points, evenly spread, the first and the last among them."""
    if len(points) <= num_points:
        return list(points)
    last = len(points) - 1
    return [points[round(index * last / (num_points - 1))] for index in range(num_points)]
