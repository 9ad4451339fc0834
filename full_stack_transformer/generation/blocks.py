"""The pool of blocks that keep keys and values: who uses which, and which hold a beginning that comes again.

    take ──> used by one sequence ──keep──> findable by its key ──find──> shared by several
                    │                            │
                    └────────give_back───────────┴──> unused; findable until somebody needs the block

A block has room for `block_size` tokens. A full one can be kept under a key that follows from its tokens and
from all before them, so sequences that begin alike share their full blocks. Knows tokens and numbers of
blocks, not what is in them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Bytes at the beginning of a key that say of which adapter it is.
_ADAPTER_BYTES = 8


def first_key(salt: str, adapter: int = 0) -> bytes:
    """What the key of a sequence's first block follows from: other salts and adapters share nothing."""
    digest = hashlib.sha256(salt.encode("utf-8", errors="surrogatepass")).digest()
    return _of_adapter(adapter) + digest


def next_key(key: bytes, token_ids: npt.NDArray[np.int64]) -> bytes:
    """The key of a block with these tokens, which comes after the block with this key."""
    return key[:_ADAPTER_BYTES] + hashlib.sha256(key + token_ids.tobytes()).digest()


def _of_adapter(adapter: int) -> bytes:
    return adapter.to_bytes(_ADAPTER_BYTES, "big")


@dataclass(frozen=True)
class KeyValueMemory:
    """What the keys and values in the blocks take."""

    dtype: str
    token_bytes: int
    block_size: int
    """Tokens of a block."""
    num_blocks: int = 0

    @property
    def block_bytes(self) -> int:
        """Of one block."""
        return self.token_bytes * self.block_size

    @property
    def num_bytes(self) -> int:
        """Of all blocks, once all have been written."""
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """That all blocks hold."""
        return self.num_blocks * self.block_size


class BlockPool:
    """Numbers of blocks from 0, given out lowest first, so that memory is written when it is needed.

    Blocks that hold nothing of use are given out first, then those that were never used, then findable ones,
    the least recently used first.

    Args:
        num_blocks: of all.
        block_size: tokens of a block.
        find_room: number of blocks that memory has room for now, of those that were never written; without
            it all of them.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, find_room: Callable[[], int] | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._find_room = find_room
        self._users = [0] * num_blocks
        self._num_touched = 0
        """Blocks that somebody has used; the others have never been written."""
        self._num_allowed = 0 if find_room else num_blocks
        """Blocks that may be used before somebody looks at the memory again."""
        self._blank: list[int] = []
        self._findable: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._kept: dict[int, None] = {}
        """Findable blocks without a user, the least recently used first."""

    @property
    def num_unused(self) -> int:
        """Blocks that can be taken."""
        return len(self._blank) + self._num_allowed - self._num_touched + len(self._kept)

    @property
    def num_used(self) -> int:
        """Blocks that have a user."""
        return self._num_touched - len(self._blank) - len(self._kept)

    @property
    def num_kept(self) -> int:
        """Blocks without a user that can be found."""
        return len(self._kept)

    def look_at_memory(self, num_blocks: int) -> None:
        """Let so many more blocks be used that were never used before, if memory has room for them."""
        num_left = self._num_allowed - self._num_touched
        if self._find_room is not None and num_left < min(
            num_blocks, self.num_blocks - self._num_touched
        ):
            # Twice as many, so that it is looked at less often.
            num_more = max(0, min(2 * num_blocks, self._find_room()))
            self._num_allowed = min(self.num_blocks, self._num_touched + num_more)

    def num_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks with the first of these keys, as many as there are without a gap; nobody's yet."""
        found: list[int] = []
        for key in keys:
            block = self._findable.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_unused_among(self, block_ids: Sequence[int]) -> int:
        """How many of these blocks count as unused now."""
        return sum(1 for block in block_ids if not self._users[block])

    def share(self, block_ids: Sequence[int]) -> None:
        """One more user of blocks that were found."""
        for block in block_ids:
            self._kept.pop(block, None)
            self._users[block] += 1

    def take(self, num_blocks: int) -> list[int]:
        """Blocks for one user, of whose tokens none are held; the caller has looked at `num_unused`."""
        return [self._take_one() for _ in range(num_blocks)]

    def _take_one(self) -> int:
        if self._blank:
            block = self._blank.pop()
        elif self._num_touched < self._num_allowed:
            block = self._num_touched
            self._num_touched += 1
        else:
            block = next(iter(self._kept))
            del self._kept[block]
            del self._findable[self._keys.pop(block)]
        self._users[block] = 1
        return block

    def keep(self, block: int, key: bytes) -> None:
        """Let a full block be found; where another one holds the same already, that one is."""
        if key not in self._findable:
            self._findable[key] = block
            self._keys[block] = key

    def forget(self, block_ids: Sequence[int]) -> None:
        """Let nobody find these blocks any more."""
        for block in block_ids:
            key = self._keys.pop(block, None)
            if key is not None:
                del self._findable[key]
                if block in self._kept:
                    del self._kept[block]
                    self._blank.append(block)

    def forget_adapter(self, adapter: int) -> None:
        """Let nobody find what was read with an adapter."""
        beginning = _of_adapter(adapter)
        self.forget([block for block, key in self._keys.items() if key.startswith(beginning)])

    def give_back(self, block_ids: Sequence[int]) -> None:
        """One user less of the blocks of a sequence; its last ones are needed again first."""
        for block in reversed(block_ids):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._keys:
                self._kept[block] = None
            else:
                self._blank.append(block)
