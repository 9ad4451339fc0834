"""Continuous batching on token ids: add a request, step, cancel.

    add ─> waits for its turn to be read ─> read in chunks ─> decoded, one token or more a step ─> ends

Requests join and leave between steps. Each has a slot of the runner's cache; a step reads one bounded chunk
of new prompts and makes a token for every request whose prompt has been read, so that a long prompt never
stalls the others for long. What a slot holds after its request has ended stays there: a request that begins
with the same tokens goes on from them. Knows nothing of text, of HTTP and of threads: one thread owns it.

The same request with the same seed gives the same tokens, alone or among others, in any slot, whatever was
cancelled, read before or guessed. Exactly so, bit for bit, on the C++ decoder (see native/decoder.py), for
each type of its weights, any number of threads and any cut of the prompt, on one kind of processor and one
version of PyTorch. Through PyTorch the logits' last bits depend on what is computed together; see
`TorchRunner` for what that means.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.errors import (
    ContextLengthError,
    FullStackTransformerError,
    ModelError,
    RequestError,
)
from full_stack_transformer.generation.runners.torch import Runner, SlotWork
from full_stack_transformer.generation.sampling import (
    History,
    ScoredToken,
    adjusted_scores,
    draw,
    draw_allowed,
    score_tokens,
)
from full_stack_transformer.machine import is_out_of_memory

logger = logging.getLogger(__name__)

# Tokens of a prompt that are read between two decoding steps.
_PREFILL_CHUNK_TOKENS = 256
# Fewer tokens in common are read again rather than copied from another slot.
_MIN_REUSED_TOKENS = 16
# Tokens that are guessed at once, and requests at most while guessing pays: with many requests the
# processor has no spare time for guesses that fail.
_MAX_GUESSED_TOKENS, _MAX_REQUESTS_WITH_GUESSES = 6, 2

# Tokens that must have occurred together before, for what followed them there to be a guess.
_GUESSED_FROM_TOKENS = 3

_NO_UNIFORM = torch.zeros(1, dtype=torch.float64)

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class TokenRequest:
    """What to generate."""

    prompt_ids: Sequence[int]
    sampling: SamplingParameters
    """The engine follows all but `stop` and `ignored_words`, which concern texts."""
    stop_ids: frozenset[int] = frozenset()
    """A token of these ends the request and is not part of the result."""
    forbids: Callable[[Sequence[int]], bool] | None = None
    """Called with the new tokens so far and a candidate at their end; true takes the candidate back."""
    num_log_probabilities: int | None = None
    """Report the log-probability of each new token and of this many alternatives."""
    num_prompt_log_probabilities: int | None = None
    """Report those of the prompt's tokens after the first one too, with the first event."""


@dataclass(frozen=True)
class TokenEvent:
    """What a step did for one request: a new token, the end, or both."""

    request_id: int
    token_id: int | None
    finish_reason: FinishReason | None
    scored: ScoredToken | None = None
    """Log-probabilities of the token, where they were asked for."""
    scored_prompt: tuple[ScoredToken, ...] = ()
    """Those of the prompt's tokens after the first one; with the first event of a request."""
    problem: FullStackTransformerError | None = field(default=None, compare=False)
    """Why the request ends with "error"."""


@dataclass
class _Running:
    request: TokenRequest
    slot: int
    generator: torch.Generator
    token_ids: Tensor
    """(prompt + max_new_tokens,): prompt, new tokens so far, and room."""
    num_tokens: int
    """Of prompt and new text so far."""
    num_read: int = -1
    """Tokens that the slot holds; -1 before its turn has come."""
    scored_prompt: list[ScoredToken] = field(default_factory=list)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_new(self) -> int:
        return self.num_tokens - self.num_prompt

    def next_uniform(self) -> Tensor:
        """A random number (1,) in [0, 1), of the request's own; greedy ones need none."""
        if self.request.sampling.temperature == 0:
            return _NO_UNIFORM
        return torch.rand(1, generator=self.generator, dtype=torch.float64)

    @property
    def is_reading(self) -> bool:
        return self.num_read < self.num_prompt


