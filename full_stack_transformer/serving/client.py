"""The service seen from Python: one method per route, errors of our own tree.

Knows the schemas and HTTP; nothing of models. The Telegram bot stands on it, and streams from any
OpenAI-compatible server.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.errors import (
    ServiceError,
    ServiceRefusedError,
    ServiceUnavailableError,
)
from full_stack_transformer.serving.schemas import (
    ErrorResponse,
    GeneratedTextsRequest,
    GeneratedTextsResponse,
    Health,
    Version,
)
from full_stack_transformer.tasks.catalogue import DEFAULT_TASK

_Answer = TypeVar("_Answer", bound=BaseModel)

# A whole text may take minutes on a laptop; a connection should not.
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
# Between two pieces of a stream; a request may wait in the queue before the first one.
_STREAM_TIMEOUT = httpx.Timeout(120.0, connect=5.0)
# A key that whoever runs the service has to mend, a deadline, a full queue: nothing in the request.
_NOT_NOW = (401, 403, 408, 429)
# More than any bot keeps open; httpx's 100 would make the others wait without a word.
_LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """How to generate a text, in OpenAI's words and two additions; None leaves it to the server."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def body(self) -> dict[str, Any]:
        """What is sent."""
        told = {name: value for name, value in asdict(self).items() if value is not None}
        # People read it in /why: what is asked for comes before how.
        return {
            name: told.pop(name) for name in ("model", "prompt", "messages") if name in told
        } | told


@dataclass(frozen=True, kw_only=True)
class WantedContinuation(_Wanted):
    """What `/v1/completions` is asked for."""

    prompt: str


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True)
class WantedAnswer(_Wanted):
    """What `/v1/chat/completions` is asked for."""

    messages: tuple[Turn, ...]


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
    has_chat_template: bool = False
    """Whether the model was made for conversation, as far as the server tells."""
    default_length: int | None = None
    """New tokens to ask for where a chat has not said how many; none where the server's own default is
    that of the model, as with our service."""


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
        self._conversing: dict[str, bool] = {}

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
        """The first model of `/v1/models`; raises like `describe_models`."""
        return (await self.describe_models())[0]

    async def describe_models(self) -> tuple[ModelDescription, ...]:
        """The models of `/v1/models`, at least one; with their checkpoints where the service is ours.

        Of another server only the first one is asked whether it converses: asking loads a model there.

        Raises:
            ServiceUnavailableError: the server is away, or lists no model.
        """
        listed = await self._call("GET", "/v1/models", _Models)
        if not listed.data:
            raise ServiceUnavailableError(f"{self._http.base_url} lists no model at /v1/models")
        names = [one.id for one in listed.data]
        try:
            version = await self._call("GET", "/version", _OurVersion)
        except ServiceError:  # another OpenAI-compatible server
            converses = await self._converses(names[0])
            length = SamplingParameters().max_new_tokens
            return tuple(ModelDescription(name, {}, converses, length) for name in names)
        return tuple(version.describe(name) for name in names if version.generates(name))

    async def _converses(self, model: str) -> bool:
        """Whether a server that is not ours takes a conversation; asked once, for a single token.

        vLLM and llama.cpp refuse one where the model has no chat template.
        """
        if model not in self._conversing:
            body = {
                "model": model,
                "max_tokens": 1,
                "messages": [{"role": "user", "content": "Hi"}],
            }
            try:
                response = await self._http.post("/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                raise self._away(error) from error
            if response.status_code in _NOT_NOW or response.status_code >= 500:
                raise _error_of(response)
            self._conversing[model] = response.status_code < 400
        return self._conversing[model]

    async def stream_completion(
        self, wanted: WantedContinuation
    ) -> AsyncGenerator[StreamedText, None]:
        """Pieces of a continuation as they are made; leaving early frees the service's slot.

        Raises:
            ServiceUnavailableError: the service is away, overloaded, failing, or the stream broke off.
            ServiceRefusedError: the service will never serve this request.
        """
        async with aclosing(self._choices("/v1/completions", wanted.body())) as choices:
            async for choice in choices:
                yield StreamedText(choice.text or "", choice.finish_reason)

    async def stream_chat(self, wanted: WantedAnswer) -> AsyncGenerator[StreamedText, None]:
        """Pieces of the model's next turn; raises like `stream_completion`."""
        async with aclosing(self._choices("/v1/chat/completions", wanted.body())) as choices:
            async for choice in choices:
                yield StreamedText(choice.delta.content or "", choice.finish_reason)

    async def _choices(self, path: str, body: dict[str, Any]) -> AsyncGenerator["_Choice", None]:
        """Choices of the events until one has a finish reason."""
        try:
            async with self._http.stream(
                "POST", path, json=body | {"stream": True}, timeout=_STREAM_TIMEOUT
            ) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise _error_of(response)
                async for line in _lines(response.aiter_bytes()):
                    for choice in _choices_of(line):
                        yield choice
                        if choice.finish_reason is not None:
                            return
        except httpx.HTTPError as error:
            raise self._away(error) from error
        raise ServiceUnavailableError("the service ended a stream before its last piece")

    def _away(self, error: httpx.HTTPError) -> ServiceUnavailableError:
        return ServiceUnavailableError(
            f"the service at {self._http.base_url} does not answer "
            f"({type(error).__name__}); is `fst serve` running there?"
        )

    async def _call(
        self, method: str, path: str, answer: type[_Answer], body: BaseModel | None = None
    ) -> _Answer:
        content = None if body is None else body.model_dump_json(exclude_none=True)
        headers = {"content-type": "application/json"} if body is not None else None
        try:
            response = await self._http.request(method, path, content=content, headers=headers)
        except httpx.HTTPError as error:
            raise self._away(error) from error
        if response.status_code >= 400:
            raise _error_of(response)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise ServiceUnavailableError(
                f"{self._http.base_url} answered {method} {path} with something else than "
                f"{answer.__name__}; is it really `fst serve`?"
            ) from error


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines of server-sent events.

    httpx's own `aiter_lines` also cuts at U+2028, U+0085 and their like, which JSON may hold as they
    are: a text with one of them would never arrive.
    """
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
    if rest:
        yield rest


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


class _Facts(BaseModel):
    model: str
    task: str = DEFAULT_TASK
    has_chat_template: bool = False
    description: dict[str, Any] | None = None


class _OurVersion(BaseModel):
    """What the bot needs of `/version`; other servers answer it in another way, or not at all."""

    package_version: str
    description: dict[str, Any]
    models: list[_Facts] = []

    def generates(self, model: str) -> bool:
        """Whether a model writes texts; the first one is taken at its word."""
        tasks = {facts.model: facts.task for facts in self.models[1:]}
        return tasks.get(model, DEFAULT_TASK) == DEFAULT_TASK

    def describe(self, model: str) -> ModelDescription:
        """One of the models; without facts of its own as the service describes the first."""
        facts = next((one for one in self.models if one.model == model), _Facts(model=model))
        description = self.description if facts.description is None else facts.description
        converses = facts.has_chat_template or bool(description.get("chat_template"))
        return ModelDescription(model, description, converses)


def _choices_of(line: bytes) -> list[_Choice]:
    """The choices in one line of server-sent events; other lines have none."""
    field, _, value = line.partition(b":")
    if field != b"data" or value.strip() == b"[DONE]":
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


def _as_object(text: bytes) -> dict[str, Any]:
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
    if response.status_code in _NOT_NOW or response.status_code >= 500:
        return ServiceUnavailableError(text)
    return ServiceRefusedError(text)
