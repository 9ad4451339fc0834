"""Text in, text out, with a model in the caller's thread: generate, stream, chat, score, embed.

    options + prompt --as_token_request--> engine --tokens--> Continuation --text-->

Knows nothing of HTTP.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.errors import ModelError, RequestError
from full_stack_transformer.generation.chat import (
    PLAIN_TEMPLATE,
    ChatMessage,
    ChatTemplate,
    load_chat_template,
)
from full_stack_transformer.generation.continuation import (
    Continuation,
    TextPiece,
    TextToken,
    as_text_token,
)
from full_stack_transformer.generation.engine import Engine, TokenEvent, TokenRequest
from full_stack_transformer.generation.ignored_words import IgnoredWords
from full_stack_transformer.generation.open_engine import open_engine
from full_stack_transformer.generation.runners.native.decoder import WeightsDtype
from full_stack_transformer.generation.runners.torch import TorchRunner
from full_stack_transformer.generation.sampling import SamplingParameters
from full_stack_transformer.modelling.model_directory import (
    OpenedModel,
    find_model_directory,
    open_model,
)
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer, TextStream

_MAX_RANDOM_SEED = 2**32
_GREEDY = SamplingParameters(temperature=0)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to continue a text."""

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    """No end token is drawn before so many tokens; a stop string may still end the text."""
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    stop_ids: frozenset[int] = frozenset()
    """The text ends before the first of these tokens, beside those that the model ends with."""
    ignored_words: tuple[str, ...] = ()
    """None of these ever appears, also not across token borders."""
    num_log_probabilities: int | None = None
    """Give each token's log-probability and so many alternatives; none for neither."""
    seed: int | None = None
    """The same seed gives the same text; none draws one."""
    over_length: Literal["refuse", "clip"] = "refuse"
    """clip: make fewer tokens where the context has less room."""


