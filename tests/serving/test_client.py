"""The client turns every answer and every silence into our own errors."""

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest

from full_stack_transformer.errors import ServiceRefusedError, ServiceUnavailableError
from full_stack_transformer.serving.client import (
    ModelDescription,
    ServiceClient,
    Turn,
    WantedAnswer,
    WantedContinuation,
)
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
        (lambda _: httpx.Response(401), ServiceUnavailableError, "401: Unauthorized"),
        (
            lambda _: httpx.Response(200, json={"text": 1}),
            ServiceUnavailableError,
            "something else",
        ),
    ],
    ids=["away", "proxy", "full", "refused", "no-key", "foreign"],
)
def test_failures_are_our_own_errors(answer: Answer, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _ask(answer)


def _stream(*events: str, status: int = 200) -> list[str]:
    async def stream() -> list[str]:
        def answer(request: httpx.Request) -> httpx.Response:
            body = json.loads(request.content)
            assert body["stream"] is True
            # What nobody has chosen is left to the model; other servers may not know the second.
            assert not {"temperature", "top_k"} & body.keys()
            return httpx.Response(status, text="".join(f"{event}\n\n" for event in events))

        async with ServiceClient("http://service", httpx.MockTransport(answer)) as client:
            wanted = WantedContinuation(model="m", max_tokens=9, prompt="Hello", seed=1)
            return [piece.text async for piece in client.stream_completion(wanted)]

    return asyncio.run(stream())


def _event(text: str, finish_reason: str | None = None) -> str:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason, "more": "of a server"}
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}"


def test_a_stream_is_read_to_its_last_piece_and_comments_are_passed_over() -> None:
    events = (": ping", _event("a"), 'data: {"choices": []}', _event("b", "stop"), "data: [DONE]")
    assert _stream(*events) == ["a", "b"]


def test_line_separators_of_unicode_are_text_and_end_no_event() -> None:
    texts = ["\u2028", "a\x85b\u2029", "日本\x7f🙂"]
    assert _stream(*map(_event, texts), _event("", "stop")) == [*texts, ""]


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
            wanted = WantedAnswer(model="m", max_tokens=9, messages=(Turn("user", "Hello"),))
            return [piece.text async for piece in client.stream_chat(wanted)]

    assert asyncio.run(stream()) == ["", "Hi", ""]


def _described(routes: dict[str, httpx.Response]) -> list[ModelDescription]:
    """What the client tells, twice; the conversation that it may try is asked for once."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return routes.get(request.url.path, httpx.Response(404))

    async def describe() -> list[ModelDescription]:
        async with ServiceClient("http://service", httpx.MockTransport(answer)) as client:
            return [await client.describe_model() for _ in range(2)]

    found = asyncio.run(describe())
    assert asked.count("/v1/chat/completions") <= 1
    return found


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, False),
        ({"/v1/chat/completions": httpx.Response(400)}, False),
        ({"/v1/chat/completions": httpx.Response(200)}, True),
    ],
    ids=["no-route", "no-template", "template"],
)
def test_another_server_tells_by_a_try_whether_its_model_converses(
    more: dict[str, httpx.Response], expected: bool
) -> None:
    models = httpx.Response(200, json={"data": [{"id": "m"}]})
    theirs = httpx.Response(200, json={"version": "0.9"})  # vLLM's
    first, second = _described({"/v1/models": models, "/version": theirs, **more})
    assert first == second == ModelDescription("m", {}, expected, 128)


@pytest.mark.parametrize("told", [None, False, True])
def test_our_service_says_whether_its_model_converses(told: bool | None) -> None:
    version = {"package_version": "1", "model": "m", "description": {"step": 3}}
    facts = {} if told is None else {"models": [{"model": "m", "has_chat_template": told}]}
    routes = {
        "/v1/models": httpx.Response(200, json={"data": [{"id": "m"}]}),
        "/version": httpx.Response(200, json=version | facts),
    }
    assert _described(routes)[0] == ModelDescription("m", {"step": 3}, bool(told))
