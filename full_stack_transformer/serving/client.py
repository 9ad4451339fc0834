"""The service seen from Python: one method per route, errors of our own tree.

Knows the schemas and HTTP; nothing of models. The Telegram bot stands on it, and streams from any
OpenAI-compatible server: what it asks for beyond OpenAI's fields is left out while it is neutral.
"""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from full_stack_transformer.errors import (
    ServiceError,
    ServiceRefusedError,
    ServiceUnavailableError,
)
from full_stack_transformer.serving.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    ErrorResponse,
    GeneratedTextsRequest,
    GeneratedTextsResponse,
    Health,
    Version,
)

_Answer = TypeVar("_Answer", bound=BaseModel)

# A whole text may take minutes on a laptop; a connection should not.
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
# Between two pieces of a stream; a request may wait in the queue before the first one.
_STREAM_TIMEOUT = httpx.Timeout(120.0, connect=5.0)
# More than any bot keeps open; httpx's 100 would make the others wait without a word.
_LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)


@dataclass(frozen=True)
class StreamedText:
    """A piece of a text that is being made; the last one has a finish reason."""

    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class ModelDescription:
    """What a server says of its model."""

    model: str
    checkpoint: dict[str, Any]
    """Our own service's description of the model directory; empty for other servers."""


class ServiceClient:
    """Asynchronous client of one service; use it with `async with`.

    Args:
        service_url: address of the service.
        transport: another way than the network, for tests.
        api_key: sent as a bearer token, for servers that want one.
    """

    def __init__(
        self,
        service_url: str,
        transport: httpx.AsyncBaseTransport | None = None,
        api_key: str | None = None,
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else None
        self._http = httpx.AsyncClient(
            base_url=service_url,
            timeout=_TIMEOUT,
            transport=transport,
            headers=headers,
            limits=_LIMITS,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def generate_texts(self, request: GeneratedTextsRequest) -> list[str]:
        """Continuations of `request.seed_text`, `request.num_return_sequences` of them.

        Raises:
            ServiceUnavailableError: the service is away, overloaded or failing.
            ServiceRefusedError: the service will never serve this request.
        """
        response = await self._call("POST", "/generated_texts/", GeneratedTextsResponse, request)
        return response.texts

    async def version(self) -> Version:
        """Which model the service serves."""
        return await self._call("GET", "/version", Version)

    async def health(self) -> Health:
        """Whether the service answers."""
        return await self._call("GET", "/health", Health)

    async def describe_model(self) -> ModelDescription:
        """The first model of `/v1/models`; with its checkpoint where the service is ours.

        Raises:
            ServiceUnavailableError: the server is away, or lists no model.
        """
        listed = await self._call("GET", "/v1/models", _Models)
        if not listed.data:
            raise ServiceUnavailableError(f"{self._http.base_url} lists no model at /v1/models")
        try:
            version = await self.version()
        except ServiceError:  # another OpenAI-compatible server
            return ModelDescription(listed.data[0].id, {})
        return ModelDescription(listed.data[0].id, version.description)

    async def stream_completion(
        self, request: CompletionRequest
    ) -> AsyncGenerator[StreamedText, None]:
        """Pieces of a continuation as they are made; leaving early frees the service's slot.

        Raises:
            ServiceUnavailableError: the service is away, overloaded, failing, or the stream broke off.
            ServiceRefusedError: the service will never serve this request.
        """
        async with aclosing(self._choices("/v1/completions", streamed_body(request))) as choices:
            async for choice in choices:
                yield StreamedText(choice.text or "", choice.finish_reason)

    async def stream_chat(
        self, request: ChatCompletionRequest
    ) -> AsyncGenerator[StreamedText, None]:
        """Pieces of the model's next turn; raises like `stream_completion`."""
        async with aclosing(
            self._choices("/v1/chat/completions", streamed_body(request))
        ) as choices:
            async for choice in choices:
                yield StreamedText(choice.delta.content or "", choice.finish_reason)

    async def _choices(self, path: str, body: dict[str, Any]) -> AsyncGenerator["_Choice", None]:
        """Choices of the events until one has a finish reason."""
        try:
            async with self._http.stream(
                "POST", path, json=body, timeout=_STREAM_TIMEOUT
            ) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise _error_of(response)
                async for line in response.aiter_lines():
                    for choice in _choices_of(line):
                        yield choice
                        if choice.finish_reason is not None:
                            return
        except httpx.HTTPError as error:
            raise ServiceUnavailableError(
                f"the service at {self._http.base_url} does not answer "
                f"({type(error).__name__}); is `fst serve` running there?"
            ) from error
        raise ServiceUnavailableError("the service ended a stream before its last piece")

    async def _call(
        self, method: str, path: str, answer: type[_Answer], body: BaseModel | None = None
    ) -> _Answer:
        content = None if body is None else body.model_dump_json(exclude_none=True)
        headers = {"content-type": "application/json"} if body is not None else None
        try:
            response = await self._http.request(method, path, content=content, headers=headers)
        except httpx.HTTPError as error:
            raise ServiceUnavailableError(
                f"the service at {self._http.base_url} does not answer "
                f"({type(error).__name__}); is `fst serve` running there?"
            ) from error
        if response.status_code >= 400:
            raise _error_of(response)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise ServiceUnavailableError(
                f"{self._http.base_url} answered {method} {path} with something else than "
                f"{answer.__name__}; is it really `fst serve`?"
            ) from error


def streamed_body(request: CompletionRequest | ChatCompletionRequest) -> dict[str, Any]:
    """What is sent: OpenAI's own fields always, the additions only where they change something.

    `temperature` and `top_p` are never left to the server: vLLM takes its defaults for them from the
    model's generation_config.json.
    """
    body = request.model_dump(exclude_none=True) | {"stream": True}
    for name, neutral in (("top_k", 0), ("repetition_penalty", 1.0), ("n", 1), ("echo", False)):
        if body.get(name) == neutral:
            del body[name]
    return body


class _Delta(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    """A choice of either route; servers add fields of their own, which are passed over."""

    text: str | None = None
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Event(BaseModel):
    choices: list[_Choice]


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


def _choices_of(line: str) -> list[_Choice]:
    """The choices in one line of server-sent events; other lines have none."""
    field, _, value = line.partition(":")
    if field != "data" or value.strip() == "[DONE]":
        return []
    try:
        return _Event.model_validate_json(value).choices
    except ValidationError as error:
        with_error = "error" in _as_object(value)
        raise ServiceUnavailableError(
            "the service failed while it streamed"
            if with_error
            else "the service streams something else than completions"
        ) from error


def _as_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _error_of(response: httpx.Response) -> ServiceUnavailableError | ServiceRefusedError:
    try:
        message = ErrorResponse.model_validate_json(response.content).error.message
    except ValidationError:
        message = response.reason_phrase
    text = f"the service answered {response.status_code}: {message}"
    if response.status_code == 429 or response.status_code >= 500:
        return ServiceUnavailableError(text)
    return ServiceRefusedError(text)
