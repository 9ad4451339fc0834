"""NAME/VERSION directories and files that are either complete or absent.

Everything durable is written here: write next to the target, flush to the disk, rename. Knows nothing of the
content of the files.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from full_stack_transformer.errors import InputError, MachineError, UsageError

logger = logging.getLogger(__name__)

DESCRIPTION_FILE_NAME = "description.json"
_NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_PARTIAL_PREFIX = ".partial-"
_PARTIAL_FILE = re.compile(r"\..+\.partial-[0-9]+")
_HASH_BLOCK_BYTES = 1 << 20
_POINTER = b"version https://git-lfs.github.com/spec/"


def check_name(name: str, flag: str) -> str:
    """Raise UsageError for a name that could leave its root directory; `flag` is named in the error."""
    if not _NAME_PATTERN.fullmatch(name):
        raise UsageError(
            f"{flag} must be at most 100 letters, digits, '.', '_' and '-', not starting "
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
    """Create the next version directory, empty; two callers never get the same.

    Raises:
        UsageError: the root is not UTF-8, which the writers of weights and of TensorBoard's events need.
    """
    problem = not_utf_8(str(root))
    if problem is not None:
        raise UsageError(f"{root} is not UTF-8 ({problem}); name a directory that is")
    while True:
        directory = _next_version(root, name)
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        return directory


class NewVersion:
    """A new version directory; `directory` is temporary inside the `with` and final after it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory


@contextlib.contextmanager
def new_version(
    root: Path, name: str, *, adopt: Callable[[Path], bool] | None = None
) -> Iterator[NewVersion]:
    """A temporary directory that becomes the next version of `root/name` when the body succeeds.

    After the body the files are flushed to the disk, the directory is renamed, and `.directory` of the
    yielded object is the final path. If the body raises, the directory is removed. A kill or Ctrl-C leaves
    the temporary directory, which is never read as a version.

    Args:
        root: directory of all names.
        name: directory of the versions.
        adopt: called with temporary directories of interrupted writers; the first for which it returns True
            is continued, the others are removed, which is logged.

    Raises:
        MachineError: the disk is full, or the directory cannot be written.
    """
    with partial_directory(root / name, adopt=adopt) as directory:
        version = NewVersion(directory)
        yield version
        sync_tree(version.directory)
        version.directory = _rename_to_next_version(version.directory, root, name)


@contextlib.contextmanager
def partial_directory(
    parent: Path,
    *,
    adopt: Callable[[Path], bool] | None = None,
    keep: type[Exception] | tuple[()] = (),
) -> Iterator[Path]:
    """A locked temporary directory in `parent`, for `new_version`; removed after the body unless renamed.

    Args:
        parent: made if it does not exist.
        adopt: see `new_version`.
        keep: errors of the body after which the directory stays, as after a kill.

    Raises:
        MachineError: the disk is full, or the directory cannot be written.
    """
    try:
        make_directories(parent)
        directory, lock = _adopted(parent, adopt) or _fresh(parent)
    except OSError as error:
        raise _cannot_write(parent, error) from error
    try:
        yield directory
        shutil.rmtree(directory, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise _cannot_write(parent, error) from error
    except keep:
        raise
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)
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
        # Another writer removed it as abandoned before it was locked.


def _adopted(parent: Path, adopt: Callable[[Path], bool] | None) -> tuple[Path, int] | None:
    """The interrupted directory to continue; the others are removed."""
    adopted: tuple[Path, int] | None = None
    for directory in sorted(parent.glob(f"{_PARTIAL_PREFIX}*")):
        lock = _lock(directory)
        if lock is None:  # its writer still runs
            continue
        if adopted is None and adopt is not None and adopt(directory):
            _remove_partial_files(directory)
            adopted = (directory, lock)
            continue
        logger.info("removing %s, left by an interrupted run", directory)
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
    return adopted


def _remove_partial_files(directory: Path) -> None:
    """Remove what `write_text` of the process before, which was killed, had only begun."""
    for path in files_below(directory):
        if _PARTIAL_FILE.fullmatch(path.name):
            path.unlink()


