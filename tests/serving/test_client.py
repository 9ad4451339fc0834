"""The client turns every answer and every silence into our own errors."""

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest

from full_stack_transformer.errors import ServiceRefusedError, ServiceUnavailableError
from full_stack_transformer.serving.client import ServiceClient
from full_stack_transformer.serving.schemas import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GeneratedTextsRequest,
)

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


def _stream(*events: str, status: int = 200) -> list[str]:
    async def stream() -> list[str]:
        def answer(request: httpx.Request) -> httpx.Response:
            body = json.loads(request.content)
            assert body["stream"] is True
            assert "top_k" not in body  # neutral: other servers may not know it
            assert body["temperature"] == 1.0
            return httpx.Response(status, text="".join(f"{event}\n\n" for event in events))

        async with ServiceClient("http://service", httpx.MockTransport(answer)) as client:
            request = CompletionRequest(model="m", prompt="Hello", seed=1)
            return [piece.text async for piece in client.stream_completion(request)]

    return asyncio.run(stream())


def _event(text: str, finish_reason: str | None = None) -> str:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason, "more": "of a server"}
    return f"data: {json.dumps({'choices': [choice]})}"


def test_a_stream_is_read_to_its_last_piece_and_comments_are_passed_over() -> None:
    events = (": ping", _event("a"), 'data: {"choices": []}', _event("b", "stop"), "data: [DONE]")
    assert _stream(*events) == ["a", "b"]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ((_event("a"),), "before its last piece"),
        ((_event("a"), 'data: {"error": {"message": "failed"}}'), "failed while it streamed"),
        (("data: <html>",), "something else"),
    ],
    ids=["broken", "error", "foreign"],
)
def test_a_stream_that_breaks_is_unavailable(events: tuple[str, ...], message: str) -> None:
    with pytest.raises(ServiceUnavailableError, match=message):
        _stream(*events)


def test_a_stream_may_be_refused() -> None:
    with pytest.raises(ServiceRefusedError, match="400"):
        _stream(status=400)


def test_a_conversation_is_streamed_and_the_key_is_sent() -> None:
    async def stream() -> list[str]:
        def answer(request: httpx.Request) -> httpx.Response:
            assert request.url.path == "/v1/chat/completions"
            assert request.headers["authorization"] == "Bearer key"
            deltas: list[dict[str, str]] = [{"role": "assistant"}, {"content": "Hi"}, {}]
            events = [
                {"choices": [{"delta": delta, "finish_reason": None if delta else "stop"}]}
                for delta in deltas
            ]
            return httpx.Response(200, text="".join(f"data: {json.dumps(e)}\n\n" for e in events))

        transport = httpx.MockTransport(answer)
        async with ServiceClient("http://service", transport, api_key="key") as client:
            messages = [ChatMessage(role="user", content="Hello")]
            request = ChatCompletionRequest(model="m", messages=messages)
            return [piece.text async for piece in client.stream_chat(request)]

    assert asyncio.run(stream()) == ["", "Hi", ""]
