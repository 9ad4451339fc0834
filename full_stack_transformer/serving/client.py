"""The service seen from Python: one method per route, errors of our own tree.

Knows the schemas and HTTP; nothing of models. The Telegram bot stands on it.
"""

from types import TracebackType
from typing import Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from full_stack_transformer.errors import ServiceRefusedError, ServiceUnavailableError
from full_stack_transformer.serving.schemas import (
    ErrorResponse,
    GeneratedTextsRequest,
    GeneratedTextsResponse,
    Health,
    Version,
)

_Answer = TypeVar("_Answer", bound=BaseModel)

# A whole text may take minutes on a laptop; a connection should not.
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)


class ServiceClient:
    """Asynchronous client of one service; use it with `async with`."""

    def __init__(self, service_url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._http = httpx.AsyncClient(base_url=service_url, timeout=_TIMEOUT, transport=transport)

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


def _error_of(response: httpx.Response) -> ServiceUnavailableError | ServiceRefusedError:
    try:
        message = ErrorResponse.model_validate_json(response.content).error.message
    except ValidationError:
        message = response.reason_phrase
    text = f"the service answered {response.status_code}: {message}"
    if response.status_code == 429 or response.status_code >= 500:
        return ServiceUnavailableError(text)
    return ServiceRefusedError(text)