def _lock(directory: Path) -> int | None:
    """Lock a directory until the descriptor is closed or the process ends; None if it is locked already."""
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
    if not directory.exists():  # removed before it was locked
        os.close(descriptor)
        return None
    return descriptor


def why_not_written(error: BaseException) -> str:
    """`the disk is full`, or what else the system or a library says; libraries hide the system's error."""
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause):
            return "the disk is full"
        cause = cause.__cause__ or cause.__context__
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _cannot_write(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"writing {path} failed: {why_not_written(error)}; no incomplete file was left, "
        "free disk space or fix the permissions and run the command again"
    )


def _rename_to_next_version(partial: Path, root: Path, name: str) -> Path:
    while True:
        target = _next_version(root, name)
        try:
            partial.rename(target)
        except OSError:
            if target.exists():  # another writer was faster: take the next version
                continue
            raise
        sync_directory(target.parent)
        return target


def replace_directory(partial: Path, target: Path) -> None:
    """Replace `target` by the complete directory `partial`, atomically on Linux.

    Its files can be read by whom the umask allows.
    """
    share(path for path in files_below(partial) if not path.is_symlink())
    sync_tree(partial)
    replace_path(partial, target)


def replace_path(partial: Path, target: Path) -> None:
    """Replace `target` by `partial`, whose content is durable already; each is a file or a directory.

    Linux exchanges the two names in one call (renameat2(2), RENAME_EXCHANGE). On other systems `target` is
    missing for an instant, if one of them is a directory.
    """
    if not target.exists():
        partial.rename(target)
    elif not partial.is_dir() and not target.is_dir():
        partial.replace(target)
        partial.unlink(missing_ok=True)  # two links to one file: rename(2) leaves both in place
    else:
        if not _exchange(partial, target):
            retired = partial.with_name(partial.name + ".retired")
            target.rename(retired)
            partial.rename(target)
            partial = retired
        remove_path(partial)
    sync_directory(target.parent)


def remove_path(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def share(paths: Iterable[Path]) -> None:
    """Give files the mode of new files; safetensors makes them readable for their owner alone."""
    umask = os.umask(0o077)  # the only way to read it; strict for files of other threads meanwhile
    os.umask(umask)
    for path in paths:
        path.chmod(0o666 & ~umask)


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
    """Create a directory and its parents, durably."""
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
    """All files below a directory, sorted by path.

    Raises OSError for a directory that cannot be read, which Path.rglob skips silently.
    """
    return sorted(
        Path(inside) / name
        for inside, _, names in os.walk(directory, onerror=_raise)
        for name in names
    )


def _raise(error: OSError) -> None:
    raise error


def readable(text: str) -> str:
    """A text with file names: bytes that are not UTF-8, which Python keeps as surrogates, become \\xe9."""
    if not_utf_8(text) is None:
        return text
    parts = [
        character.encode(
            "utf-8", "surrogateescape" if "\udc80" <= character <= "\udcff" else "replace"
        )
        for character in text
    ]
    return b"".join(parts).decode("utf-8", "backslashreplace")


def not_utf_8(text: str) -> str | None:
    """The first byte of a text or path that is not UTF-8, and where; None if all are."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = len(text[: error.start].encode())
        return f"byte {ord(text[error.start]) & 0xFF:#04x} at offset {before}"
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file durably: the old content stays until the new one is on the disk."""
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
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    # Paths may not be UTF-8. The escape of a surrogate is JSON, and gives the same path when it is read.
    write_text(path, text.encode("utf-8", "backslashreplace").decode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} should be a JSON object, but cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} should be a JSON object, found {type(content).__name__}")
    return content


def check_pointer(path: Path, error: type[InputError]) -> None:
    """Refuse what Git LFS leaves in place of a file that was not fetched.

    Raises:
        InputError: it is one, as the given class.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
    if start == _POINTER:
        raise error(
            f"{path} is a pointer of Git LFS ({path.stat().st_size} bytes) in place of the file; fetch it: "
            f"git -C {path.parent} lfs pull"
        )


def file_facts(path: Path) -> dict[str, str | int]:
    """Size and SHA-256 of a file, for a description."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return {"size_bytes": path.stat().st_size, "sha256": digest.hexdigest()}
