"""NAME/VERSION directories and files that are complete or absent, never half.

Everything durable goes through here: write beside the target, flush to the disk, rename.
Knows nothing of what the files mean.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from full_stack_transformer.errors import InputError, MachineError, UsageError

logger = logging.getLogger(__name__)

DESCRIPTION_FILE_NAME = "description.json"
_NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_PARTIAL_PREFIX = ".partial-"
_HASH_BLOCK_BYTES = 1 << 20


def check_name(name: str, flag: str) -> str:
    """Refuse a name that could leave its root directory; `flag` is named in the error."""
    if not _NAME_PATTERN.fullmatch(name):
        raise UsageError(
            f"{flag} must be letters, digits, '.', '_' and '-', 100 at most and not starting "
            f"with '.' or '-'; found {name!r}"
        )
    return name


def versions(root: Path, name: str) -> list[Path]:
    """Complete versions `root/name/0, 1, 2 …`, oldest first."""
    parent = root / name
    if not parent.is_dir():
        return []
    numbered = [path for path in parent.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(numbered, key=lambda path: int(path.name))


def _next_version(root: Path, name: str) -> Path:
    existing = versions(root, name)
    return root / name / (str(int(existing[-1].name) + 1) if existing else "0")


def claim_version(root: Path, name: str) -> Path:
    """Make and return the next version directory, empty; two callers never get the same one."""
    while True:
        directory = _next_version(root, name)
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        return directory


class NewVersion:
    """A version directory in the making; `directory` is temporary first, final after the `with`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory


@contextlib.contextmanager
def new_version(
    root: Path, name: str, *, adopt: Callable[[Path], bool] | None = None
) -> Iterator[NewVersion]:
    """A temporary directory that becomes the next version of `root/name` when the body succeeds.

    After the body the files are flushed to the disk, the directory is renamed and `.directory`
    of what was yielded names the final place. When the body raises, nothing stays. A kill or Ctrl-C
    leaves the temporary directory, which is never taken for a version.

    Args:
        root: directory of all names.
        name: directory of the versions.
        adopt: called with temporary directories whose writer is gone; the first for which it is true is
            gone on with. Those that nobody adopts are removed, aloud.

    Raises:
        MachineError: the disk is full, or the directory cannot be written.
    """
    parent = root / name
    try:
        make_directories(parent)
        directory, lock = _adopted(parent, adopt) or _fresh(parent)
    except OSError as error:
        raise _cannot_write(parent, error) from error
    version = NewVersion(directory)
    try:
        yield version
        sync_tree(version.directory)
        version.directory = _rename_to_next_version(version.directory, root, name)
    except OSError as error:
        shutil.rmtree(version.directory, ignore_errors=True)
        raise _cannot_write(parent, error) from error
    except Exception:
        shutil.rmtree(version.directory, ignore_errors=True)
        raise
    finally:
        with contextlib.suppress(OSError):  # nothing was written through it
            os.close(lock)


def _fresh(parent: Path) -> tuple[Path, int]:
    while True:
        directory = parent / f"{_PARTIAL_PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
        directory.mkdir()
        try:
            lock = _lock(directory)
        except OSError:
            directory.rmdir()
            raise
        if lock is not None:
            return directory, lock
        # Another writer took it for an abandoned one, in the instant before it was locked.


def _adopted(parent: Path, adopt: Callable[[Path], bool] | None) -> tuple[Path, int] | None:
    """The interrupted directory to go on with; the other ones are removed."""
    adopted: tuple[Path, int] | None = None
    for directory in sorted(parent.glob(f"{_PARTIAL_PREFIX}*")):
        lock = _lock(directory)
        if lock is None:  # its writer is alive
            continue
        if adopted is None and adopt is not None and adopt(directory):
            adopted = (directory, lock)
            continue
        logger.info("removing what an interrupted run left in %s", directory)
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
    return adopted


def _lock(directory: Path) -> int | None:
    """Lock a directory until the descriptor is closed or its process ends; none if it is locked."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:  # renamed or removed meanwhile
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    if not directory.exists():  # removed by its locker before us
        os.close(descriptor)
        return None
    return descriptor


def _cannot_write(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"writing {path} failed: {error.strerror or error}; nothing half-written was left there, "
        "free space or fix the rights and run the command again"
    )


def _rename_to_next_version(partial: Path, root: Path, name: str) -> Path:
    while True:
        target = _next_version(root, name)
        try:
            partial.rename(target)
        except OSError:
            if target.exists():  # another writer was faster: take the number after it
                continue
            raise
        sync_directory(target.parent)
        return target


def replace_directory(partial: Path, target: Path) -> None:
    """Put the complete directory `partial` in the place of `target`, atomically where the system can.

    Linux exchanges the two names in one call (renameat2(2), RENAME_EXCHANGE). Elsewhere there is an
    instant without `target`.
    """
    sync_tree(partial)
    if not target.exists():
        partial.rename(target)
    else:
        if not _exchange(partial, target):
            retired = partial.with_name(partial.name + ".retired")
            target.rename(retired)
            partial.rename(target)
            partial = retired
        shutil.rmtree(partial)
    sync_directory(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    at_current_directory, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(
        at_current_directory,
        os.fsencode(first),
        at_current_directory,
        os.fsencode(second),
        rename_exchange,
    )
    return bool(result == 0)


def make_directories(directory: Path) -> None:
    """Make a directory and those above it, each with a durable name."""
    if directory.is_dir():
        return
    make_directories(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make every file and name below `directory` durable."""
    for path in files_below(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for inside, _, _ in os.walk(directory, onerror=_raise):
        sync_directory(Path(inside))


def files_below(directory: Path) -> list[Path]:
    """All files of a directory and of those inside, in the order of their names.

    Path.rglob passes over a directory that it cannot read, without a word.
    """
    return sorted(
        Path(inside) / name
        for inside, _, names in os.walk(directory, onerror=_raise)
        for name in names
    )


def _raise(error: OSError) -> None:
    raise error


def write_text(path: Path, text: str) -> None:
    """Write a whole text file durably: the old content stays until the new one is on the disk."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error
    sync_directory(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON, durably."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} should hold a JSON object, but cannot be read: {error}"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} should hold a JSON object, found {type(content).__name__}")
    return content


def file_facts(path: Path) -> dict[str, str | int]:
    """Size and SHA-256 of a file, for a description."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return {"size_bytes": path.stat().st_size, "sha256": digest.hexdigest()}
