"""A text of the model, asked for and read piece by piece.

    reply, conversation ──> request ──> service ──pieces──> drafts
                               └──too long: shorter──┘

Knows the service's routes; nothing of the database and of messages.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from full_stack_transformer.arguments.sampling import MAX_SEED
from full_stack_transformer.errors import ServiceRefusedError, ServiceUnavailableError
from full_stack_transformer.serving.client import (
    ModelDescription,
    ServiceClient,
    Turn,
    WantedAnswer,
    WantedContinuation,
)
from full_stack_transformer.serving.schemas import MAX_TEXT_CHARACTERS
from full_stack_transformer.telegram.sending.markdown import FAILURES
from full_stack_transformer.telegram.state.settings import Settings
from full_stack_transformer.telegram.state.store import Reply

# Each cut removes about a third: 200,000 characters shrink to 100 in 20 cuts.
_MAX_CUTS = 24
_MIN_LENGTH = 16
# New tokens of an answer for which earlier turns are forgotten; more are rather given up.
_LENGTH_BEFORE_TURNS = 1024
# Words by which servers name a prompt that is too long; there is no common code.
_TOO_LONG = ("context", "token", "length", "long", "large")
_KEPT_SHARE = 0.65
_CHARACTERS_PER_TOKEN = 4
# The limit of our service is 1,000; odd, because a conversation begins and ends with the user.
_MAX_TURNS = 999

Wanted = WantedContinuation | WantedAnswer


@dataclass
class Draft:
    """The text of one variant, as far as it is written."""

    text: str = ""
    finish: str = ""
    num_tokens: int = 0
    """Number of pieces of the stream; a piece is a token, or a few that form one character."""
    request: Wanted | None = None


class Writer:
    """Requests texts from one service.

    Args:
        client: of the service.
        model_path: what `/why` names as the model of `fst generate`, if the bot started the service.
        system_prompt: of conversations whose chat has none of its own.
    """

    def __init__(
        self,
        client: ServiceClient,
        model_path: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        self._client = client
        self._described: tuple[ModelDescription, ...] = ()
        self._model_path = model_path
        self._system_prompt = system_prompt

    @property
    def known_models(self) -> tuple[str, ...]:
        """Names of the models, if the service has answered."""
        return tuple(one.model for one in self._described)

    def prefers_chat(self, model: str | None = None) -> bool:
        """Whether a chosen model, or else the first, is known to have a chat template."""
        return bool(self._described) and self._chosen(model).has_chat_template

    def known_model(self, model: str | None = None) -> str | None:
        """The name of a chosen model, or else of the first, if the service has answered."""
        return self._chosen(model).model if self._described else None

    def system_prompt(self, settings: Settings) -> str | None:
        """What stands before a conversation."""
        return self._system_prompt if settings.system is None else settings.system

    async def describe(
        self, model: str | None = None, *, refresh: bool = False
    ) -> ModelDescription:
        """A model that is served: the one of this name if there is one, else the first.

        Raises:
            ServiceUnavailableError: the service is not available.
        """
        if not self._described or refresh:
            try:
                self._described = await self._client.describe_models()
            except ServiceRefusedError as error:  # no /v1/models: not an OpenAI-compatible server
                raise ServiceUnavailableError(str(error)) from error
        return self._chosen(model)

    def _chosen(self, model: str | None) -> ModelDescription:
        return next((one for one in self._described if one.model == model), self._described[0])

    async def write(
        self, reply: Reply, conversation: list[Reply], drafts: list[Draft], show: Callable[[], None]
    ) -> None:
        """Fill `drafts`, one for each variant, and `reply.model`; call `show` when the first one grew.

        Raises:
            ServiceUnavailableError: the service is away, overloaded or failing; all drafts are invalid.
            ServiceRefusedError: the service rejects the request, so retrying does not help.
        """
        described = await self.describe(reply.settings.model)
        system = self.system_prompt(reply.settings)
        reply.model = described.model
        reply.checkpoint = {
            name: described.checkpoint[name]
            for name in ("experiment", "step", "validation_loss")
            if name in described.checkpoint
        }
        if self._model_path is not None and described == self._described[0]:
            reply.checkpoint["path"] = self._model_path
        try:
            async with asyncio.TaskGroup() as group:
                for index, draft in enumerate(drafts):
                    request = _request(reply, conversation, described, index, system)
                    grown = show if index == 0 else _do_nothing
                    group.create_task(self._fill(draft, request, grown))
        except ExceptionGroup as group_error:
            self._described = ()
            error = group_error.exceptions[0]
            if isinstance(error, ServiceRefusedError):
                now_served = (await self.describe(described.model)).model
                if now_served != described.model:
                    raise ServiceUnavailableError("another model is served now") from error
            raise error from None

    async def _fill(self, draft: Draft, request: Wanted, grown: Callable[[], None]) -> None:
        for _ in range(_MAX_CUTS):
            draft.request = request
            try:
                await self._stream(draft, request, grown)
                return
            except ServiceRefusedError as error:
                shorter = _shortened(request)
                if shorter is None or not any(word in str(error).lower() for word in _TOO_LONG):
                    raise
                request = shorter
        raise ServiceRefusedError("the service rejects the text even when it is short")

    async def _stream(self, draft: Draft, request: Wanted, grown: Callable[[], None]) -> None:
        draft.text, draft.num_tokens = "", 0
        if isinstance(request, WantedAnswer):
            pieces = self._client.stream_chat(request)
        else:
            pieces = self._client.stream_completion(request)
        async for piece in pieces:
            if piece.text:
                draft.text += piece.text
                draft.num_tokens += 1
                grown()
            draft.finish = piece.finish_reason or ""


def _do_nothing() -> None:
    pass


def _request(
    reply: Reply,
    conversation: list[Reply],
    described: ModelDescription,
    index: int,
    system: str | None,
) -> Wanted:
    settings = reply.settings
    sampling: dict[str, Any] = {
        "model": described.model,
        "max_tokens": described.default_length if settings.length is None else settings.length,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "repetition_penalty": settings.repetition_penalty,
        "seed": (reply.seed + index) % (MAX_SEED + 1),
    }
    if reply.mode == "continue":
        return WantedContinuation(prompt=reply.prompt[-MAX_TEXT_CHARACTERS:], **sampling)
    turns = []
    for earlier in conversation:
        if earlier.texts and earlier.finish not in FAILURES:
            turns.append(Turn("user", earlier.prompt[-MAX_TEXT_CHARACTERS:]))
            turns.append(Turn("assistant", earlier.text[-MAX_TEXT_CHARACTERS:]))
    turns.append(Turn("user", reply.prompt[-MAX_TEXT_CHARACTERS:]))
    head = [Turn("system", system)] if system else []
    return WantedAnswer(messages=(*head, *turns[-_MAX_TURNS:]), **sampling)


def _shortened(request: Wanted) -> Wanted | None:
    """The next shorter request; None if it cannot be shortened.

    The server's own count of tokens decides, as it rejects what is too long: the bot needs no tokenizer,
    and servers do not report their context length in a common way. Thousands of new tokens become fewer
    first; then the oldest turns are removed; then the larger of two parts is cut, the beginning of the text
    or the number of new tokens.
    """
    length = request.max_tokens or 0  # 0: the service fits its default length into the context
    if isinstance(request, WantedAnswer):
        num_kept = int(request.messages[0].role == "system")
        head, turns = request.messages[:num_kept], request.messages[num_kept:]
        if length > _LENGTH_BEFORE_TURNS:
            return replace(request, max_tokens=max(_LENGTH_BEFORE_TURNS, length // 2))
        if len(turns) > 1:
            # A conversation begins with the user, so turns are removed in pairs.
            return replace(request, messages=head + turns[2:])
        if length <= _MIN_LENGTH:
            return None
        return replace(request, max_tokens=max(_MIN_LENGTH, length // 2))
    num_characters = len(request.prompt)
    if length > max(_MIN_LENGTH, num_characters // _CHARACTERS_PER_TOKEN):
        return replace(request, max_tokens=max(_MIN_LENGTH, length // 2))
    if num_characters <= 1:
        return None
    kept = request.prompt[num_characters - int(num_characters * _KEPT_SHARE) :]
    _, space, rest = kept.partition(" ")
    return replace(request, prompt=rest if space and len(rest) > len(kept) // 2 else kept)
