"""What the engine is asked and answers, in token ids, and what is known of a request under way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.errors import FullStackTransformerError
from full_stack_transformer.generation.sampling import ScoredToken

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
    wants_hidden_states: bool = False
    """Make no tokens; the last event has what the last norm gives for each token of the prompt."""
    shares_with: str | None = ""
    """Requests with the same word and adapter go on from what one of them has read; none shares with
    nobody."""
    adapter: int = 0
    """What `Engine.add_adapter` gave; 0 for the base alone."""

    @classmethod
    def for_hidden_states(
        cls, token_ids: Sequence[int], shares_with: str | None = "", adapter: int = 0
    ) -> Self:
        """Ask for what the model makes of each token of a sequence."""
        return cls(
            token_ids,
            SamplingParameters(max_new_tokens=0, temperature=0, seed=0),
            wants_hidden_states=True,
            shares_with=shares_with,
            adapter=adapter,
        )


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
    hidden_states: Tensor | None = field(default=None, compare=False)
    """(tokens, hidden) of the prompt, where they were asked for."""


@dataclass(eq=False)
class Running:
    """A request under way; it has blocks, or waits for some."""

    request_id: int
    request: TokenRequest
    generator: torch.Generator
    token_ids: Tensor
    """(prompt + max_new_tokens,): prompt, new tokens so far, and room."""
    num_tokens: int
    """Of prompt and new text so far."""
    num_read: int = 0
    """Tokens that the blocks hold."""
    block_ids: list[int] = field(default_factory=list)
    """None while the request waits."""
    keys: list[bytes] = field(default_factory=list)
    """Of the blocks that the tokens so far fill."""
    num_findable: int = 0
    """Blocks that others have been told of."""
    scored_prompt: list[ScoredToken] = field(default_factory=list)
    hidden_states: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(cls, request_id: int, request: TokenRequest) -> Self:
        """A request of which nothing has been read."""
        num_prompt, sampling = len(request.prompt_ids), request.sampling
        token_ids = torch.zeros(num_prompt + sampling.max_new_tokens, dtype=torch.long)
        token_ids[:num_prompt] = torch.tensor(request.prompt_ids)
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        return cls(request_id, request, generator, token_ids, num_prompt)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_new(self) -> int:
        """New tokens so far."""
        return self.num_tokens - self.num_prompt

    @property
    def num_unread(self) -> int:
        """Tokens that are still to be read; after the last one comes the next token. Never 0 between
        two steps."""
        return self.num_tokens - self.num_read

    @property
    def is_scoring(self) -> bool:
        """Whether the logits of the prompt's tokens are wanted, and not all have been there."""
        return self.num_new == 0 and self.request.num_prompt_log_probabilities is not None

    @property
    def needs_every_token(self) -> bool:
        """Whether what others have read is of no use: results of each token of the prompt are wanted."""
        return self.is_scoring or self.request.wants_hidden_states

    def next_uniform(self) -> Tensor:
        """A random number (1,) in [0, 1), of the request's own; greedy ones need none."""
        if self.request.sampling.temperature == 0:
            return _NO_UNIFORM
        return torch.rand(1, generator=self.generator, dtype=torch.float64)

    def start_over(self) -> None:
        """Forget what was read; tokens, random numbers and what has been reported stay."""
        self.block_ids = []
        self.num_read = self.num_findable = 0
        if self.num_new == 0:  # parts of the prompt come again
            self.scored_prompt.clear()
            self.hidden_states.clear()
