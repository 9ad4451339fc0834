"""The file at the path of the bot's database: private, locked for one process, and watched.

Knows that SQLite writes it, and where SQLite puts its log; not what is in it.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shlex
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from full_stack_transformer.errors import MachineError

logger = logging.getLogger(__name__)

# A lock of one byte far behind SQLite's own locks, which are at 2**30: https://www.sqlite.org/src/file/src/os.h
# It is one of the open file (F_OFD_SETLK): SQLite opens and closes the file, which would end one of the
# process. `struct flock` of fcntl(2): type, whence, start, length, process.
_ONE_BYTE_LOCK = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 2**40, 1, 0)
_MAGIC = b"SQLite format 3\0"
# Where a number of each process stands in the file's header: https://www.sqlite.org/fileformat2.html
_VERSION_OFFSET, _VERSION_BYTES = 60, 4


class DatabaseFile:
    """The file at the path of a database: private, locked for one process, and watched.

    The lock belongs to the file, not to its name: it is the same through links and other paths. The kernel
    ends it with the process, however that ends. The descriptor stays open until SQLite has closed its own:
    closing it would end SQLite's locks.

    Raises:
        MachineError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.real_path = path.resolve()
            if path.exists() and not path.is_file():
                raise MachineError(f"--database {path} is not a regular file; pass another file")
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise MachineError(
                f"--database {path} cannot be written: {error.strerror}; pass another file"
            ) from None
        self._lock_file: TextIO | None = None
        self._identities: dict[Path, tuple[int, int] | None] = {}
        self._version: bytes | None = None

    def sibling(self, ending: str) -> Path:
        """A file beside the database; SQLite puts its log beside what a symbolic link points to."""
        return self.real_path.with_name(self.real_path.name + ending)

    def lock(self) -> bool:
        """Make the file that of this process and private; false while another process has it.

        Raises:
            MachineError: the file cannot be locked or made private, or is not at its path any more.
        """
        try:
            if hasattr(fcntl, "F_OFD_SETLK"):
                fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _ONE_BYTE_LOCK)
            else:  # not Linux: a lock of the name, links to which are followed
                self._lock_file = self._lock_file or self.sibling(".lock").open("w")
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise MachineError(
                f"--database {self.path} cannot be locked: {error.strerror}; put it on a local disk"
            ) from None
        if _identity(self.path) != self._own_identity:
            # What the process before wrote is elsewhere now, and its last words say where.
            raise MachineError(
                f"--database {self.path} was deleted, moved or replaced while this process stood by; read "
                "the last line of the process that used it, and start again"
            )
        self._make_private()
        return True

    @property
    def num_names(self) -> int:
        """Hard links; SQLite's log belongs to one of them."""
        return os.fstat(self._descriptor).st_nlink

    @property
    def _own_identity(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_dev, found.st_ino

    def _make_private(self) -> None:
        """Let nobody else read users' texts, whatever the umask; SQLite's log gets the same mode."""
        found = os.fstat(self._descriptor)
        mode = stat.S_IMODE(found.st_mode)
        begin = os.pread(self._descriptor, len(_MAGIC), 0)
        if begin and begin != _MAGIC:
            raise MachineError(f"--database {self.path} is not a database; pass another file")
        try:
            if mode != 0o600:
                os.fchmod(self._descriptor, 0o600)
            for ending in ("-wal", "-shm", ".lock"):
                with contextlib.suppress(FileNotFoundError):
                    self.sibling(ending).chmod(0o600)
        except OSError:
            raise MachineError(
                f"--database {self.path} belongs to another user (its mode is {mode:04o}), so it cannot "
                f"be made private; as that user, type: chmod 600 {shlex.quote(str(self.path))}*"
            ) from None
        if mode & 0o077 and found.st_size:
            logger.warning(
                "--database %s could be read by other users (mode %04o); now only by its owner (0600)",
                *(self.path, mode),
            )
        if self.num_names > 1:
            logger.warning(
                "--database %s has %d names (hard links); always start the bot with this one, as "
                "SQLite's log belongs to one name",
                *(self.path, self.num_names),
            )

    def watch(self, version: int | None) -> None:
        """Remember what the file and its log are now; `version` is in the header, if known."""
        self._version = None if version is None else version.to_bytes(_VERSION_BYTES, "big")
        own, log = self._own_identity, self.sibling("-wal")
        self._identities = {self.path: own, self.real_path: own, log: _identity(log)}

    @property
    def loss(self) -> str | None:
        """What happened to what was committed; None if the next start finds it."""
        if self.is_overwritten:
            return "was overwritten"
        if not self.is_at_its_path:
            return "was replaced" if self.path.exists() else "was deleted or moved"
        return None if self.has_log else "has lost its log (-wal)"

    @property
    def has_log(self) -> bool:
        """Whether what is beside the path is still the log."""
        path = self.sibling("-wal")
        return _identity(path) == self._identities[path]

    @property
    def is_at_its_path(self) -> bool:
        """Whether the file is at its path, with or without its log."""
        return all(_identity(p) == self._identities[p] for p in (self.path, self.real_path))

    @property
    def is_overwritten(self) -> bool:
        """Whether somebody else has written into the file, such as by copying another one over it."""
        found = os.pread(self._descriptor, _VERSION_BYTES, _VERSION_OFFSET)
        return self._version not in (None, found)

    @contextlib.contextmanager
    def spared(self) -> Iterator[None]:
        """Inside, SQLite does not write its log into a file that somebody else has written."""
        if not (self.is_overwritten and self.is_at_its_path):
            yield
            return
        aside = self.sibling(f".{secrets.token_hex(4)}")
        self.real_path.rename(aside)  # SQLite leaves a file alone that is not at its path
        try:
            yield
        finally:
            aside.rename(self.real_path)
            for ending in ("-wal", "-shm"):
                self.sibling(ending).unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)
        if self._lock_file is not None:
            self._lock_file.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def moved_to_a_free_name(file: Path, path: Path) -> Path:
    """Move a file to a path, or beside it if the path is taken; where it is now."""
    number = 0
    while True:
        ending = ".rescued" + (f"-{number}" if number > 1 else "") if number else ""
        target = path.with_name(path.name + ending)
        try:
            os.link(file, target)  # unlike a renaming it never replaces a file
            file.unlink()
            return target
        except FileExistsError:
            number += 1
        except OSError:  # a file system without links
            if not target.exists():
                return file.rename(target)
            number += 1
