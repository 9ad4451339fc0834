"""A draft model guesses the next tokens of requests: Leviathan et al. 2023, Chen et al. 2023.

    text of a request ─> read by the draft, into blocks of its own ─> a token drawn ─> read ─> a token drawn …

The draft draws with the parameters of the request and the random numbers that will decide the model's tokens,
so where both predict alike they draw the same token. Unlike in the papers no guess is accepted by its
probability: the engine draws from the model's scores, whatever was guessed.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from full_stack_transformer.generation.blocks import BlockPool, KeyValueMemory
from full_stack_transformer.generation.choosing import choose
from full_stack_transformer.generation.runners.torch import Runner, SequenceWork
from full_stack_transformer.generation.token_requests import Running

logger = logging.getLogger(__name__)

# Tokens of texts that are read before a step, at most: the requests under way wait for that.
_MAX_READ_TOKENS = 256
# Texts with more unread tokens, which is more than guesses leave behind, are read in such chunks.
_MAX_UNREAD_TOKENS = 32
# After a drawn token that the draft itself found less probable, more guesses are hardly right: 1.23 times the
# tokens a second at temperature 0.8, without this bound 1.08. The most likely token is right more often: 1.81
# times at temperature 0, with the bound 1.70.
_LEAST_PROBABILITY = 0.3


class Draft:
    """Guesses with a model that is smaller than the one that checks, or has smaller weights.

    Args:
        runner: computes the draft; its blocks belong to it alone.
        name: of the draft model, for people.
        vocab_size: of the model that checks.
        memory: what the runner's blocks take.
        clock: seconds.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        name: str,
        vocab_size: int,
        memory: KeyValueMemory,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name = name
        self.memory = memory
        self.computed_by = runner.name
        self.is_broken = False
        """It failed, and is not asked any more."""
        self.seconds_reading = 0.0
        """Spent on texts so far, apart from guesses."""
        self._runner = runner
        self._vocab_size = vocab_size
        self._clock = clock
        self._pool = BlockPool(runner.num_blocks, runner.block_size)
        self._followed: dict[int, Running] = {}
        """What requests are for the draft: their texts and its guesses, in its own blocks."""
        self._hopeless: set[int] = set()
        """Requests that the draft cannot guess for."""

    def propose(self, requests: Sequence[Running], nums: Sequence[int]) -> list[list[int]]:
        """Guesses for each request, at most so many; none as long as there is text to read."""
        try:
            return self._propose(requests, nums)
        except Exception as error:  # a library's, a device's
            logger.error("the draft model failed; texts go on without it", exc_info=error)
            self.is_broken = True
            return [[] for _ in requests]

    def forget(self, request_id: int) -> None:
        """Give back what a request has; an unknown one has nothing."""
        self._hopeless.discard(request_id)
        followed = self._followed.pop(request_id, None)
        if followed is not None:
            self._pool.give_back(followed.block_ids)

    def _propose(self, requests: Sequence[Running], nums: Sequence[int]) -> list[list[int]]:
        ends = [one.num_tokens + num for one, num in zip(requests, nums, strict=True)]
        followed = [
            self._follow(one, end) if end > one.num_tokens else None
            for one, end in zip(requests, ends, strict=True)
        ]
        limits = {one: end for one, end in zip(followed, ends, strict=True) if one is not None}
        self._read_late(list(limits))
        active = [one for one in limits if one.num_unread <= _MAX_UNREAD_TOKENS]
        while active:
            active = [one for one in self._guess(active) if one.num_tokens < limits[one]]
        return [
            [] if one is None else one.token_ids[request.num_tokens : one.num_tokens].tolist()
            for one, request in zip(followed, requests, strict=True)
        ]

    def _follow(self, request: Running, end: int) -> Running | None:
        """A request as it is now, with blocks up to a position; none if the draft cannot have it."""
        request_id = request.request_id
        if request_id in self._hopeless:
            return None
        followed = self._followed.get(request_id) or _follower(request)
        missing = self._pool.num_for(end) - len(followed.block_ids)
        if missing > self._pool.num_unused:
            return None
        _catch_up(followed, request)
        unread = followed.token_ids[followed.num_read : followed.num_tokens]
        if end > self._runner.max_length or int(unread.max()) >= self._runner.vocab_size:
            self._hopeless.add(request_id)
            return None
        followed.block_ids += self._pool.take(max(0, missing))
        self._followed[request_id] = followed
        return followed

    def _read_late(self, followed: Sequence[Running]) -> None:
        """Read a chunk of the texts of which more than the newest tokens is unread."""
        work, room = [], _MAX_READ_TOKENS
        for one in followed:
            if room and one.num_unread > _MAX_UNREAD_TOKENS:
                end = min(one.num_read + room, one.num_tokens - 1)
                work.append(_work(one, end, num_logits=0))
                room -= end - one.num_read
                one.num_read = end
        if work:
            started = self._clock()
            self._runner.run(work)
            self.seconds_reading += self._clock() - started

    def _guess(self, followed: Sequence[Running]) -> list[Running]:
        """One more guess for each; returns those that can go on."""
        logits = self._runner.run([_work(one, one.num_tokens) for one in followed])
        # An id that only one of the two models has is never guessed.
        logits = pad(logits, (0, self._vocab_size - logits.shape[1]), value=-torch.inf)
        going_on = []
        for one, choice, row in zip(followed, choose(followed, logits), logits, strict=True):
            one.num_read = one.num_tokens
            if choice.problem is not None:
                self._hopeless.add(one.request_id)
            elif choice.token_id is not None:
                one.token_ids[one.num_tokens] = choice.token_id
                one.num_tokens += 1
                if one.request.sampling.temperature == 0 or _is_likely(row, choice.token_id):
                    going_on.append(one)
        return going_on


def _is_likely(logits: Tensor, token_id: int) -> bool:
    """Whether a token is, by logits (vocabulary,), so probable that those after it are worth guessing."""
    return float(logits[token_id] - logits.logsumexp(dim=-1)) >= math.log(_LEAST_PROBABILITY)


def _follower(request: Running) -> Running:
    """A request on the draft's side, of which nothing has been read."""
    return replace(
        request,
        # What is forbidden is for the engine alone to ask: grammars follow the text.
        request=replace(request.request, forbids=None),
        generator=torch.Generator(),
        token_ids=request.token_ids.clone(),
        num_read=0,
        block_ids=[],
    )


def _catch_up(followed: Running, request: Running) -> None:
    """Take over tokens and random numbers of a request; what was read stays as far as guesses were right."""
    num_read, num_tokens = followed.num_read, request.num_tokens
    differing = (followed.token_ids[:num_read] != request.token_ids[:num_read]).nonzero()
    num_right = int(differing[0]) if len(differing) else num_read
    # The newest token is read in any case: its logits are wanted.
    followed.num_read = min(num_right, num_tokens - 1)
    followed.token_ids[:num_tokens] = request.token_ids[:num_tokens]
    followed.num_tokens = num_tokens
    followed.generator.set_state(request.generator.get_state())


def _work(followed: Running, end: int, num_logits: int = 1) -> SequenceWork:
    unread = followed.token_ids[followed.num_read : end].tolist()
    return SequenceWork(followed.block_ids, followed.num_read, unread, num_logits=num_logits)
