"""A reply's texts from the service: the requests, their cutting to the context, the conversation.

Knows the service's routes and the replies of the database; nothing of Telegram.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from full_stack_transformer.errors import ServiceRefusedError, ServiceUnavailableError
from full_stack_transformer.serving.client import (
    ModelDescription,
    ServiceClient,
    Turn,
    WantedAnswer,
    WantedContinuation,
)
from full_stack_transformer.serving.schemas import MAX_SEED, MAX_TEXT_CHARACTERS
from full_stack_transformer.telegram.state.records import Reply

logger = logging.getLogger(__name__)

# Each cut takes off about a third: 200,000 characters shrink to 100 in 20.
_MAX_CUTS = 24
_MIN_LENGTH = 16
# Words by which servers name a prompt that is too long; there is no common code.
_TOO_LONG = ("context", "token", "length", "long", "large")
_KEPT_SHARE = 0.65
_CHARACTERS_PER_TOKEN = 4
# What our service takes; odd, because a conversation begins and ends with the user.
_MAX_TURNS = 999

Wanted = WantedContinuation | WantedAnswer


@dataclass
class Draft:
    """One variant while it is made."""

    text: str = ""
    finish: str = ""
    num_tokens: int = 0
    """Pieces of the stream, of which each holds a token or a few that belong together."""
    request: Wanted | None = None


class Writer:
    """Asks one service for texts."""

    def __init__(self, client: ServiceClient, model_for_commands: str | None = None) -> None:
        self._client = client
        self._described: ModelDescription | None = None
        self._model_for_commands = model_for_commands

    @property
    def prefers_chat(self) -> bool:
        """Whether the model is known to have a chat template."""
        return self._described is not None and self._described.has_chat_template

    @property
    def known_model(self) -> str | None:
        """The model's name, once the service has told it."""
        return self._described.model if self._described else None

    async def describe(self, *, anew: bool = False) -> ModelDescription:
        """The model that is served.

        Raises:
            ServiceUnavailableError: the service is away.
        """
        if self._described is None or anew:
            try:
                self._described = await self._client.describe_model()
            except (
                ServiceRefusedError
            ) as error:  # without /v1/models it is none of the servers we know
                raise ServiceUnavailableError(str(error)) from error
        return self._described

    async def write(
        self, reply: Reply, conversation: list[Reply], drafts: list[Draft], show: Callable[[], None]
    ) -> None:
        """Fill `drafts`, one for each variant, and `reply.model`; `show` is called when the first grew.

        Raises:
            ServiceUnavailableError: the service is away, overloaded or failing; all texts are void.
            ServiceRefusedError: the service will never make them.
        """
        described = await self.describe()
        reply.model = described.model
        reply.checkpoint = {
            name: described.checkpoint[name]
            for name in ("experiment", "step", "validation_loss")
            if name in described.checkpoint
        }
        if self._model_for_commands is not None:
            reply.checkpoint["path"] = self._model_for_commands
        try:
            async with asyncio.TaskGroup() as group:
                for index, draft in enumerate(drafts):
                    request = _request(reply, conversation, described.model, index)
                    grown = show if index == 0 else _nothing
                    group.create_task(self._fill(draft, request, grown))
        except ExceptionGroup as group_error:
            self._described = None
            error = group_error.exceptions[0]
            if isinstance(error, ServiceRefusedError):
                now_served = (await self.describe()).model
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
        raise ServiceRefusedError("the service refuses the text however short it is")

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


def _nothing() -> None:
    pass


def _request(reply: Reply, conversation: list[Reply], model: str, index: int) -> Wanted:
    settings = reply.settings
    sampling: dict[str, Any] = {
        "model": model,
        "max_tokens": settings.length,
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
        if earlier.texts and earlier.finish not in ("refused", "failed"):
            turns.append(Turn("user", earlier.prompt[-MAX_TEXT_CHARACTERS:]))
            turns.append(Turn("assistant", earlier.text[-MAX_TEXT_CHARACTERS:]))
    turns.append(Turn("user", reply.prompt[-MAX_TEXT_CHARACTERS:]))
    return WantedAnswer(messages=tuple(turns[-_MAX_TURNS:]), **sampling)


def _shortened(request: Wanted) -> Wanted | None:
    """The next shorter request; None where nothing is left to cut.

    The server's own count of tokens decides, by refusing: no tokenizer is needed here, and no server
    tells its context length in a common way. Whole turns go first, the oldest before the others; then
    the larger part of what is left, the beginning of the text or the room for new tokens.
    """
    length = request.max_tokens
    if isinstance(request, WantedAnswer):
        if len(request.messages) > 1:
            # A conversation begins with the user, so turns go in pairs.
            return replace(request, messages=request.messages[2:])
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
