"""Guesses of the next tokens of requests, which the model then checks in one step.

    requests that decode ─propose─> guesses, by prompt lookup or a draft model
                                       │
                                  the engine draws its tokens, as far as the guesses hold
                                       │
                         settle <──────┘  what held, and what it took

A guess changes no token: the engine draws each from the model's scores with the request's random numbers,
and goes on only while it draws what was guessed. All that guesses change is time, so that is measured, and
they are left out where they lose. Knows nothing of the model that checks.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from full_stack_transformer.generation.draft import Draft
from full_stack_transformer.generation.token_requests import Running

GuessKind = Literal["prompt_lookup", "draft"]

# A step with so many guesses takes 20 % longer than one without (SmolLM2-135M, fp32, two cores).
MAX_GUESSES = 8
# Tokens that must have occurred together before, for what followed them there to be a guess.
_LOOKED_UP_TOKENS = 3
# Guesses are made as long as they hold with this probability: what is looked up costs a row of the step that
# checks it, what a draft computes costs a step of the draft too.
_LEAST_CHANCE: dict[GuessKind, float] = {"prompt_lookup": 0.25, "draft": 0.5}
# How often guesses hold for a request of which nothing is known yet.
_FIRST_CHANCE, _FIRST_WEIGHT = 0.7, 2.0
_WEIGHT_KEPT = 0.8

# Steps of a trial with guesses, and as many without. Fewer are enough where each saves or loses this part of
# a plain step.
_STEPS_OF_A_TRIAL, _STEPS_OF_A_CLEAR_TRIAL, _CLEAR_PART = 12, 4, 0.4
# What guesses must save of a plain step: they take the processor's time from others.
_LEAST_PART = 0.05
# Steps with guesses between two trials where they pay, and steps whose losing brings the next one at once.
_STEPS_BETWEEN_TRIALS, _STEPS_THAT_LOSE = 400, 32
# Of all time, what trials of guesses that do not pay may lose.
_MAX_LOST_FRACTION = 0.02
# The time for reading a text is laid on so many of the steps that it is read for.
_STEPS_TO_PAY_FOR_READING = 64


@dataclass
class GuessCounts:
    """What came of the guesses of one kind."""

    num_drafts: int = 0
    """How often some were made for a request."""
    num_proposed: int = 0
    num_accepted: int = 0


class Guesses:
    """Proposes guesses where they pay, and learns from what came of them.

    Args:
        draft: guesses beside prompt lookup.
        clock: seconds.
    """

    def __init__(
        self, draft: Draft | None = None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.draft = draft
        self.counts: dict[GuessKind, GuessCounts] = {"prompt_lookup": GuessCounts()}
        if draft is not None:
            self.counts["draft"] = GuessCounts()
        self._clock = clock
        self._trials: dict[tuple[GuessKind, int], Trial] = {}
        self._chances: dict[tuple[GuessKind, int], _Chance] = {}
        # Of the step under way.
        self._proposed: dict[int, tuple[GuessKind, list[int]]] = {}
        self._started, self._num_requests, self._seconds_reading = 0.0, 0, 0.0

    @property
    def are_off(self) -> dict[tuple[GuessKind, int], bool]:
        """Whether guesses of a kind are left out now, by kind and number of requests: up to so many."""
        is_broken = self.draft is not None and self.draft.is_broken
        return {
            (kind, group): not trial.is_on or (kind == "draft" and is_broken)
            for (kind, group), trial in tuple(self._trials.items())
        }

    def forget(self, request_id: int) -> None:
        """A request has ended; an unknown one has nothing to forget."""
        for kind in self.counts:
            self._chances.pop((kind, request_id), None)
        if self.draft is not None:
            self.draft.forget(request_id)

    # ------------------------------------------------------------------ before a step

    def propose(self, requests: Sequence[Running]) -> list[list[int]]:
        """Guesses of the tokens that follow those of each request, of all that decode in the next step."""
        self._started, self._num_requests = self._clock(), len(requests)
        self._proposed, self._seconds_reading = {}, 0.0
        if not requests:
            return []
        trials = {kind: self._trial(kind) for kind in self.counts}
        found = self._look_up(requests) if trials["prompt_lookup"].may_guess(self._started) else {}
        possible: list[GuessKind] = ["prompt_lookup"] if found else []
        if self.draft is not None and not self.draft.is_broken:
            possible.append("draft")
        kinds = _kinds_of_step({kind: trials[kind] for kind in possible}, self._started)
        looked_up: dict[int, tuple[GuessKind, list[int]]] = {
            request_id: ("prompt_lookup", ids) for request_id, ids in found.items()
        }
        if "prompt_lookup" in kinds:
            self._proposed |= looked_up
        if "draft" in kinds:
            self._ask_draft(requests)
            if not self._proposed and trials["prompt_lookup"].is_on:  # the draft has no guesses
                self._proposed = looked_up
        return [self._proposed.get(one.request_id, (None, []))[1] for one in requests]

    def _look_up(self, requests: Sequence[Running]) -> dict[int, list[int]]:
        """What followed the newest tokens before, for those requests where they occurred before."""
        found = {
            one.request_id: look_up(
                one.token_ids[: one.num_tokens], self._num_guesses("prompt_lookup", one)
            )
            for one in requests
        }
        return {request_id: ids for request_id, ids in found.items() if ids}

    def _ask_draft(self, requests: Sequence[Running]) -> None:
        """Let the draft guess, except where what was looked up is expected to hold as often."""
        assert self.draft is not None
        asked = [one for one in requests if not self._trusts_lookup(one.request_id)]
        read_before = self.draft.seconds_reading
        nums = [self._num_guesses("draft", one) for one in asked]
        for one, ids in zip(asked, self.draft.propose(asked, nums), strict=True):
            if ids:
                self._proposed[one.request_id] = ("draft", ids)
        self._seconds_reading = self.draft.seconds_reading - read_before

    def _trusts_lookup(self, request_id: int) -> bool:
        looked_up, drafted = (
            self._chance(kind, request_id).value for kind in ("prompt_lookup", "draft")
        )
        return request_id in self._proposed and looked_up >= drafted

    def _num_guesses(self, kind: GuessKind, one: Running) -> int:
        # The token after the last guess is drawn too.
        room = len(one.token_ids) - one.num_tokens - 1
        return min(room, self._chance(kind, one.request_id).num_guesses(_LEAST_CHANCE[kind]))

    def _chance(self, kind: GuessKind, request_id: int) -> "_Chance":
        return self._chances.setdefault((kind, request_id), _Chance())

    def _trial(self, kind: GuessKind) -> "Trial":
        return self._trials.setdefault((kind, _group(self._num_requests)), Trial())

    # ------------------------------------------------------------------ after it

    def settle(self, new_ids: Mapping[int, Sequence[int]], *, num_computed: int) -> None:
        """Learn from a step.

        Args:
            new_ids: the new tokens of the requests that have any.
            num_computed: requests in the step; only steps that do nothing but decode are timed.
        """
        now = self._clock()
        for request_id, (kind, ids) in self._proposed.items():
            num_accepted = num_common(ids, new_ids.get(request_id, ()))
            counts, chance = self.counts[kind], self._chances.get((kind, request_id))
            counts.num_drafts += 1
            counts.num_proposed += len(ids)
            counts.num_accepted += num_accepted
            if chance is not None:  # the request goes on
                chance.note(num_accepted, len(ids))
        if self._seconds_reading:
            self._trial("draft").note_reading(self._seconds_reading, now)
        step = Step(sum(map(len, new_ids.values())), now - self._started - self._seconds_reading)
        kinds = {kind for kind, _ in self._proposed.values()}
        # A step for which the draft only read is none of either sort.
        if num_computed > self._num_requests or (self._seconds_reading and not kinds):
            return
        for kind in self.counts:
            if step.num_tokens and (kind in kinds or not kinds):
                self._trial(kind).note(step, now, has_guesses=kind in kinds)


@dataclass(frozen=True)
class Step:
    """What a step made, and what it took."""

    num_tokens: int
    seconds: float


class Trial:
    """Finds out whether guesses of one kind pay, for one number of requests.

    Steps with and without them are timed by turns, so that both see the same load of the machine; medians
    leave out steps that something held up. Where guesses pay, the next trial comes after some number of
    steps, or when they seem to lose; where they do not, once the time that the trial lost is small beside the
    time since.
    """

    def __init__(self) -> None:
        self.is_on = True
        self._is_under_way = True
        self._with: deque[Step] = deque(maxlen=_STEPS_OF_A_TRIAL)
        self._without: deque[Step] = deque(maxlen=_STEPS_OF_A_TRIAL)
        self._recent: deque[Step] = deque(maxlen=_STEPS_THAT_LOSE)
        self._has_guessed = False
        self._num_steps = 0
        self._next_at = 0.0
        # Of reading texts: what the steps have not yet paid for, and all in this trial.
        self._unpaid_seconds, self._seconds_reading = 0.0, 0.0

    def may_guess(self, now: float) -> bool:
        """Whether guesses may be wanted for the next step."""
        if not self._is_under_way and self._is_due(now):
            self._is_under_way, self._has_guessed, self._seconds_reading = True, False, 0.0
            self._with.clear()
            self._without.clear()
        return self.is_on or self._is_under_way

    def wanted(self, now: float) -> bool | None:
        """Whether a trial under way wants the next step with guesses, or without; none without a trial."""
        self.may_guess(now)
        return not self._has_guessed if self._is_under_way else None

    def note_reading(self, seconds: float, now: float) -> None:
        """Texts were read so that their tokens can be guessed; a trial may end here as too expensive."""
        self._unpaid_seconds += seconds
        self._seconds_reading += seconds
        if self._is_under_way and self._without:
            plain_seconds = _median_seconds(self._without)
            if self._seconds_reading > plain_seconds * _STEPS_TO_PAY_FOR_READING:
                self._end(now, 0.0)

    def note(self, step: Step, now: float, *, has_guesses: bool) -> None:
        """Remember a step; the last one of a trial decides."""
        if has_guesses:
            share = self._unpaid_seconds / _STEPS_TO_PAY_FOR_READING
            self._unpaid_seconds -= share
            step = Step(step.num_tokens, step.seconds + share)
            self._num_steps += 1
        if self._is_under_way:
            self._has_guessed = has_guesses
            (self._with if has_guesses else self._without).append(step)
            if len(self._with) == len(self._without) >= _STEPS_OF_A_CLEAR_TRIAL:
                self._look(now)
        elif has_guesses:
            self._recent.append(step)

    def _is_due(self, now: float) -> bool:
        if not self.is_on:
            return now >= self._next_at
        is_losing = len(self._recent) == _STEPS_THAT_LOSE and _lost(self._recent, self._without) > 0
        return is_losing or self._num_steps >= _STEPS_BETWEEN_TRIALS

    def _look(self, now: float) -> None:
        """End the trial if it is clear, or long enough."""
        plain_seconds = _median_seconds(self._without)
        lost = _lost(self._with, self._without)
        if abs(lost) > _CLEAR_PART * plain_seconds or len(self._with) == _STEPS_OF_A_TRIAL:
            self._end(now, len(self._with) * (lost + _LEAST_PART * plain_seconds))

    def _end(self, now: float, lost: float) -> None:
        """End the trial; without guesses if it lost seconds."""
        self.is_on, self._is_under_way, self._num_steps = lost < 0, False, 0
        self._recent.clear()
        if not self.is_on:
            # Also if it lost next to nothing: then guesses of other texts may pay.
            lost_in_all = max(lost + self._seconds_reading, _median_seconds(self._without))
            self._next_at = now + lost_in_all / _MAX_LOST_FRACTION
            self._unpaid_seconds = 0.0


def _lost(steps: Sequence[Step], plain_steps: Sequence[Step]) -> float:
    """Seconds that a step takes more than plain ones for as many tokens."""
    num_tokens, num_plain_tokens = (
        statistics.mean(step.num_tokens for step in some) for some in (steps, plain_steps)
    )
    plain_seconds = _median_seconds(plain_steps) * num_tokens / num_plain_tokens
    return _median_seconds(steps) - plain_seconds


def _median_seconds(steps: Sequence[Step]) -> float:
    return statistics.median(step.seconds for step in steps)


def _kinds_of_step(trials: Mapping[GuessKind, Trial], now: float) -> set[GuessKind]:
    """The kinds of guesses to use in a step, of those that are possible in it."""
    wanted = {kind: trial.wanted(now) for kind, trial in trials.items()}
    for kind, is_wanted in wanted.items():
        if is_wanted:
            return {kind}  # alone: the trial is of this kind
    if False in wanted.values():
        return set()
    return {kind for kind, trial in trials.items() if trial.is_on}


class _Chance:
    """How often guesses of a kind hold for one request; the newest ones count most."""

    def __init__(self) -> None:
        self._num_held, self._num_checked = _FIRST_CHANCE * _FIRST_WEIGHT, _FIRST_WEIGHT

    @property
    def value(self) -> float:
        return self._num_held / self._num_checked

    def num_guesses(self, least_chance: float) -> int:
        """As many as hold together with at least this probability."""
        value = min(max(self.value, 0.01), 0.99)
        return min(max(round(math.log(least_chance) / math.log(value)), 1), MAX_GUESSES)

    def note(self, num_accepted: int, num_proposed: int) -> None:
        # Those after the first wrong one have not been checked.
        num_checked = min(num_accepted + 1, num_proposed)
        self._num_held = _WEIGHT_KEPT * self._num_held + num_accepted
        self._num_checked = _WEIGHT_KEPT * self._num_checked + num_checked


def _group(num_requests: int) -> int:
    """Requests that are measured together: each number up to 4, then up to 8, 16, 32 …"""
    return num_requests if num_requests <= 4 else 1 << (num_requests - 1).bit_length()


def look_up(token_ids: Tensor, max_guesses: int) -> list[int]:
    """What followed the newest tokens (tokens,) where they last occurred together before.

    Prompt lookup: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding
    """
    if max_guesses < 1 or len(token_ids) <= _LOOKED_UP_TOKENS:
        return []
    newest = token_ids[-_LOOKED_UP_TOKENS:]
    windows = token_ids[:-1].unfold(0, _LOOKED_UP_TOKENS, 1)
    positions = (windows == newest).all(dim=1).nonzero()
    if not len(positions):
        return []
    after = int(positions[-1]) + _LOOKED_UP_TOKENS
    guesses: list[int] = token_ids[after : after + max_guesses].tolist()
    return guesses


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Ids at the beginning that two sequences share."""
    length = min(len(first), len(second))
    if list(first[:length]) == list(second[:length]):
        return length
    return next(place for place in range(length) if first[place] != second[place])