class Engine:
    """Generates for up to `num_slots` requests at once.

    Args:
        runner: what computes.
        guesses: look for the newest tokens earlier in the text and check what followed them there in one
            step; the tokens that come out are the same.
    """

    def __init__(self, runner: Runner, *, guesses: bool = True) -> None:
        self.max_length = runner.max_length
        self.num_slots = runner.num_slots
        self.computed_by = runner.name
        """What computes, for people."""
        self.num_reused_tokens = 0
        """Prompt tokens that did not have to be read."""
        self._runner = runner
        self._guesses = guesses
        self._held: list[list[int]] = [[] for _ in range(runner.num_slots)]
        self._free_slots = list(range(runner.num_slots))
        self._running: dict[int, _Running] = {}
        self._next_id = 0

    @property
    def num_free_slots(self) -> int:
        """Requests that can be added now."""
        return len(self._free_slots)

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return len(self._running)

    def check(self, request: TokenRequest) -> None:
        """Refuse what can never be generated.

        Raises:
            RequestError: prompt and new tokens do not fit into the context, or an id is not in the
                vocabulary.
        """
        self._check_ids(request.prompt_ids, (*request.sampling.logit_bias, *request.stop_ids))
        num_prompt, num_new = len(request.prompt_ids), request.sampling.max_new_tokens
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
        """Start a request in a free slot and return its id.

        Raises:
            RequestError: as `check`.
        """
        self.check(request)
        assert self._free_slots, "the caller must look at num_free_slots"
        request_id = self._next_id
        self._next_id += 1
        num_prompt, sampling = len(request.prompt_ids), request.sampling
        token_ids = torch.zeros(num_prompt + sampling.max_new_tokens, dtype=torch.long)
        token_ids[:num_prompt] = torch.tensor(request.prompt_ids)
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        self._running[request_id] = _Running(
            request=request,
            slot=self._take_slot(request.prompt_ids),
            generator=generator,
            token_ids=token_ids,
            num_tokens=num_prompt,
        )
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request and free its slot; an unknown id is one that ended already."""
        running = self._running.pop(request_id, None)
        if running is not None:
            self._free_slots.append(running.slot)

    def step(self) -> list[TokenEvent]:
        """Read a chunk of prompts, if there are any to read, and make tokens for each other request."""
        keys = [key for key, one in self._running.items() if not one.is_reading]
        work = [self._next_work(self._running[key], len(keys)) for key in keys]
        for key, chunk in self._next_chunks():
            keys.append(key)
            work.append(chunk)
        return self._compute(keys, work) if work else []

    def _compute(self, keys: Sequence[int], work: Sequence[SlotWork]) -> list[TokenEvent]:
        """Do the work of some requests. If that fails it is done one by one: only whose work fails ends."""
        try:
            logits = self._runner.run(self._forgetting(work))
        except Exception as error:  # a library's, a device's
            if len(keys) == 1:
                return [self._end_failed(keys[0], error)]
            alone = [self._compute([key], [one]) for key, one in zip(keys, work, strict=True)]
            return [event for some in alone for event in some]
        for key, one in zip(keys, work, strict=True):
            self._running[key].num_read = one.start + len(one.token_ids)
            self._held[one.slot] += one.token_ids
        return self._choose(keys, work, logits)

    def hidden_states(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """What the model makes of each token of some sequences, in slots that are free now.

        Returns:
            (tokens, hidden) of each sequence, after the last norm.

        Raises:
            RequestError: a sequence is empty or does not fit into the context, or an id is not in the
                vocabulary.
        """
        assert self._free_slots, "the caller must look at num_free_slots"
        for sequence in sequences:
            self._check_ids(sequence, ())
            if len(sequence) > self.max_length:
                raise ContextLengthError(
                    f"the model's context is {self.max_length} tokens, but a text has {len(sequence)}; "
                    "shorten it"
                )
        states: list[Tensor] = []
        for first in range(0, len(sequences), len(self._free_slots)):
            states += self._read_whole(sequences[first : first + len(self._free_slots)])
        return states

    def _read_whole(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Hidden states of sequences, at most one for each free slot."""
        parts: list[list[Tensor]] = [[] for _ in sequences]
        for start in range(0, max(map(len, sequences)), _PREFILL_CHUNK_TOKENS):
            numbers = [number for number, ids in enumerate(sequences) if len(ids) > start]
            work = [
                SlotWork(
                    self._free_slots[number],
                    start,
                    list(sequences[number][start : start + _PREFILL_CHUNK_TOKENS]),
                    num_logits=0,
                )
                for number in numbers
            ]
            states = self._runner.hidden_states(self._forgetting(work))
            lengths = [len(one.token_ids) for one in work]
            for number, one, part in zip(numbers, work, torch.split(states, lengths), strict=True):
                self._held[one.slot] += one.token_ids
                parts[number].append(part)
        return [torch.cat(some) for some in parts]

    def _forgetting(self, work: Sequence[SlotWork]) -> Sequence[SlotWork]:
        """The work, once what it writes over is no longer said to be held: it may fail half-way."""
        for one in work:
            del self._held[one.slot][one.start :]
        return work

    # ------------------------------------------------------------------ what to read

    def _take_slot(self, prompt_ids: Sequence[int]) -> int:
        """The free slot that holds the longest beginning of the prompt, else the one free for longest."""
        common = [_num_common(self._held[slot], prompt_ids) for slot in self._free_slots]
        best = max(range(len(common)), key=lambda place: common[place])
        if common[best] < _MIN_REUSED_TOKENS:
            empty = [place for place, slot in enumerate(self._free_slots) if not self._held[slot]]
            best = empty[0] if empty else 0
        return self._free_slots.pop(best)

    def _next_chunks(self) -> list[tuple[int, SlotWork]]:
        """What to read in this step, by request: of the oldest ones, as much as a chunk has room for."""
        chunks: list[tuple[int, SlotWork]] = []
        room = _PREFILL_CHUNK_TOKENS
        for key, running in self._running.items():
            if room and running.is_reading and not self._waits_for_others(running, chunks):
                chunks.append((key, self._next_chunk(running, room)))
                room -= len(chunks[-1][1].token_ids)
        return chunks

    def _waits_for_others(self, running: _Running, chunks: Sequence[tuple[int, SlotWork]]) -> bool:
        """Whether what is read in this step is the beginning of this prompt too: then it is reused."""
        prompt_ids = running.request.prompt_ids
        return running.num_read < 0 and any(
            _num_common(self._running[key].request.prompt_ids, prompt_ids) >= _MIN_REUSED_TOKENS
            for key, _ in chunks
        )

    def _next_chunk(self, running: _Running, room: int) -> SlotWork:
        """The chunk of a prompt that comes next; none of its logits matter before the last one."""
        prompt_ids = running.request.prompt_ids
        if running.num_read < 0:
            # Logits of tokens that are not read again are not to be had.
            is_scored = running.request.num_prompt_log_probabilities is not None
            running.num_read = 0 if is_scored else self._reuse(running.slot, prompt_ids)
        start = running.num_read
        chunk = list(prompt_ids[start : start + room])
        is_last = start + len(chunk) == len(prompt_ids)
        if running.request.num_prompt_log_probabilities is not None:
            return SlotWork(running.slot, start, chunk, num_logits=len(chunk))
        return SlotWork(running.slot, start, chunk, num_logits=1 if is_last else 0)

    def _reuse(self, slot: int, prompt_ids: Sequence[int]) -> int:
        """Let the slot hold the longest beginning of the prompt that any slot holds; how long that is."""
        # The last token is always read: its logits are wanted.
        wanted = prompt_ids[:-1]
        own = _num_common(self._held[slot], wanted)
        lengths = [_num_common(held, wanted) for held in self._held]
        best = max(range(len(lengths)), key=lambda other: lengths[other])
        if lengths[best] >= max(_MIN_REUSED_TOKENS, own + 1):
            self._runner.copy_slot(best, slot, lengths[best])
            self._held[slot] = list(wanted[: lengths[best]])
            own = lengths[best]
        own = own if own >= _MIN_REUSED_TOKENS else 0
        self.num_reused_tokens += own
        return own

    def _next_work(self, running: _Running, num_decoding: int) -> SlotWork:
        """The newest token, and guesses of what follows it."""
        ids = running.token_ids[running.num_read : running.num_tokens].tolist()
        guesses: list[int] = []
        if self._guesses and num_decoding <= _MAX_REQUESTS_WITH_GUESSES:
            room = (
                running.num_prompt
                + running.request.sampling.max_new_tokens
                - running.num_tokens
                - 1
            )
            known = running.token_ids[: running.num_tokens]
            guesses = _guess_from_text(known, min(room, _MAX_GUESSED_TOKENS))
        return SlotWork(
            running.slot, running.num_read, [*ids, *guesses], num_logits=1 + len(guesses)
        )

    # ------------------------------------------------------------------ what comes out

    def _choose(
        self, keys: Sequence[int], work: Sequence[SlotWork], logits: Tensor
    ) -> list[TokenEvent]:
        """Draw tokens for each request, as far as the guesses hold, and say which requests ended."""
        events: list[TokenEvent] = []
        first = 0
        # (key, row of the logits that decide its next token, guesses not yet compared)
        open_requests: list[tuple[int, int, list[int]]] = []
        for key, one in zip(keys, work, strict=True):
            rows = logits[first : first + one.num_logits]
            try:
                ended = self._read_prompt(key, one, rows)
            except Exception as error:
                ended = self._end_failed(key, error)
            if ended is not None:
                events.append(ended)
            elif one.num_logits and not self._running[key].is_reading:
                num_guesses = 0 if one.start < self._running[key].num_prompt else one.num_logits - 1
                guesses = list(one.token_ids[len(one.token_ids) - num_guesses :])
                open_requests.append((key, first + one.num_logits - 1 - num_guesses, guesses))
            first += one.num_logits
        while open_requests:
            places = [row for _, row, _ in open_requests]
            drawn = self._draw(
                [key for key, _, _ in open_requests],
                logits if places == list(range(len(logits))) else logits[places],
            )
            events += drawn
            open_requests = [
                (key, row + 1, guesses[1:])
                for (key, row, guesses), event in zip(open_requests, drawn, strict=True)
                if event.finish_reason is None and guesses and guesses[0] == event.token_id
            ]
        self._forget_wrong_guesses(keys)
        return events

    def _read_prompt(self, key: int, one: SlotWork, rows: Tensor) -> TokenEvent | None:
        """Score the tokens of a prompt where that was asked for; the request's end if that is all of it."""
        running = self._running[key]
        if one.start >= running.num_prompt or running.request.num_prompt_log_probabilities is None:
            return None
        _score_prompt(running, one.start, rows)
        if not bool(torch.isfinite(rows.amax(dim=-1)).all()):
            return self._end_with(key, _broken_model())
        if running.is_reading or running.request.sampling.max_new_tokens:
            return None
        return self._end_after_prompt(key, running)

    def _forget_wrong_guesses(self, keys: Sequence[int]) -> None:
        """Forget what slots hold after the token before the newest one: those guesses were wrong."""
        for key in keys:
            running = self._running.get(key)
            if running is not None and not running.is_reading:
                running.num_read = min(running.num_read, running.num_tokens - 1)
                del self._held[running.slot][running.num_read :]

    def _draw(self, keys: Sequence[int], logits: Tensor) -> list[TokenEvent]:
        """One token for each request from its logits (requests, vocabulary)."""
        uniforms = torch.cat([self._running[key].next_uniform() for key in keys])
        return self._draw_by(keys, logits, uniforms)

    def _draw_by(self, keys: Sequence[int], logits: Tensor, uniforms: Tensor) -> list[TokenEvent]:
        """The same with a random number for each; what fails together is drawn one by one."""
        batch = [self._running[key] for key in keys]
        parameters = [one.request.sampling for one in batch]
        try:
            scores = adjusted_scores(logits, parameters, list(map(_history, batch)))
            # NaN spreads to the largest score; -inf is a token out of the question.
            tops = scores.amax(dim=-1)
            are_numbers = torch.isfinite(logits.amax(dim=-1)).tolist()
            if not bool(torch.isfinite(tops).all()):
                scores = torch.where(torch.isfinite(tops)[:, None], scores, 0.0)
            drawn = draw(scores, parameters, uniforms)
        except Exception as error:
            if len(keys) == 1:
                return [self._end_failed(keys[0], error)]
            rows = [slice(row, row + 1) for row in range(len(keys))]
            alone = [self._draw_by(keys[row], logits[row], uniforms[row]) for row in rows]
            return [event for some in alone for event in some]
        events = []
        for row, (key, one, top) in enumerate(zip(keys, batch, tops.tolist(), strict=True)):
            if not are_numbers[row]:
                events.append(self._end_with(key, _broken_model()))
            elif not top < math.inf:
                events.append(self._end_with(key, _broken_parameters()))
            else:
                drawn_id = (
                    int(drawn[row]) if top > -math.inf else None
                )  # none where nothing is left
                events.append(self._choose_drawn(key, one, drawn_id, scores[row], logits[row]))
        return events

    def _choose_drawn(
        self, key: int, one: _Running, token_id: int | None, scores: Tensor, logits: Tensor
    ) -> TokenEvent:
        """Accept a drawn token, or another one where it is forbidden."""
        try:
            if token_id is not None:
                token_id = _allowed_token(token_id, scores, one)
            return self._accept(key, one, token_id, logits)
        except Exception as error:  # such as one of what the caller forbids
            return self._end_failed(key, error)

    def _end_failed(self, key: int, error: Exception) -> TokenEvent:
        if isinstance(error, FullStackTransformerError):
            return self._end_with(key, error)
        if is_out_of_memory(error):
            problem = ModelError(
                "memory is short for this request; ask for less, or try again later"
            )
            return self._end_with(key, problem)
        logger.error("a request failed and is ended; the others go on", exc_info=error)
        problem = ModelError(f"the model failed on this request ({type(error).__name__})")
        return self._end_with(key, problem)

    def _end_with(self, key: int, problem: FullStackTransformerError) -> TokenEvent:
        running = self._running[key]
        self.cancel(key)
        # Nobody may go on from what the slot holds now.
        self._held[running.slot].clear()
        return TokenEvent(key, None, "error", problem=problem)

    def _end_after_prompt(self, key: int, running: _Running) -> TokenEvent:
        self.cancel(key)
        return TokenEvent(key, None, "length", scored_prompt=tuple(running.scored_prompt))

    def _accept(
        self, key: int, running: _Running, token_id: int | None, logits: Tensor
    ) -> TokenEvent:
        request = running.request
        if token_id is None or token_id in request.stop_ids:
            self.cancel(key)
            return TokenEvent(key, None, "stop", scored_prompt=tuple(running.scored_prompt))
        running.token_ids[running.num_tokens] = token_id
        running.num_tokens += 1
        reason: FinishReason | None = None
        if running.num_new == request.sampling.max_new_tokens:
            reason = "length"
            self.cancel(key)
        scored = None
        if request.num_log_probabilities is not None:
            chosen = torch.tensor([token_id])
            [scored] = score_tokens(logits[None], chosen, request.num_log_probabilities)
        prompt, running.scored_prompt = tuple(running.scored_prompt), []
        return TokenEvent(key, token_id, reason, scored, prompt)


