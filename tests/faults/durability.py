"""What a power cut could take: names and contents that were not flushed when they had to be.

A kill leaves what the kernel holds, so kills cannot show this; the order of the calls can.
"""

from collections.abc import Sequence
from pathlib import Path

from tests.faults.gate import Call

_CONTENT = frozenset(
    ("write", "pwrite64", "writev", "pwritev", "ftruncate", "fallocate", "copy_file_range")
)
_FLUSHES = frozenset(("fsync", "fdatasync"))
_NAMES = frozenset(("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "creat"))


def unflushed(
    calls: Sequence[Call], versions_of: Path, journal_name: str = "journal.jsonl"
) -> list[str]:
    """What is wrong in the calls of a preparation whose versions lie in the directory `versions_of`.

    When a line of the journal is flushed, the contents it tells of must be on the disk. When a version
    gets its number, all in it must be; at the end its name must be, too.
    """
    disk = _Disk()
    wrong: dict[str, None] = {}  # a set that keeps its order
    for call in calls:
        disk.take(call)
        target = Path(call.paths[-1])
        if call.name.startswith("rename") and target.parent == versions_of:
            late = [one for one in disk.late() if Path(one).is_relative_to(target)]
            wrong |= dict.fromkeys(f"{one} came into sight before it was flushed" for one in late)
        if call.name in _FLUSHES and target.name == journal_name:
            late = sorted(disk.late_contents)
            wrong |= dict.fromkeys(f"the journal was flushed before {one}" for one in late)
    for one in (versions_of, versions_of.parent, versions_of.parent.parent):
        if str(one) in disk.late_names:
            wrong[f"{one} got a new name that was never flushed"] = None
    return [*wrong]


class _Disk:
    """Files and directories that are newer in memory than on the disk."""

    def __init__(self) -> None:
        self.late_contents: set[str] = set()
        self.late_names: set[str] = set()
        """Directories that got, or lost, a name."""

    def late(self) -> list[str]:
        """All of them."""
        return sorted(self.late_contents | self.late_names)

    def take(self, call: Call) -> None:
        """Do what the call does."""
        path, parent = call.paths[0], str(Path(call.paths[0]).parent)
        if call.name.startswith("rename"):
            target = call.paths[1]
            self.late_contents = {_moved(one, path, target) for one in self.late_contents}
            self.late_names = {_moved(one, path, target) for one in self.late_names}
            self.late_names |= {parent, str(Path(target).parent)}
        elif call.name in _FLUSHES or call.name.startswith(("unlink", "rmdir")):
            self.late_contents.discard(path)
            self.late_names.discard(path)
        elif call.name in _CONTENT:
            self.late_contents.add(path)
        if call.name in _NAMES or call.creates:
            self.late_names.add(parent)


def _moved(path: str, source: str, target: str) -> str:
    if Path(path).is_relative_to(source):
        return str(target / Path(path).relative_to(source))
    return path
