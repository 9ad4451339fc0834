"""Local copies of objects, bounded in bytes, which the processes of a machine share.

    CACHE/objects/KEY             a complete copy; KEY is the SHA-256 of the content, where it is known
    CACHE/objects/partial-KEY-…   being fetched; has its full size at once, so that it counts
    CACHE/locks/                  one fetch of an object at a time; one removal at a time

Who reads a copy holds a shared lock on it (flock), which ends with the process. The least recently used
copies are removed, never one with a lock. Knows nothing of what the objects hold.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from full_stack_transformer.errors import InputError, MachineError
from full_stack_transformer.object_storage import ObjectStore
from full_stack_transformer.storage import make_directories, why_not_written

logger = logging.getLogger(__name__)

_PARTIAL_PREFIX = "partial-"
# Fetches of different objects seldom wait for each other.
_NUM_LOCKS = 64


def default_directory() -> Path:
    """Where the copies are if nobody says."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "full_stack_transformer" / "objects"


class LocalCopy:
    """A complete copy that is not removed before `close`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """The copy may be removed; what was mapped stays readable."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class CacheFullError(MachineError):
    """The copies in use leave no room for another."""


class ObjectCache:
    """Copies of objects below a directory.

    Args:
        directory: of the cache; made when the first copy is fetched.
        max_bytes: of all copies together, also those of other processes.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes

    def fetch(
        self, store: ObjectStore, name: str, *, size: int, sha256: str | None = None
    ) -> LocalCopy:
        """The copy of an object, fetched if it is not there.

        Args:
            store: has the object.
            name: of it.
            size: its bytes.
            sha256: of its content; without it the copy is that of one version of the object.

        Raises:
            InputError: the object is missing or has other content.
            CacheFullError: copies in use leave no room.
            MachineError: the store does not answer, or the disk is full.
        """
        key = sha256 or _key_of_version(store, name)
        found = self._found(key)
        if found is not None:
            return found
        try:
            make_directories(self.directory / "objects")
            make_directories(self.directory / "locks")
            with self._lock(f"{int(key[:8], 16) % _NUM_LOCKS:02d}"):
                return self._found(key) or self._fetched(store, name, key, size, sha256)
        except OSError as error:
            raise MachineError(
                f"the cache {self.directory} cannot be written: {why_not_written(error)}; free disk space, "
                "or name another directory with --data_cache and its bytes with --data_cache_bytes"
            ) from error

    @contextlib.contextmanager
    def local_copy(self, store: ObjectStore, name: str) -> Iterator[Path]:
        """An object as a file, of the version that is there now; kept inside the `with`."""
        copy = self.fetch(store, name, size=store.size(name))
        try:
            yield copy.path
        finally:
            copy.close()

    @property
    def num_bytes(self) -> int:
        """Of all copies, those that are being fetched too."""
        return sum(size for _, _, size in self._entries())

    def _path(self, key: str) -> Path:
        return self.directory / "objects" / key

    def _found(self, key: str) -> LocalCopy | None:
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # a removal holds the other lock for an instant
        if not os.fstat(descriptor).st_nlink:
            os.close(descriptor)
            return None
        with contextlib.suppress(OSError):  # a cache that this user may only read
            os.utime(path)
        return LocalCopy(path, descriptor)

    def _fetched(
        self, store: ObjectStore, name: str, key: str, size: int, sha256: str | None
    ) -> LocalCopy:
        partial, descriptor = self._begun(key, size)
        try:
            try:
                store.download(name, partial, size, sha256)
            except InputError:  # once more: it may have changed on the way
                store.download(name, partial, size, sha256)
            os.fsync(descriptor)
            partial.rename(self._path(key))
        except BaseException:
            partial.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.fstat(descriptor).st_nlink:  # removed between the two locks
            os.close(descriptor)
            return self._fetched(store, name, key, size, sha256)
        return LocalCopy(self._path(key), descriptor)

    def _begun(self, key: str, size: int) -> tuple[Path, int]:
        """An empty file of the full size, with a lock, after making room for it."""
        with self._lock("room"):
            self._make_room(size)
            path = self._path(f"{_PARTIAL_PREFIX}{key}-{os.getpid()}-{os.urandom(4).hex()}")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.truncate(descriptor, size)
        return path, descriptor

    def _make_room(self, size: int) -> None:
        entries = sorted(self._entries())
        total = sum(bytes_of for _, _, bytes_of in entries)
        # What a killed process began is of no use.
        entries.sort(key=lambda entry: not entry[1].name.startswith(_PARTIAL_PREFIX))
        for _, path, bytes_of in entries:
            if total + size <= self.max_bytes:
                return
            if _removed(path):
                total -= bytes_of
        if total + size > self.max_bytes:
            raise CacheFullError(
                f"the cache {self.directory} has {total:,} bytes in use and no room for {size:,} more within "
                f"--data_cache_bytes {self.max_bytes:,}; raise it"
            )

    def _entries(self) -> list[tuple[float, Path, int]]:
        """Time of the last use, path and bytes of each copy."""
        found = []
        with (
            contextlib.suppress(FileNotFoundError),
            os.scandir(self.directory / "objects") as entries,
        ):
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat()
                    found.append((facts.st_mtime, Path(entry.path), facts.st_size))
        return found

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        descriptor = os.open(self.directory / "locks" / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _removed(path: Path) -> bool:
    """Whether a copy was removed: nobody reads or writes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _key_of_version(store: ObjectStore, name: str) -> str:
    text = f"{store.where(name)} {store.version_of(name)}"
    return hashlib.sha256(text.encode()).hexdigest()
