"""Text in, text out, with a model in the caller's thread: generate, stream, chat, score, embed.

    prompt, parameters --Conventions--> TokenRequest --engine--> tokens --Continuation--> text

Knows nothing of HTTP.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, Unpack

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from full_stack_transformer.arguments.sampling import SamplingKeywords, SamplingParameters
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.open_draft import DraftSource, open_draft
from full_stack_transformer.generation.open_engine import blocks_for, open_engine
from full_stack_transformer.generation.requests import Continuation, Conventions, Piece
from full_stack_transformer.generation.runners.native.decoder import KvDtype, WeightsDtype
from full_stack_transformer.generation.runners.torch import TorchRunner
from full_stack_transformer.generation.sampling import ScoredToken
from full_stack_transformer.generation.token_requests import TokenEvent, TokenRequest
from full_stack_transformer.modelling.backbones import context_length
from full_stack_transformer.modelling.model_directory import OpenedModel, open_model
from full_stack_transformer.modelling.places import find_model
from full_stack_transformer.own_classes import trust
from full_stack_transformer.tokenization.chat import (
    PLAIN_TEMPLATE,
    ChatMessage,
    ChatTemplate,
    load_chat_template,
)
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer, TextStream


@dataclass(frozen=True)
class Alternative:
    """One of the most likely tokens in a place."""

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
    """The most likely tokens in its place."""


@dataclass(frozen=True)
class ScoredText:
    """How probable a text is as the beginning of a document."""

    tokens: tuple[TextToken, ...]
    """All that the model predicts; with `start` before them their texts add up to the text."""
    start: str = ""
    """The text of the first token, where the model's tokenizer puts no begin token before it."""

    @property
    def log_likelihood(self) -> float:
        """Natural logarithm of the text's probability."""
        return math.fsum(token.log_probability for token in self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean surprise of a token; 1 for an empty text."""
        return math.exp(-self.log_likelihood / max(1, len(self.tokens)))


def as_text_token(scored: ScoredToken, text: str, tokenizer: DocumentTokenizer) -> TextToken:
    """A scored token with its text, and with those of its alternatives."""

    def shown(token_id: int) -> str:  # the token alone; a control token by its name
        return tokenizer.decode([token_id]) or tokenizer.backend.id_to_token(token_id) or ""

    return TextToken(
        scored.token_id,
        text,
        scored.log_probability,
        tuple(
            Alternative(token_id, shown(token_id), log_probability)
            for token_id, log_probability in scored.alternatives
        ),
    )


def _engine_as_is(model: OpenedModel, num_slots: int) -> Engine:
    """An engine on the model's own weights, through PyTorch."""
    num_blocks = num_slots * blocks_for(context_length(model.backbone.config))
    runner = TorchRunner(model.backbone, num_blocks=num_blocks)
    # Guesses would change the last bits of scores there.
    return Engine(runner, num_slots=num_slots, guesses=False)


class TextGenerator:
    """Continues texts with a model, in the caller's thread; one thread at a time.

    >>> generator = TextGenerator.open("data/experiments/nietzsche/0")
    >>> generator.generate("What is good?", max_new_tokens=40, temperature=0.7, seed=1)
    >>> generator.score("Man is something that shall be overcome.").perplexity

    The keywords are those of `SamplingParameters`; what is left out the model's generation_config.json
    decides.

    Args:
        model: what computes and its tokenizer.
        num_slots: texts that are generated at once.
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
        self._conventions = Conventions.of(model, template)
        self._engine = engine or _engine_as_is(model, num_slots)
        # Of requests under way whose events nobody has read yet: several streams may share the engine.
        self._inboxes: dict[int, list[TokenEvent]] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        base: str | None = None,
        device: str = "auto",
        weights_dtype: Literal["auto"] | WeightsDtype = "auto",
        kv_dtype: Literal["auto"] | KvDtype = "auto",
        num_slots: int = 8,
        draft: DraftSource | None = None,
        allow_code_from: Sequence[str] = (),
    ) -> Self:
        """Open a model directory, an experiment directory, a .ckpt file or an adapter directory.

        Args:
            path: where the model is.
            base: of an adapter, if it is not the one that it names.
            device: where to compute.
            weights_dtype: type of the weights.
            kv_dtype: type of keys and values.
            num_slots: texts that are generated at once.
            draft: a model that guesses what comes next; the texts are the same.
            allow_code_from: modules whose tokenizer class the model may name; no other is imported.

        Raises:
            ModelError: there is no model, or its weights cannot be had in that type here.
            InputError: it names a class of another module.
            MachineError: memory is short.
        """
        trust(allow_code_from)
        model = open_model(Path(path), base=base, device=device, weights_dtype=weights_dtype)
        engine = open_engine(
            model.backbone,
            num_slots=num_slots,
            weights_dtype=weights_dtype,
            kv_dtype=kv_dtype,
            draft=None if draft is None else open_draft(draft, model, Path(path), device=device),
        )
        template = load_chat_template(find_model(Path(path), base).tokenizer)
        return cls(model, engine=engine, template=template)

    # ------------------------------------------------------------------ continue

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        num_return_sequences: int = 1,
        clips: bool = False,
        **given: Unpack[SamplingKeywords],
    ) -> list[str]:
        """Independent continuations of `prompt`, without it; the second has the seed after the first's."""
        texts = [""] * num_return_sequences
        for index, piece in self.pieces(
            prompt, num_return_sequences=num_return_sequences, clips=clips, **given
        ):
            texts[index] += piece.text
        return [self.model.tokenizer.after_decoding(text) for text in texts]

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        clips: bool = False,
        **given: Unpack[SamplingKeywords],
    ) -> Iterator[str]:
        """Pieces of one continuation of `prompt`, as they are generated."""
        for _, piece in self.pieces(prompt, clips=clips, **given):
            if piece.text:
                yield piece.text

    def pieces(
        self,
        prompt: str | Sequence[int],
        *,
        num_return_sequences: int = 1,
        num_log_probabilities: int | None = None,
        clips: bool = False,
        is_chat: bool = False,
        **given: Unpack[SamplingKeywords],
    ) -> Iterator[tuple[int, Piece]]:
        """Pieces of all continuations, as they are generated, with the index of their continuation.

        Args: as `Conventions.requests`.

        Raises:
            RequestError: it does not fit into the context.
            ModelError: the model failed, or computed scores that are NaN or infinite.
        """
        requests = self._conventions.requests(
            prompt,
            given,
            max_length=self._engine.max_length,
            num_sequences=num_return_sequences,
            is_chat=is_chat,
            clips=clips,
            num_log_probabilities=num_log_probabilities,
        )
        waiting = list(enumerate(requests))
        running: dict[int, tuple[int, Continuation]] = {}
        try:
            while waiting or running:
                while waiting and self._engine.num_free_slots:
                    index, request = waiting.pop(0)
                    continuation = Continuation(self.model.tokenizer, request.sampling.stop)
                    running[self._start(request)] = (index, continuation)
                if not any(self._inboxes[key] for key in running):
                    self._step()
                for key, (index, continuation) in list(running.items()):
                    for event in self._take_events(key):
                        piece = continuation.push(event)
                        if piece.finish_reason is not None:
                            self._end(key)
                            del running[key]
                        if piece.finish_reason == "error":
                            assert event.problem is not None
                            raise event.problem
                        yield index, piece
                        if piece.finish_reason is not None:
                            break  # what came after a stop string is not wanted
        finally:
            for key in running:  # the caller stopped listening
                self._end(key)

    # ------------------------------------------------------------------ chat

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        clips: bool = False,
        **given: Unpack[SamplingKeywords],
    ) -> str:
        """The answer to the last message."""
        return "".join(self.stream_chat(messages, clips=clips, **given))

    def stream_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        clips: bool = False,
        **given: Unpack[SamplingKeywords],
    ) -> Iterator[str]:
        """Pieces of the answer to the last message, as they are generated.

        Raises:
            RequestError: the template refuses the messages, or they do not fit into the context.
        """
        prompt_ids = self.template.encode(messages, self.model.tokenizer)
        strips = self._conventions.strips_answers()
        for _, piece in self.pieces(prompt_ids, is_chat=True, clips=clips, **given):
            text = piece.text.lstrip() if strips else piece.text
            strips = strips and not text
            if text:
                yield text

    # ------------------------------------------------------------------ measure

    def score(self, text: str, *, num_alternatives: int = 0) -> ScoredText:
        """How probable `text` is as the beginning of a document, token by token.

        Raises:
            RequestError: the text does not fit into the context.
            ModelError: the model failed, or computed scores that are NaN or infinite.
        """
        tokenizer = self.model.tokenizer
        prompt_ids = tokenizer.encode_prompt(text)
        key = self._start_when_free(
            TokenRequest(
                prompt_ids=prompt_ids,
                sampling=SamplingParameters(max_new_tokens=0, temperature=0, seed=0),
                num_prompt_log_probabilities=num_alternatives,
            )
        )
        event = self._only_event(key)
        stream = TextStream(tokenizer)
        texts = [stream.push(token_id) for token_id in prompt_ids]
        texts[-1] += stream.finish()
        num_given = max(1, len(tokenizer.prefix_ids))
        scored_tokens = event.scored_prompt[num_given - 1 :]
        return ScoredText(
            tuple(
                as_text_token(scored, text, tokenizer)
                for scored, text in zip(scored_tokens, texts[num_given:], strict=True)
            ),
            start="" if tokenizer.prefix_ids else texts[0],
        )

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """A vector for each text (texts, hidden): what the last norm gives, mean over the text's tokens.

        What stands before all texts, such as a begin token, counts in an empty one only.

        Raises:
            RequestError: a text does not fit into the context.
        """
        sequences = [self.model.tokenizer.encode_prompt(text) for text in texts]
        keys: list[int] = []
        states: list[Tensor] = []
        try:
            for sequence in sequences:
                keys.append(self._start_when_free(TokenRequest.for_hidden_states(sequence)))
            for key in keys:
                found = self._only_event(key).hidden_states
                assert found is not None
                states.append(found)
        finally:
            for key in keys:
                self._end(key)
        num_given = len(self.model.tokenizer.prefix_ids)
        words = [state[num_given:] if len(state) > num_given else state for state in states]
        means = [state.mean(dim=0).cpu().numpy() for state in words]
        width: int = self.model.backbone.config.hidden_size
        return np.stack(means) if means else np.zeros((0, width), np.float32)

    # ------------------------------------------------------------------ the engine

    def _only_event(self, key: int) -> TokenEvent:
        """The end of a request that makes no tokens.

        Raises:
            FullStackTransformerError: it failed.
        """
        try:
            while not (events := self._take_events(key)):
                self._step()
        finally:
            self._end(key)
        [event] = events
        if event.problem is not None:
            raise event.problem
        return event

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
