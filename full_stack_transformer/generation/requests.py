"""The text side of generation: a prompt or a chat to requests for the engine, and its tokens back to text.

    text, chat --template--> token ids --+
    given parameters --model's defaults--+--> TokenRequest --engine--> TokenEvent --Continuation--> Piece

Every way to a text goes through here: Python, the command line, the service, samples of a training. Knows
nothing of HTTP and of threads.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from full_stack_transformer.arguments.sampling import (
    MAX_SEED,
    SamplingKeywords,
    SamplingParameters,
    complete,
    named_by_model,
)
from full_stack_transformer.errors import ContextLengthError, FullStackTransformerError
from full_stack_transformer.generation.sampling import ScoredToken
from full_stack_transformer.generation.token_requests import (
    FinishReason,
    TokenEvent,
    TokenRequest,
)
from full_stack_transformer.modelling.model_directory import OpenedModel
from full_stack_transformer.tokenization.chat import PLAIN_TEMPLATE, ChatTemplate
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer, TextStream

MAX_RANDOM_SEED = 2**32


@dataclass(frozen=True)
class Conventions:
    """What a model's texts keep to: tokenizer, chat template, ends, default parameters."""

    tokenizer: DocumentTokenizer
    template: ChatTemplate
    defaults: SamplingParameters
    """For parameters that a request leaves out."""
    chat_defaults: SamplingParameters
    """The same for an answer in a chat."""
    end_ids: frozenset[int]
    """Tokens that end a text."""
    answer_end_ids: frozenset[int]
    """Tokens that end an answer in a chat, in addition."""

    @classmethod
    def of(cls, model: OpenedModel, template: ChatTemplate = PLAIN_TEMPLATE) -> Self:
        """Those of an opened model."""
        settings = model.backbone.generation_config
        return cls(
            tokenizer=model.tokenizer,
            template=template,
            defaults=named_by_model(settings),
            chat_defaults=named_by_model(settings, is_chat=not template.is_plain),
            end_ids=find_end_ids(model),
            answer_end_ids=template.stop_ids(model.tokenizer),
        )

    def strips_answers(self, *, continues: bool = False) -> bool:
        """Whether white space before an answer is left out: the plain template ends with a colon."""
        return self.template.is_plain and not continues

    def requests(
        self,
        prompt: str | Sequence[int],
        given: SamplingKeywords,
        *,
        max_length: int,
        num_sequences: int = 1,
        is_chat: bool = False,
        clips: bool = False,
        num_log_probabilities: int | None = None,
    ) -> list[TokenRequest]:
        """Requests for independent continuations of one prompt; each has the seed after the one before.

        Args:
            prompt: the beginning of a document, or token ids.
            given: the parameters that the caller gives.
            max_length: tokens of the context.
            num_sequences: number of continuations.
            is_chat: the prompt is a chat, what follows is an answer.
            clips: make fewer tokens where the context has less room for `max_new_tokens`; without it the
                engine refuses the request. The model's default is always clipped.
            num_log_probabilities: report the log-probability of each token and of this many alternatives.

        Raises:
            RequestError: the prompt alone fills the context, or a parameter is out of bounds.
        """
        prompt_ids = self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        room = max_length - len(prompt_ids)
        if room < 1:
            whose, them = ("messages have", "them") if is_chat else ("prompt has", "it")
            raise ContextLengthError(
                f"the model's context is {max_length} tokens, but the {whose} {len(prompt_ids)}; "
                f"shorten {them}"
            )
        sampling = complete(given, self.chat_defaults if is_chat else self.defaults)
        if clips or given.get("max_new_tokens") is None:
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        stop_ids = self.end_ids
        if is_chat:
            sampling = replace(sampling, stop=sampling.stop + self.template.stops)
            stop_ids |= self.answer_end_ids
        ignored = IgnoredWords(sampling.ignored_words, prompt_ids, self.tokenizer)
        request = TokenRequest(
            prompt_ids=prompt_ids,
            sampling=sampling,
            stop_ids=stop_ids,
            forbids=ignored.forbid if any(sampling.ignored_words) else None,
            num_log_probabilities=num_log_probabilities,
        )
        first = secrets.randbelow(MAX_RANDOM_SEED) if sampling.seed is None else sampling.seed
        return [
            replace(request, sampling=replace(sampling, seed=(first + index) % (MAX_SEED + 1)))
            for index in range(num_sequences)
        ]


def find_end_ids(model: OpenedModel) -> frozenset[int]:
    """Tokens that end a text: those of the tokenizer, and those of the model's generation_config.json."""
    tokenizer = model.tokenizer
    settings = model.backbone.generation_config
    named = settings.eos_token_id if settings is not None else None
    others: list[int | None] = named if isinstance(named, list) else [named]
    # transformers' defaults may name a token of another vocabulary.
    known = range(model.backbone.get_input_embeddings().num_embeddings)
    ours = {tokenizer.end_id, tokenizer.begin_id, tokenizer.pad_id}
    return frozenset(ours | {token for token in others if token is not None and token in known})


class IgnoredWords:
    """Says of the new tokens of a request whether the newest one completes an ignored word.

    A word may have begun in the prompt. Only the tokens that can be part of it are decoded.

    Args:
        words: none of these may appear.
        prompt_ids: what the new tokens continue.
        tokenizer: of the model.
    """

    def __init__(
        self, words: Sequence[str], prompt_ids: Sequence[int], tokenizer: DocumentTokenizer
    ) -> None:
        self._words = [word for word in words if word]
        self._tokenizer = tokenizer
        # A token that is seen spells a byte at least; one more, because decoders may treat the first one
        # in a special way.
        self._num_tokens = 1 + max((len(word.encode()) for word in self._words), default=0)
        self._before = self._end_of(prompt_ids)

    def forbid(self, new_ids: Sequence[int]) -> bool:
        """Whether the text of prompt and new tokens has an ignored word that ends in a new one."""
        newest = [token for token in new_ids if not self._tokenizer.leaves_out(token)]
        newest = newest[-self._num_tokens :]
        before = self._before[max(0, len(self._before) + len(newest) - self._num_tokens) :]
        text = self._tokenizer.decode([*before, *newest])
        num_before = len(self._tokenizer.decode(before))
        return any(text.find(word, max(0, num_before - len(word) + 1)) >= 0 for word in self._words)

    def _end_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, back to its newest control token."""
        end: list[int] = []
        for token_id in reversed(prompt_ids[-self._num_tokens :]):
            if self._tokenizer.leaves_out(token_id):
                break
            end.append(token_id)
        return end[::-1]


# ---------------------------------------------------------------------- tokens to text


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
