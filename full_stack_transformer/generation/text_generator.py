"""Text in, text out: prompts to tokens, tokens to text, stop strings, words that must not appear.

    options + prompt --as_token_request--> engine --tokens--> Continuation --text-->

`Continuation` is the text side of one request, whoever runs the engine: `TextGenerator` here, in the
caller's thread, or the service's worker. Knows nothing of HTTP.
"""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

from full_stack_transformer.errors import ModelError, RequestError
from full_stack_transformer.generation.engine import Engine, FinishReason, TokenEvent, TokenRequest
from full_stack_transformer.generation.sampling import SamplingParameters
from full_stack_transformer.modelling.model_directory import OpenedModel, open_model
from full_stack_transformer.tokenization import DocumentTokenizer, TextStream

_MAX_RANDOM_SEED = 2**32


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to continue a text."""

    max_new_tokens: int = 64
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    ignored_words: tuple[str, ...] = ()
    """None of these ever appears, also not across token borders."""
    seed: int | None = None
    """The same seed gives the same text; none draws one."""
    over_length: Literal["refuse", "clip"] = "refuse"
    """clip: make fewer tokens where the context has less room."""


@dataclass(frozen=True)
class TextPiece:
    """A piece of a continuation, in the order of its tokens."""

    text: str
    finish_reason: FinishReason | None = None


def as_token_request(
    prompt: str, options: GenerationOptions, tokenizer: DocumentTokenizer, max_length: int
) -> TokenRequest:
    """The engine's view of a request.

    Raises:
        RequestError: the prompt alone fills the context.
    """
    prompt_ids = tokenizer.encode_prompt(prompt)
    room = max_length - len(prompt_ids)
    if room < 1:
        raise RequestError(
            f"the model's context is {max_length} tokens, but the prompt has {len(prompt_ids)}; shorten it"
        )
    max_new_tokens = options.max_new_tokens
    if options.over_length == "clip":
        max_new_tokens = min(max_new_tokens, room)
    words = options.ignored_words

    def forbids(token_ids: Sequence[int]) -> bool:
        # A word ends with its newest token, so the tail decides; 64 tokens spell any word allowed here.
        text = tokenizer.decode(token_ids[-64:])
        return any(word in text for word in words)

    return TokenRequest(
        prompt_ids=prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=options.sampling,
        seed=secrets.randbelow(_MAX_RANDOM_SEED) if options.seed is None else options.seed,
        stop_ids=frozenset({tokenizer.end_id, tokenizer.begin_id, tokenizer.pad_id}),
        forbids=forbids if words else None,
    )


class Continuation:
    """The text of one request as its tokens arrive; the pieces add up to the whole text."""

    def __init__(self, tokenizer: DocumentTokenizer, stop: Sequence[str] = ()) -> None:
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._stream = TextStream(tokenizer)
        self._stop = [text for text in stop if text]
        self._held_back = ""

    def push(self, event: TokenEvent) -> TextPiece:
        """The text that this event releases; `finish_reason` is set on the last piece.

        A piece with "stop" may come before the engine's end: the caller then cancels the request.
        """
        text = self._held_back
        if event.token_id is not None:
            self.num_tokens += 1
            text += self._stream.push(event.token_id)
        if event.finish_reason is not None:
            text += self._stream.finish()
        cut = self._first_stop(text)
        if cut is not None:
            self._held_back, self.finish_reason = "", "stop"
            return TextPiece(text[:cut], "stop")
        self.finish_reason = event.finish_reason
        num_held = 0 if event.finish_reason is not None else self._num_possible_stop(text)
        released = len(text) - num_held
        self._held_back = text[released:]
        return TextPiece(text[:released], event.finish_reason)

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


class TextGenerator:
    """Continues texts with a model, in the caller's thread.

    >>> generator = TextGenerator.open("data/experiments/nietzsche/0")
    >>> generator.generate("What is good?", num_return_sequences=2)
    """

    def __init__(self, model: OpenedModel, *, num_slots: int = 8) -> None:
        self.model = model
        self._engine = Engine(model.backbone, num_slots=num_slots)

    @classmethod
    def open(cls, path: str | Path, *, device: str = "auto") -> Self:
        """Open a model directory, an experiment directory or a .ckpt file."""
        return cls(open_model(Path(path), device=device))

    def generate(
        self,
        prompt: str,
        options: GenerationOptions = GenerationOptions(),
        *,
        num_return_sequences: int = 1,
    ) -> list[str]:
        """Independent continuations of `prompt`, without it; the second has the seed after the first's."""
        first_seed = secrets.randbelow(_MAX_RANDOM_SEED) if options.seed is None else options.seed
        requests = [
            replace(options, seed=first_seed + index) for index in range(num_return_sequences)
        ]
        texts = [""] * num_return_sequences
        for index, piece in self._run(prompt, requests):
            texts[index] += piece.text
        return [self.model.tokenizer.after_decoding(text) for text in texts]

    def stream(
        self,
        prompt: str,
        options: GenerationOptions = GenerationOptions(),
    ) -> Iterator[str]:
        """Pieces of one continuation of `prompt`, as they are made."""
        for _, piece in self._run(prompt, [options]):
            if piece.text:
                yield piece.text

    def _run(
        self, prompt: str, requests: Sequence[GenerationOptions]
    ) -> Iterator[tuple[int, TextPiece]]:
        """Pieces of all continuations, as they are made, with the number of their request."""
        tokenizer = self.model.tokenizer
        waiting = [
            (index, as_token_request(prompt, options, tokenizer, self._engine.max_length))
            for index, options in enumerate(requests)
        ]
        running: dict[int, tuple[int, Continuation]] = {}
        try:
            while waiting or running:
                while waiting and self._engine.num_free_slots:
                    index, request = waiting.pop(0)
                    key = self._engine.add(request)
                    running[key] = (index, Continuation(tokenizer, requests[index].stop))
                for event in self._engine.step():
                    index, continuation = running[event.request_id]
                    piece = continuation.push(event)
                    if piece.finish_reason == "error":
                        raise ModelError(
                            "the model computed NaN or infinite scores; its weights are broken"
                        )
                    if piece.finish_reason is not None:
                        self._engine.cancel(event.request_id)
                        del running[event.request_id]
                    yield index, piece
        finally:
            for key in running:  # the caller stopped listening
                self._engine.cancel(key)
