"""The text side of one request: tokens to text as they arrive, up to a stop string.

    engine --TokenEvent--> Continuation --TextPiece--> whoever reads

Whoever runs the engine uses it: `TextGenerator`, in the caller's thread, or the service's worker. Knows
nothing of HTTP and of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from full_stack_transformer.generation.engine import FinishReason, TokenEvent
from full_stack_transformer.generation.sampling import ScoredToken
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer, TextStream


@dataclass(frozen=True)
class Alternative:
    """One of the likeliest tokens in a place."""

    token_id: int
    text: str
    log_probability: float


@dataclass(frozen=True)
class TextToken:
    """A token with its text and the natural logarithm of its probability."""

    token_id: int
    text: str
    """What the token adds to the text: nothing before the last token of a character, which has all of it."""
    log_probability: float
    alternatives: tuple[Alternative, ...]
    """The likeliest tokens in its place."""


@dataclass(frozen=True)
class TextPiece:
    """A piece of a continuation, in the order of its tokens."""

    text: str
    finish_reason: FinishReason | None = None
    token: TextToken | None = None
    """The token that released it, where log-probabilities were asked for."""


class Continuation:
    """The text of one request as its tokens arrive; the pieces add up to the whole text.

    Args:
        tokenizer: of the model.
        stop: the text ends before the first of these, wherever the borders of tokens are.
    """

    def __init__(self, tokenizer: DocumentTokenizer, stop: Sequence[str] = ()) -> None:
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer)
        self._stop = [text for text in stop if text]
        self._held_back = ""

    def push(self, event: TokenEvent) -> TextPiece:
        """The text that this event releases; `finish_reason` is set on the last piece.

        A piece with "stop" may come before the engine's end: the caller then cancels the request and
        ignores the events that are left of the same step.
        """
        new_text = ""
        if event.token_id is not None:
            self.num_tokens += 1
            new_text += self._stream.push(event.token_id)
        if event.finish_reason is not None:
            new_text += self._stream.finish()
        token = as_text_token(event.scored, new_text, self._tokenizer) if event.scored else None
        text = self._held_back + new_text
        cut = self._first_stop(text)
        if cut is not None:
            self._held_back, self.finish_reason = "", "stop"
            return TextPiece(text[:cut], "stop", token)
        self.finish_reason = event.finish_reason
        num_held = 0 if event.finish_reason is not None else self._num_possible_stop(text)
        released = len(text) - num_held
        self._held_back = text[released:]
        return TextPiece(text[:released], event.finish_reason, token)

    def _first_stop(self, text: str) -> int | None:
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        return min(found, default=None)

    def _num_possible_stop(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def as_text_token(scored: ScoredToken, text: str, tokenizer: DocumentTokenizer) -> TextToken:
    """A scored token with its text, and with those of its alternatives."""
    return TextToken(
        scored.token_id,
        text,
        scored.log_probability,
        tuple(
            Alternative(token_id, _shown(token_id, tokenizer), log_probability)
            for token_id, log_probability in scored.alternatives
        ),
    )


def _shown(token_id: int, tokenizer: DocumentTokenizer) -> str:
    """The token alone as text; the name of a control token."""
    return tokenizer.decode([token_id]) or tokenizer.backend.id_to_token(token_id) or ""
