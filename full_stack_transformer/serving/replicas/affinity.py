"""Which replica gets a request: the one that knows its beginning, unless its queue is too long.

    queues of the replicas ──┐
    beginnings they have had ┴─> one replica

As SGLang's router and Ray's PrefixCacheAffinityRouter do; but each front remembers hashes of blocks, not
texts, and fronts that know nothing choose alike (rendezvous hashing: Thaler and Ravishankar 1998).
Knows no Ray.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

# 65,536 blocks of 64 characters: 4 million characters, and about 10 MB.
_MAX_BLOCKS = 65_536


class Affinity:
    """What replicas have read.

    Args:
        margin: how many requests more than the shortest queue the queue of a replica may have that knows the
            beginning.
    """

    def __init__(self, margin: int) -> None:
        self._margin = margin
        self._readers: OrderedDict[bytes, set[str]] = OrderedDict()

    def choose(self, beginning: Sequence[bytes], queues: Mapping[str, int]) -> str:
        """The name of a replica.

        Args:
            beginning: hashes of the request's first blocks.
            queues: requests of each replica, at least one replica.
        """
        shortest = min(queues.values())
        for block in reversed(beginning):
            readers = [name for name in self._readers.get(block, ()) if name in queues]
            near = [name for name in readers if queues[name] <= shortest + self._margin]
            if near:
                return min(near, key=lambda name: (queues[name], name))
            if readers:  # it would wait there longer than it takes to read it again
                break
        free = [name for name, length in queues.items() if length == shortest]
        first = beginning[0] if beginning else b""
        return max(free, key=lambda name: hashlib.blake2b(first + name.encode()).digest())

    def note(self, beginning: Sequence[bytes], name: str) -> None:
        """Remember that a replica reads a text; what was asked for longest ago is forgotten."""
        for block in beginning:
            self._readers.setdefault(block, set()).add(name)
            self._readers.move_to_end(block)
        while len(self._readers) > _MAX_BLOCKS:
            self._readers.popitem(last=False)

    def keep(self, names: set[str]) -> None:
        """Forget replicas that are no more."""
        for readers in self._readers.values():
            readers &= names