def _broken_model() -> ModelError:
    return ModelError("the model computed scores that are NaN or infinite; its weights are broken")


def _broken_parameters() -> RequestError:
    return RequestError(
        "with these penalties and this logit_bias scores of tokens are no finite numbers; use smaller ones"
    )


def _score_prompt(running: _Running, start: int, logits: Tensor) -> None:
    """Remember the log-probabilities of the prompt's tokens that follow those from `start`.

    Args:
        logits: (tokens, vocabulary) after each token of a chunk.
    """
    following = running.token_ids[start + 1 : min(start + 1 + len(logits), running.num_prompt)]
    num_alternatives = running.request.num_prompt_log_probabilities
    assert num_alternatives is not None
    running.scored_prompt += score_tokens(logits[: len(following)], following, num_alternatives)


def _guess_from_text(token_ids: Tensor, max_guesses: int) -> list[int]:
    """What followed the newest tokens (tokens,) where they last occurred together before.

    Prompt lookup: Saxena 2023; Leviathan et al. 2023 for why checking guesses changes nothing.
    """
    num_tokens = len(token_ids)
    if max_guesses < 1 or num_tokens <= _GUESSED_FROM_TOKENS:
        return []
    newest = token_ids[-_GUESSED_FROM_TOKENS:]
    windows = token_ids[:-1].unfold(0, _GUESSED_FROM_TOKENS, 1)
    positions = (windows == newest).all(dim=1).nonzero()
    if not len(positions):
        return []
    after = int(positions[-1]) + _GUESSED_FROM_TOKENS
    guesses: list[int] = token_ids[after : after + max_guesses].tolist()
    return guesses


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the beginning that two sequences share."""
    length = min(len(first), len(second))
    if list(first[:length]) == list(second[:length]):
        return length
    return next(place for place in range(length) if first[place] != second[place])


def _history(running: _Running) -> History:
    request = running.request
    is_early = running.num_new < request.sampling.min_new_tokens
    return History(
        running.token_ids[: running.num_tokens],
        running.num_prompt,
        tuple(request.stop_ids) if is_early else (),
    )


def _allowed_token(token_id: int, scores: Tensor, running: _Running) -> int | None:
    """`token_id`, or another draw from `scores` (vocabulary,) among those that the request allows.

    None when nothing is left.
    """
    forbids = running.request.forbids
    if forbids is None:
        return token_id
    new_ids = running.token_ids[running.num_prompt : running.num_tokens].tolist()

    def is_forbidden(candidate: int) -> bool:
        return forbids([*new_ids, candidate])

    if not is_forbidden(token_id):
        return token_id
    return draw_allowed(scores, running.request.sampling, is_forbidden, running.generator)
