"""The client turns every answer and every silence into our own errors."""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from full_stack_transformer.errors import ServiceRefusedError, ServiceUnavailableError
from full_stack_transformer.serving.client import ServiceClient
from full_stack_transformer.serving.schemas import GeneratedTextsRequest

Answer = Callable[[httpx.Request], httpx.Response]


def _ask(answer: Answer) -> list[str]:
    async def ask() -> list[str]:
        transport = httpx.MockTransport(answer)
        async with ServiceClient("http://service", transport) as client:
            return await client.generate_texts(GeneratedTextsRequest(seed_text="Hello"))

    return asyncio.run(ask())


def test_texts_come_back() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url == "http://service/generated_texts/"
        assert GeneratedTextsRequest.model_validate_json(request.content).seed_text == "Hello"
        return httpx.Response(200, json={"texts": ["world"]})

    assert _ask(answer) == ["world"]


def _refuse_connection(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (_refuse_connection, ServiceUnavailableError, "does not answer"),
        (lambda _: httpx.Response(502, html="<b>"), ServiceUnavailableError, "502: Bad Gateway"),
        (
            lambda _: httpx.Response(429, json={"error": {"message": "full", "type": "x"}}),
            ServiceUnavailableError,
            "429: full",
        ),
        (
            lambda _: httpx.Response(400, json={"error": {"message": "too long", "type": "x"}}),
            ServiceRefusedError,
            "400: too long",
        ),
        (
            lambda _: httpx.Response(200, json={"text": 1}),
            ServiceUnavailableError,
            "something else",
        ),
    ],
    ids=["away", "proxy", "full", "refused", "foreign"],
)
def test_failures_are_our_own_errors(answer: Answer, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _ask(answer)
