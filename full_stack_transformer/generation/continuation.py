"""The text side of one request: tokens to text as they arrive, up to a stop string.

    engine --TokenEvent--> Continuation --Piece--> whoever reads

Whoever runs the engine uses it: `TextGenerator`, in the caller's thread, or the service's worker. Knows
nothing of HTTP and of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from full_stack_transformer.errors import FullStackTransformerError
from full_stack_transformer.generation.engine import FinishReason, TokenEvent
from full_stack_transformer.generation.sampling import ScoredToken
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer, TextStream


@dataclass(frozen=True)
class Piece:
    """A piece of a continuation, or all of it; the last one has a finish reason."""

    text: str
    finish_reason: FinishReason | None = None
    num_tokens: int = 0
    scored: tuple[ScoredToken, ...] = ()
    """The tokens with their log-probabilities, where those were asked for."""
    scored_prompt: tuple[ScoredToken, ...] = ()
    decoded: str = ""
    """The text of the tokens, before any of it is held back or cut off for a stop string."""
    problem: FullStackTransformerError | None = None
    """Why the continuation ends with "error"."""


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a continuation as one."""
    return Piece(
        "".join(piece.text for piece in pieces),
        pieces[-1].finish_reason,
        sum(piece.num_tokens for piece in pieces),
        tuple(token for piece in pieces for token in piece.scored),
        tuple(token for piece in pieces for token in piece.scored_prompt),
        "".join(piece.decoded for piece in pieces),
        pieces[-1].problem,
    )


class Continuation:
    """The text of one request as its tokens arrive; the pieces add up to the whole text.

    Args:
        tokenizer: of the model.
        stop: the text ends before the first of these, wherever the borders of tokens are.
    """

    def __init__(self, tokenizer: DocumentTokenizer, stop: Sequence[str] = ()) -> None:
        self.num_tokens = 0
        self._stream = TextStream(tokenizer)
        self._stop = [text for text in stop if text]
        self._held_back = ""

    def push(self, *events: TokenEvent) -> Piece:
        """The text that these events release; events after the end are ignored.

        A piece with "stop" may come before the engine's end: the caller then cancels the request.
        """
        pieces: list[Piece] = []
        for event in events:
            pieces.append(self._push(event))
            if pieces[-1].finish_reason is not None:
                break
        return pieces[0] if len(pieces) == 1 else joined(pieces)

    def _push(self, event: TokenEvent) -> Piece:
        decoded, num_tokens = "", 0
        if event.token_id is not None:
            num_tokens = 1
            decoded += self._stream.push(event.token_id)
        if event.finish_reason is not None:
            decoded += self._stream.finish()
        self.num_tokens += num_tokens
        text, reason = self._held_back + decoded, event.finish_reason
        cut = self._first_stop(text)
        if cut is not None:
            released, reason = cut, "stop"
            self._held_back = ""
        else:
            num_held = 0 if reason is not None else self._num_possible_stop(text)
            released = len(text) - num_held
            self._held_back = text[released:]
        scored = () if event.scored is None else (event.scored,)
        return Piece(text[:released], reason, num_tokens, scored, event.scored_prompt, decoded)

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