@dataclass(frozen=True)
class ScoredText:
    """How probable a text is as the beginning of a document."""

    tokens: tuple[TextToken, ...]
    """All of them; their texts add up to the text."""

    @property
    def log_likelihood(self) -> float:
        """Natural logarithm of the text's probability."""
        return math.fsum(token.log_probability for token in self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean surprise of a token; 1 for an empty text."""
        return math.exp(-self.log_likelihood / max(1, len(self.tokens)))


def as_token_request(
    prompt: str | Sequence[int],
    options: GenerationOptions,
    tokenizer: DocumentTokenizer,
    *,
    end_ids: frozenset[int],
    max_length: int,
) -> TokenRequest:
    """The engine's view of a request.

    Args:
        prompt: the beginning of a document, or token ids.
        options: how to continue it.
        tokenizer: of the model.
        end_ids: of the model; see `find_end_ids`.
        max_length: tokens of the context.

    Raises:
        RequestError: the prompt alone fills the context.
    """
    prompt_ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    room = max_length - len(prompt_ids)
    if room < 1:
        raise RequestError(
            f"the model's context is {max_length} tokens, but the prompt has {len(prompt_ids)}; shorten it"
        )
    max_new_tokens = options.max_new_tokens
    if options.over_length == "clip":
        max_new_tokens = min(max_new_tokens, room)
    ignored = IgnoredWords(options.ignored_words, prompt_ids, tokenizer)
    return TokenRequest(
        prompt_ids=prompt_ids,
        max_new_tokens=max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        sampling=options.sampling,
        seed=secrets.randbelow(_MAX_RANDOM_SEED) if options.seed is None else options.seed,
        stop_ids=options.stop_ids | end_ids,
        forbids=ignored.forbid if any(options.ignored_words) else None,
        num_log_probabilities=options.num_log_probabilities,
    )


def find_end_ids(model: OpenedModel) -> frozenset[int]:
    """Tokens that end a text: those of the tokenizer, and what the model's own settings name."""
    tokenizer = model.tokenizer
    settings = model.backbone.generation_config
    named = settings.eos_token_id if settings is not None else None
    others: list[int | None] = named if isinstance(named, list) else [named]
    # transformers' defaults may name a token of another vocabulary.
    known = range(model.backbone.get_input_embeddings().num_embeddings)
    ours = {tokenizer.end_id, tokenizer.begin_id, tokenizer.pad_id}
    return frozenset(ours | {one for one in others if one is not None and one in known})


class TextGenerator:
    """Continues texts with a model, in the caller's thread; one thread at a time.

    >>> generator = TextGenerator.open("data/experiments/nietzsche/0")
    >>> generator.generate("What is good?", num_return_sequences=2)
    >>> generator.score("Man is something that shall be overcome.").perplexity

    Args:
        model: what computes and its tokenizer.
        num_slots: texts that are made at once.
        engine: none for one on the model as it is now, through PyTorch; its weights must not change while
            the generator is used.
        template: how a chat becomes tokens.
    """

    def __init__(
        self,
        model: OpenedModel,
        *,
        num_slots: int = 8,
        engine: Engine | None = None,
        template: ChatTemplate = PLAIN_TEMPLATE,
    ) -> None:
        self.model = model
        self.template = template
        self._end_ids = find_end_ids(model)
        self._engine = engine or Engine(TorchRunner(model.backbone, num_slots=num_slots))
        # Of requests under way whose events nobody has read yet: several streams may share the engine.
        self._inboxes: dict[int, list[TokenEvent]] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        weights_dtype: Literal["auto"] | WeightsDtype = "auto",
        num_slots: int = 8,
    ) -> Self:
        """Open a model directory, an experiment directory or a .ckpt file.

        Raises:
            ModelError: there is no model, or its weights cannot be had in that type here.
            MachineError: memory is short.
        """
        model = open_model(Path(path), device=device)
        engine = open_engine(model.backbone, num_slots=num_slots, weights_dtype=weights_dtype)
        template = load_chat_template(find_model_directory(Path(path)))
        return cls(model, engine=engine, template=template)

    # ------------------------------------------------------------------ continue

    def generate(
        self,
        prompt: str,
        options: GenerationOptions = GenerationOptions(),
        *,
        num_return_sequences: int = 1,
    ) -> list[str]:
        """Independent continuations of `prompt`, without it; the second has the seed after the first's."""
        texts = [""] * num_return_sequences
        for index, piece in self.pieces(prompt, options, num_return_sequences=num_return_sequences):
            texts[index] += piece.text
        return [self.model.tokenizer.after_decoding(text) for text in texts]

    def stream(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions = GenerationOptions(),
    ) -> Iterator[str]:
        """Pieces of one continuation of `prompt`, as they are made."""
        for _, piece in self.pieces(prompt, options):
            if piece.text:
                yield piece.text

    def pieces(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions = GenerationOptions(),
        *,
        num_return_sequences: int = 1,
    ) -> Iterator[tuple[int, TextPiece]]:
        """Pieces of all continuations, as they are made, with the number of their continuation.

        Raises:
            RequestError: it does not fit into the context.
            ModelError: the model computed scores that are no numbers.
        """
        first_seed = secrets.randbelow(_MAX_RANDOM_SEED) if options.seed is None else options.seed
        waiting = [
            (
                index,
                as_token_request(
                    prompt,
                    replace(options, seed=first_seed + index),
                    self.model.tokenizer,
                    end_ids=self._end_ids,
                    max_length=self._engine.max_length,
                ),
            )
            for index in range(num_return_sequences)
        ]
        running: dict[int, tuple[int, Continuation]] = {}
        try:
            while waiting or running:
                while waiting and self._engine.num_free_slots:
                    index, request = waiting.pop(0)
                    continuation = Continuation(self.model.tokenizer, options.stop)
                    running[self._start(request)] = (index, continuation)
                if not any(self._inboxes[key] for key in running):
                    self._step()
                for key, (index, continuation) in list(running.items()):
                    for event in self._take_events(key):
                        piece = continuation.push(event)
                        if piece.finish_reason is not None:
                            self._end(key)
                            del running[key]
                        yield index, _checked(piece)
                        if piece.finish_reason is not None:
                            break  # what came after a stop string is not wanted
        finally:
            for key in running:  # the caller stopped listening
                self._end(key)

    # ------------------------------------------------------------------ chat

    def chat(
        self, messages: Sequence[ChatMessage], options: GenerationOptions = GenerationOptions()
    ) -> str:
        """The answer to the last message."""
        return "".join(self.stream_chat(messages, options)).rstrip()

    def stream_chat(
        self, messages: Sequence[ChatMessage], options: GenerationOptions = GenerationOptions()
    ) -> Iterator[str]:
        """Pieces of the answer to the last message, as they are made.

        Raises:
            RequestError: the template refuses the messages, or they do not fit into the context.
        """
        tokenizer = self.model.tokenizer
        prompt_ids = self.template.encode(messages, tokenizer)
        options = replace(
            options,
            stop=options.stop + self.template.stops,
            stop_ids=options.stop_ids | self.template.stop_ids(tokenizer),
        )
        has_begun = False
        for text in self.stream(prompt_ids, options):
            shown = text if has_begun else text.lstrip()
            has_begun = has_begun or bool(shown)
            if shown:
                yield shown

    # ------------------------------------------------------------------ measure

    def score(self, text: str, *, num_alternatives: int = 0) -> ScoredText:
        """How probable `text` is as the beginning of a document, token by token.

        Raises:
            RequestError: the text does not fit into the context.
            ModelError: the model computed scores that are no numbers.
        """
        tokenizer = self.model.tokenizer
        prompt_ids = tokenizer.encode_prompt(text)
        key = self._start_when_free(
            TokenRequest(
                prompt_ids=prompt_ids,
                max_new_tokens=0,
                sampling=_GREEDY,
                seed=0,
                num_prompt_log_probabilities=num_alternatives,
            )
        )
        try:
            while not (events := self._take_events(key)):
                self._step()
        finally:
            self._end(key)
        [event] = events
        if event.finish_reason == "error":
            raise _broken_model()
        stream = TextStream(tokenizer)
        stream.push(prompt_ids[0])
        texts = [stream.push(token_id) for token_id in prompt_ids[1:]]
        if texts:
            texts[-1] += stream.finish()
        return ScoredText(
            tuple(
                as_text_token(scored, text, tokenizer)
                for scored, text in zip(event.scored_prompt, texts, strict=True)
            )
        )

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """A vector for each text (texts, hidden): what the last norm gives, mean over the text's tokens.

        The begin token, which is the same in all texts, counts in an empty one only.

        Raises:
            RequestError: a text does not fit into the context.
        """
        sequences = [self.model.tokenizer.encode_prompt(text) for text in texts]
        while not self._engine.num_free_slots:
            self._step()
        states = self._engine.hidden_states(sequences)
        means = [(one[1:] if len(one) > 1 else one).mean(dim=0).cpu().numpy() for one in states]
        width: int = self.model.backbone.config.hidden_size
        return np.stack(means) if means else np.zeros((0, width), np.float32)

    # ------------------------------------------------------------------ the engine

    def _start_when_free(self, request: TokenRequest) -> int:
        self._engine.check(request)
        while not self._engine.num_free_slots:
            self._step()
        return self._start(request)

    def _start(self, request: TokenRequest) -> int:
        key = self._engine.add(request)
        self._inboxes[key] = []
        return key

    def _step(self) -> None:
        """Let all requests go on, also those of other streams."""
        for event in self._engine.step():
            if event.request_id in self._inboxes:
                self._inboxes[event.request_id].append(event)

    def _take_events(self, key: int) -> list[TokenEvent]:
        events, self._inboxes[key] = self._inboxes[key], []
        return events

    def _end(self, key: int) -> None:
        self._engine.cancel(key)
        self._inboxes.pop(key, None)


def _checked(piece: TextPiece) -> TextPiece:
    if piece.finish_reason == "error":
        raise _broken_model()
    return piece


def _broken_model() -> ModelError:
    return ModelError("the model computed NaN or infinite scores; its weights are broken")
