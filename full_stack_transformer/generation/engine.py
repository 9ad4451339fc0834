"""Continuous batching on token ids: add a request, step, cancel.

    add ─> Schedule: who computes, on which blocks ─> Runner: logits ─> choose: tokens ─> TokenEvent
                          ^                                                  │
                          └──────────────── until the request ends ──────────┘

Requests join and leave between steps. A step reads one bounded chunk of new prompts and makes a token for
every request whose prompt has been read, so that a long prompt never stalls the others for long. Keys and
values lie in blocks of a pool: a request takes them as it grows and gives them back when it ends; what they
hold can be found until somebody needs them, so a request that begins with the same tokens goes on from there.
Knows nothing of text, of HTTP and of threads: one thread owns it.

The same request with the same seed gives the same tokens, alone or among others, in any blocks of any size,
whatever was cancelled, put back, read before or guessed. Exactly so, bit for bit, on the C++ decoder (see
native/decoder.py), for each type of its weights, any number of threads and any cut of the prompt, on one kind
of processor and one version of PyTorch. Through PyTorch the logits' last bits depend on what is computed
together; see `TorchRunner` for what that means.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from full_stack_transformer.errors import (
    ContextLengthError,
    FullStackTransformerError,
    ModelError,
    RequestError,
)
from full_stack_transformer.generation.blocks import BlockPool, KeyValueMemory
from full_stack_transformer.generation.choosing import Choice, choose, problem_of, score_prompt
from full_stack_transformer.generation.draft import Draft
from full_stack_transformer.generation.guesses import Guesses
from full_stack_transformer.generation.runners.torch import Runner, SequenceWork
from full_stack_transformer.generation.sampling import score_tokens
from full_stack_transformer.generation.scheduling import Planned, Schedule
from full_stack_transformer.generation.token_requests import (
    FinishReason,
    Running,
    TokenEvent,
    TokenRequest,
)
from full_stack_transformer.modelling.adapter_weights import AdapterWeights

# Tokens of prompts that are read between two decoding steps.
_MAX_CHUNK_TOKENS = 256
MAX_ADAPTERS = 256


@dataclass(frozen=True)
class BlockUse:
    """How the blocks of keys and values are used, and how often that mattered so far."""

    num_blocks: int
    block_size: int
    """Tokens of a block."""
    num_used: int
    """Blocks of requests under way."""
    num_kept: int
    """Blocks of requests that have ended, whose tokens need not be read again."""
    num_waiting: int
    """Requests under way that wait for blocks."""
    num_put_back: int
    """Times that a request gave its blocks to an older one, and was read again later."""
    num_prompt_tokens: int
    num_reused_tokens: int
    """Of them those that did not have to be read."""


class Engine:
    """Generates for up to `num_slots` requests at once.

    Args:
        runner: what computes; its blocks must have room for one text of its context, or texts are shorter.
        num_slots: requests under way at once.
        guesses: check guesses of the next tokens in one step where that saves time; the tokens that come out
            are the same.
        draft: guesses beside what is looked up in the text.
        max_chunk_tokens: of prompts that are read in a step.
        memory: what the runner's blocks take, for people.
        find_room: as for `BlockPool`.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        num_slots: int,
        guesses: bool = True,
        draft: Draft | None = None,
        max_chunk_tokens: int = _MAX_CHUNK_TOKENS,
        memory: KeyValueMemory | None = None,
        find_room: Callable[[], int] | None = None,
    ) -> None:
        self.max_length = min(runner.max_length, runner.num_blocks * runner.block_size)
        self.num_slots = num_slots
        self.computed_by = runner.name
        """What computes, for people."""
        self.memory = memory
        self.guesses = Guesses(draft) if guesses else None
        self._runner = runner
        self._pool = BlockPool(runner.num_blocks, runner.block_size, find_room=find_room)
        self._schedule = Schedule(self._pool, max_chunk_tokens=max_chunk_tokens)
        self._next_id = 0
        self._next_adapter = 1
        self._adapters: set[int] = set()
        self._leaving: set[int] = set()
        """Adapters that requests under way still need, and no new one gets."""

    @property
    def num_free_slots(self) -> int:
        """Requests that can be added now."""
        return self.num_slots - len(self._schedule)

    @property
    def num_running(self) -> int:
        """Requests under way, with blocks or waiting for them."""
        return len(self._schedule)

    @property
    def block_use(self) -> BlockUse:
        """How the blocks are used now; may be asked for in any thread."""
        pool, schedule = self._pool, self._schedule
        return BlockUse(
            num_blocks=pool.num_blocks,
            block_size=pool.block_size,
            num_used=pool.num_used,
            num_kept=pool.num_kept,
            num_waiting=schedule.num_waiting,
            num_put_back=schedule.num_put_back,
            num_prompt_tokens=schedule.num_prompt_tokens,
            num_reused_tokens=schedule.num_reused_tokens,
        )

    def add_adapter(self, adapter: AdapterWeights) -> int:
        """Load an adapter beside the base; requests of all adapters compute together.

        Returns:
            What requests name it by, from 1 on; no number comes twice.

        Raises:
            ModelError: it does not fit what computes, or there are as many as there may be.
            MachineError: memory is short.
        """
        if len(self._adapters) + len(self._leaving) >= MAX_ADAPTERS:
            raise ModelError(
                f"{MAX_ADAPTERS} adapters are loaded, and there may be no more; remove one first"
            )
        number = self._next_adapter
        self._runner.add_adapter(number, adapter)
        self._next_adapter += 1
        self._adapters.add(number)
        return number

    def remove_adapter(self, number: int) -> None:
        """Give no new request this adapter; once those under way have ended, its memory is free.

        Raises:
            RequestError: there is no such adapter.
        """
        self._check_adapter(number)
        self._adapters.remove(number)
        self._leaving.add(number)
        self._let_go()

    def _let_go(self) -> None:
        """Free what belongs to adapters that no request needs any more."""
        for number in [one for one in self._leaving if not self._schedule.num_of_adapter(one)]:
            self._leaving.remove(number)
            self._pool.forget_adapter(number)
            self._runner.remove_adapter(number)

    def _check_adapter(self, number: int) -> None:
        if number not in self._adapters:
            raise RequestError(f"there is no adapter {number}, or it has been removed")

    def check(self, request: TokenRequest) -> None:
        """Refuse what can never be generated.

        Raises:
            RequestError: prompt and new tokens do not fit into the context, an id is not in the vocabulary,
                or there is no such adapter.
        """
        if request.adapter:
            self._check_adapter(request.adapter)
        self._check_ids(request.prompt_ids, (*request.sampling.logit_bias, *request.stop_ids))
        num_prompt, num_new = len(request.prompt_ids), request.sampling.max_new_tokens
        if request.wants_hidden_states:
            if num_prompt > self.max_length:
                raise ContextLengthError(
                    f"the model's context is {self.max_length} tokens, but a text has {num_prompt}; "
                    "shorten it"
                )
            return
        if num_new == 0 and request.num_prompt_log_probabilities is None:
            raise RequestError("max_new_tokens is 0; ask for at least one token")
        if num_prompt + num_new > self.max_length:
            raise ContextLengthError(
                f"the model's context is {self.max_length} tokens, but the prompt has {num_prompt} and "
                f"{num_new} new ones were asked for; shorten the prompt or ask for fewer"
            )

    def _check_ids(self, prompt_ids: Sequence[int], other_ids: Iterable[int]) -> None:
        if len(prompt_ids) == 0:
            raise RequestError("the prompt has no tokens; expected at least one")
        ids, vocab_size = [*prompt_ids, *other_ids], self._runner.vocab_size
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise RequestError(f"token ids must be between 0 and {vocab_size - 1}")

    def add(self, request: TokenRequest) -> int:
        """Start a request in a free slot and return its id; it waits there for blocks.

        Raises:
            RequestError: as `check`.
        """
        self.check(request)
        assert self.num_free_slots, "the caller must look at num_free_slots"
        running = Running.start(self._next_id, request)
        self._next_id += 1
        self._schedule.add(running)
        return running.request_id

    def cancel(self, request_id: int) -> None:
        """End a request and free its slot; an unknown id is one that ended already."""
        self._schedule.remove(request_id)
        if self._leaving:
            self._let_go()
        if self.guesses is not None:
            self.guesses.forget(request_id)

    def step(self) -> list[TokenEvent]:
        """Read a chunk of prompts, if there are any to read, and make tokens for each other request."""
        plan = self._schedule.plan(self._guess)
        starved = self._schedule.starved
        of_states = [item for item in plan if item[0].request.wants_hidden_states]
        others = [item for item in plan if not item[0].request.wants_hidden_states]
        events = [
            *self._compute(others, self._runner.run, self._use_logits),
            *self._compute(of_states, self._runner.hidden_states, self._use_hidden_states),
        ]
        self._learn(plan, events)
        if starved is not None:
            events.append(self._end_with(starved, problem_of(MemoryError())))
        return events

    def _compute(
        self,
        plan: Sequence[Planned],
        compute: Callable[[Sequence[SequenceWork]], Tensor],
        use: Callable[[Sequence[Planned], Tensor], list[TokenEvent]],
    ) -> list[TokenEvent]:
        """Do the work of some requests. If that fails it is done one by one: only whose work fails ends.

        What failed work has written lies behind all that can be found in the blocks.
        """
        if not plan:
            return []
        try:
            computed = compute([work for _, work in plan])
        except Exception as error:  # a library's, a device's
            if len(plan) == 1:
                return [self._end_with(plan[0][0], problem_of(error))]
            return [event for item in plan for event in self._compute([item], compute, use)]
        for running, work in plan:
            self._schedule.note_read(running, work)
        return use(plan, computed)

    # ------------------------------------------------------------------ what comes out

    def _use_hidden_states(self, plan: Sequence[Planned], states: Tensor) -> list[TokenEvent]:
        """Collect the states (tokens, hidden) of each request; the end of those that have all."""
        events = []
        lengths = [len(work.token_ids) for _, work in plan]
        for (running, _), part in zip(plan, torch.split(states, lengths), strict=True):
            running.hidden_states.append(part)
            if not running.num_unread:
                self.cancel(running.request_id)
                whole = torch.cat(running.hidden_states)
                events.append(TokenEvent(running.request_id, None, "length", hidden_states=whole))
        return events

    def _use_logits(self, plan: Sequence[Planned], logits: Tensor) -> list[TokenEvent]:
        """Draw tokens for each request, as far as the guesses hold, and say which requests ended."""
        events: list[TokenEvent] = []
        first = 0
        # (request, row of the logits that decide its next token, guesses not yet compared)
        undecided: list[tuple[Running, int, Sequence[int]]] = []
        for running, work in plan:
            rows = logits[first : first + work.num_logits]
            first += work.num_logits
            ended = self._score_prompt(running, work, rows) if running.is_scoring else None
            if ended is not None:
                events.append(ended)
            elif running.num_read >= running.num_tokens:
                num_guesses = running.num_read - running.num_tokens
                guesses = work.token_ids[len(work.token_ids) - num_guesses :]
                undecided.append((running, first - 1 - num_guesses, guesses))
        while undecided:
            places = [row for _, row, _ in undecided]
            # Without a copy where nothing is left out.
            wanted = logits if places == list(range(len(logits))) else logits[places]
            drawn = [
                self._accept(running, choice, row)
                for (running, _, _), choice, row in zip(
                    undecided, choose([one for one, _, _ in undecided], wanted), wanted, strict=True
                )
            ]
            events += drawn
            undecided = [
                (running, row + 1, guesses[1:])
                for (running, row, guesses), event in zip(undecided, drawn, strict=True)
                if event.finish_reason is None and guesses and guesses[0] == event.token_id
            ]
        for running, _ in plan:
            # Behind the token before the newest one there are wrong guesses.
            running.num_read = min(running.num_read, running.num_tokens - 1)
        return events

    def _score_prompt(
        self, running: Running, work: SequenceWork, rows: Tensor
    ) -> TokenEvent | None:
        """Score the tokens of a prompt; the request's end if that is all of it."""
        try:
            score_prompt(running, work.start, rows)
        except Exception as error:
            return self._end_with(running, problem_of(error))
        if running.num_unread or running.request.sampling.max_new_tokens:
            return None
        self.cancel(running.request_id)
        return TokenEvent(
            running.request_id, None, "length", scored_prompt=tuple(running.scored_prompt)
        )

    def _accept(self, running: Running, choice: Choice, logits: Tensor) -> TokenEvent:
        """What a choice does for its request, whose logits (vocabulary,) these are."""
        if choice.problem is not None:
            return self._end_with(running, choice.problem)
        request, token_id = running.request, choice.token_id
        if token_id is None or token_id in request.stop_ids:
            self.cancel(running.request_id)
            prompt = tuple(running.scored_prompt)
            return TokenEvent(running.request_id, None, "stop", scored_prompt=prompt)
        scored = None
        if request.num_log_probabilities is not None:
            try:
                chosen = torch.tensor([token_id])
                [scored] = score_tokens(logits[None], chosen, request.num_log_probabilities)
            except Exception as error:
                return self._end_with(running, problem_of(error))
        running.token_ids[running.num_tokens] = token_id
        running.num_tokens += 1
        reason: FinishReason | None = None
        if running.num_new == request.sampling.max_new_tokens:
            reason = "length"
            self.cancel(running.request_id)
        prompt, running.scored_prompt = tuple(running.scored_prompt), []
        return TokenEvent(running.request_id, token_id, reason, scored, prompt)

    def _end_with(self, running: Running, problem: FullStackTransformerError) -> TokenEvent:
        # Nobody may go on from what the blocks hold now.
        self._schedule.forget(running)
        self.cancel(running.request_id)
        return TokenEvent(running.request_id, None, "error", problem=problem)

    # ------------------------------------------------------------------ guesses

    def _guess(self, decoding: Sequence[Running]) -> Sequence[list[int]]:
        """What may follow the newest token of each request; nothing where guessing does not pay."""
        if self.guesses is None:
            return [[] for _ in decoding]
        return self.guesses.propose(decoding)

    def _learn(self, plan: Sequence[Planned], events: Sequence[TokenEvent]) -> None:
        """Let guesses be compared with what came out of a step."""
        if self.guesses is None:
            return
        new_ids: dict[int, list[int]] = {}
        for event in events:
            if event.token_id is not None:
                new_ids.setdefault(event.request_id, []).append(event.token_id)
        self.guesses.settle(new_ids, num_computed=len(plan))
