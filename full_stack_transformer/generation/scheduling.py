"""Which requests compute in a step, on which blocks: first come, first served.

    add ─> waits ─> gets blocks for its tokens ─> is read in chunks ─> grows, token by token ─> ends
             ^                                                                │
             └────────── put back: no block is left for an older one ─────────┘

The requests with blocks are always the oldest ones. One that needs another block and finds none takes those
of the youngest, which waits again and is read again later. So the oldest request always goes on, and each
request is the oldest one day. The pool must have room for the longest one alone; where the machine's memory
has not, the oldest request starves.
"""

from collections.abc import Callable, Iterator, Sequence

from full_stack_transformer.generation.blocks import BlockPool, first_key, next_key
from full_stack_transformer.generation.runners.torch import SequenceWork
from full_stack_transformer.generation.token_requests import Running

Planned = tuple[Running, SequenceWork]
Guess = Callable[[Sequence[Running]], Sequence[list[int]]]


class Schedule:
    """The requests under way, by age.

    Args:
        pool: the blocks.
        max_chunk_tokens: tokens of prompts that are read in a step.
    """

    def __init__(self, pool: BlockPool, *, max_chunk_tokens: int) -> None:
        self.num_put_back = 0
        """Times that a request had to give its blocks to an older one."""
        self.num_reused_tokens = 0
        """Prompt tokens that did not have to be read."""
        self.num_prompt_tokens = 0
        """Prompt tokens of the requests that have had blocks."""
        self._pool = pool
        self._max_chunk_tokens = max_chunk_tokens
        self._requests: dict[int, Running] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def num_of_adapter(self, adapter: int) -> int:
        """Requests under way with this adapter."""
        return sum(1 for one in self._requests.values() if one.request.adapter == adapter)

    @property
    def num_waiting(self) -> int:
        """Requests that have no blocks."""
        return sum(1 for one in tuple(self._requests.values()) if not one.block_ids)

    def add(self, running: Running) -> None:
        """Let a request wait for blocks, as the youngest."""
        self._requests[running.request_id] = running

    def remove(self, request_id: int) -> Running | None:
        """Let go of a request and its blocks; none if the id is unknown."""
        running = self._requests.pop(request_id, None)
        if running is not None:
            self._pool.give_back(running.block_ids)
            running.block_ids = []
        return running

    def forget(self, running: Running) -> None:
        """Let nobody go on from what the blocks of a request hold."""
        self._pool.forget(running.block_ids)

    @property
    def starved(self) -> Running | None:
        """The oldest request, if `plan` had no memory for it though nobody else has blocks."""
        oldest = next(iter(self._requests.values()), None)
        return None if oldest is None or oldest.block_ids else oldest

    def plan(self, guess: Guess) -> list[Planned]:
        """What to compute in this step: the newest token of each request, and a chunk of new prompts.

        Args:
            guess: what may follow the newest tokens of requests.
        """
        self._pool.look_at_memory(self._num_wanted())
        for running in self._with_blocks():
            self._grow(running)
        self._admit()
        decoding = [one for one in self._with_blocks() if _is_decoding(one)]
        plan = [
            (one, self._with_guesses(one, guesses))
            for one, guesses in zip(decoding, guess(decoding), strict=True)
        ]
        return plan + list(self._chunks())

    def note_read(self, running: Running, work: SequenceWork) -> None:
        """Remember that work has been computed; full blocks can be found from now on."""
        running.num_read = work.start + len(work.token_ids)
        self._extend_keys(running)
        num_full = min(running.num_read, running.num_tokens) // self._pool.block_size
        for number in range(running.num_findable, min(num_full, len(running.keys))):
            self._pool.keep(running.block_ids[number], running.keys[number])
        running.num_findable = max(running.num_findable, num_full)

    def _with_blocks(self) -> list[Running]:
        return [one for one in self._requests.values() if one.block_ids]

    # ------------------------------------------------------------------ blocks

    def _num_wanted(self) -> int:
        """Blocks that all requests may want in a step."""
        size, requests = self._pool.block_size, self._requests.values()
        num_more = sum(one.num_tokens // size + 1 - len(one.block_ids) for one in requests)
        return num_more + len(self._requests)

    def _grow(self, running: Running) -> None:
        """A block for the newest token, if need be from the youngest request, which may be this one."""
        while running.block_ids:
            missing = self._pool.num_for(running.num_tokens) - len(running.block_ids)
            if missing <= self._pool.num_unused:
                running.block_ids += self._pool.take(missing)
                return
            self._put_back(self._with_blocks()[-1])

    def _put_back(self, running: Running) -> None:
        self._pool.give_back(running.block_ids)
        running.start_over()
        self.num_put_back += 1

    def _admit(self) -> None:
        """Blocks for the oldest of those that wait, as long as there are enough."""
        num_admitted = len(self._with_blocks())
        for running in self._requests.values():
            if not running.block_ids:
                if not self._try_to_admit(running, num_admitted):
                    return
                num_admitted += 1

    def _try_to_admit(self, running: Running, num_admitted: int) -> bool:
        self._extend_keys(running)
        found = [] if running.needs_every_token else self._pool.find(self._usable_keys(running))
        if not running.needs_every_token and self._is_read_now(running, len(found)):
            return False
        needed = self._pool.num_for(running.num_tokens) - len(found)
        # What is found and unused is used then. One block is left for each request to grow: otherwise it
        # would soon be put back.
        taken = needed + self._pool.num_unused_among(found)
        if taken + num_admitted > self._pool.num_unused:
            return False
        self._pool.share(found)
        running.block_ids = [*found, *self._pool.take(needed)]
        running.num_findable = len(found)
        running.num_read = len(found) * self._pool.block_size
        if running.num_new == 0:
            self.num_prompt_tokens += running.num_prompt
            self.num_reused_tokens += running.num_read
        return True

    def _usable_keys(self, running: Running) -> list[bytes]:
        """Keys of blocks that another request may have read: the last token is always read."""
        return running.keys[: (running.num_tokens - 1) // self._pool.block_size]

    def _is_read_now(self, running: Running, number: int) -> bool:
        """Whether another request is about to read the block with this number: then it is shared soon."""
        wanted = self._usable_keys(running)[number : number + 1]
        return bool(wanted) and any(
            other.keys[number : number + 1] == wanted
            for other in self._with_blocks()
            if other.num_read < (number + 1) * self._pool.block_size
        )

    def _extend_keys(self, running: Running) -> None:
        """Compute the keys of the blocks that the tokens so far fill."""
        request = running.request
        if request.shares_with is None:
            return
        size = self._pool.block_size
        for number in range(len(running.keys), running.num_tokens // size):
            first = first_key(request.shares_with, request.adapter)
            before = running.keys[-1] if running.keys else first
            tokens = running.token_ids[number * size : (number + 1) * size].numpy()
            running.keys.append(next_key(before, tokens))

    # ------------------------------------------------------------------ work

    def _with_guesses(self, running: Running, guesses: list[int]) -> SequenceWork:
        """The newest token, and as many guesses as there are blocks for."""
        missing = self._pool.num_for(running.num_tokens + len(guesses)) - len(running.block_ids)
        running.block_ids += self._pool.take(max(0, min(missing, self._pool.num_unused)))
        room = len(running.block_ids) * self._pool.block_size - running.num_tokens
        guesses = guesses[:room]
        newest = running.token_ids[running.num_read : running.num_tokens].tolist()
        return _work(running, [*newest, *guesses], num_logits=1 + len(guesses))

    def _chunks(self) -> Iterator[Planned]:
        """Chunks of what is to be read, of the oldest requests, as much as a step has room for."""
        room = self._max_chunk_tokens
        for running in self._with_blocks():
            if room and not _is_decoding(running):
                work = _next_chunk(running, room)
                room -= len(work.token_ids)
                yield running, work


def _is_decoding(running: Running) -> bool:
    return running.num_unread == 1 and not running.needs_every_token


def _next_chunk(running: Running, room: int) -> SequenceWork:
    """The tokens that come next; none of their logits matter before the last one."""
    start = running.num_read
    end = min(start + room, running.num_tokens)
    chunk = running.token_ids[start:end].tolist()
    is_last = end == running.num_tokens
    num_logits = len(chunk) if running.is_scoring else int(is_last)
    return _work(running, chunk, num_logits=num_logits)


def _work(running: Running, token_ids: list[int], *, num_logits: int) -> SequenceWork:
    return SequenceWork(
        running.block_ids,
        running.num_read,
        token_ids,
        num_logits=num_logits,
        adapter=running.request.adapter,
    )
