"""What a power cut could take: names and contents that were not flushed when they had to be.

A kill leaves what the kernel holds, so kills cannot show this; the order of the calls can.
"""

from collections.abc import Sequence
from pathlib import Path

from tests.faults.gate import Call

_CONTENT = frozenset(
    ("write", "pwrite64", "writev", "pwritev", "ftruncate", "fallocate", "copy_file_range")
)
_NAMES = frozenset(("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "creat"))


def unflushed(
    calls: Sequence[Call], versions_of: Path, journal_name: str = "journal.jsonl"
) -> list[str]:
    """What is wrong in the calls of a preparation whose versions lie in the directory `versions_of`.

    When a line of the journal is flushed, the contents it tells of must be on the disk. When a version
    gets its number, all in it must be; at the end its name must be, too.
    """
    contents: set[str] = set()  # files and directories that are newer in memory than on the disk
    names: set[str] = set()
    wrong: dict[str, None] = {}
    for call in calls:
        path = call.paths[0]
        if call.name.startswith("rename"):
            target = call.paths[1]
            contents = {_moved(one, path, target) for one in contents}
            names = {_moved(one, path, target) for one in names}
            if Path(target).parent == versions_of and Path(target).name.isdecimal():
                late = sorted(one for one in contents | names if Path(one).is_relative_to(target))
                wrong |= dict.fromkeys(
                    f"{one} came into sight before it was flushed" for one in late
                )
            names |= {_parent(path), _parent(target)}
        elif call.name in ("fsync", "fdatasync"):
            contents.discard(path)
            names.discard(path)
            if Path(path).name == journal_name:
                wrong |= dict.fromkeys(f"the journal was flushed before {one}" for one in contents)
        elif call.name in _CONTENT:
            contents.add(path)
        elif call.name in _NAMES or call.creates:
            names.add(_parent(path))
            if call.name.startswith(("unlink", "rmdir")):
                contents.discard(path)
                names.discard(path)
    needed = (versions_of, versions_of.parent, versions_of.parent.parent)
    unnamed = [
        f"{one} got a new name that was never flushed" for one in map(str, needed) if one in names
    ]
    return [*wrong, *unnamed]


def _moved(path: str, source: str, target: str) -> str:
    if Path(path).is_relative_to(source):
        return str(target / Path(path).relative_to(source))
    return path


def _parent(path: str) -> str:
    return str(Path(path).parent)
