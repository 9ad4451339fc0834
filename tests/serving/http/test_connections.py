"""Connections that are late, malformed, too large or slow; each keeps to its deadline and hurts nobody."""

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from full_stack_transformer.serving.http.connections import protocol_with
from tests.hardening.raw import RawAnswer, ask_raw, connected, post
from tests.hardening.service import Service
from tests.logged_process import running_service


@pytest.fixture(scope="module")
def service(model_dir: Path) -> Iterator[Service]:
    """With JSON logs."""
    with running_service(model_dir, "--log_format", "json") as (url, process):
        yield Service(url, process)
        assert process.stop() == 0


def _ask(service: Service, *parts: bytes) -> tuple[int | None, str]:
    return _said(asyncio.run(ask_raw(service.address, parts)))


def _said(answer: RawAnswer) -> tuple[int | None, str]:
    """Status and message of an error."""
    assert not answer.was_reset
    assert answer.num_bytes < 1024
    return answer.status, json.loads(answer.body)["error"]["message"] if answer.body else ""


def _ask_late(*parts: bytes) -> RawAnswer:
    """What deadlines of a fraction of a second answer; nothing but the protocol is needed for them."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await request.body()
        await Response("done")(scope, receive, send)

    async def ask() -> RawAnswer:
        protocol = protocol_with(head_seconds=0.3, body_seconds=0.4, max_connections=8)
        config = uvicorn.Config(application, http=protocol, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            answer = await ask_raw(listener.getsockname(), parts)
            server.should_exit = True
            await serving
        return answer

    return asyncio.run(ask())


def test_a_late_head_is_told_so() -> None:
    status, message = _said(_ask_late(b"GET /health HTTP/1.1\r\nhost: "))
    assert (status, "head" in message) == (408, True)


def test_a_head_that_drips_is_late_too() -> None:
    parts = [b"GET /health HTTP/1.1\r\n", *([b"a"] * 100)]
    assert _said(_ask_late(*parts))[0] == 408


def test_a_late_body_is_told_so() -> None:
    status, message = _said(_ask_late(post("/v1/completions", {"prompt": "x"})[:-3]))
    assert (status, "body" in message) == (408, True)


def test_a_silent_connection_is_closed() -> None:
    answer = _ask_late(b"")
    assert (answer.status, answer.was_reset, answer.num_bytes) == (None, False, 0)


def test_a_large_body_is_refused_without_a_reset(service: Service) -> None:
    status, message = _ask(service, post("/v1/completions", b" " * 20_000_000))
    assert (status, "1,048,576 bytes" in message) == (413, True)


def test_a_large_head_is_refused(service: Service) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\na: " + b"b" * 100_000 + b"\r\n\r\n"
    assert _ask(service, head)[0] == 400


def test_requests_after_one_another_share_a_connection(service: Service) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    two = post("/v1/completions", body, close=False) + post("/v1/completions", body)

    async def ask() -> bytes:
        async with connected(service.address) as (reader, writer):
            writer.write(two)
            return await reader.read(-1)

    assert asyncio.run(ask()).count(b"HTTP/1.1 200") == 2


def test_logs_are_json_lines_without_texts(service: Service) -> None:
    secret = "the-text-of-a-user"
    headers = {"x-request-id": "log-1"}
    body = {"prompt": secret, "max_tokens": 3, "user": secret}
    assert (
        httpx.post(
            f"{service.url}/v1/completions", json=body, headers=headers, timeout=60
        ).status_code
        == 200
    )
    answer = httpx.post(f"{service.url}/v1/completions", json=body | {secret: 1}, timeout=60)
    assert (answer.status_code, answer.headers["x-ignored-fields"]) == (200, "(other)")
    httpx.get(f"{service.url}/{secret}", timeout=60)
    line = json.loads(service.process.wait_for_log('"log-1"'))
    assert line["route"] == "/v1/completions"
    assert (line["status"], line["new_tokens"], line["num_texts"]) == (200, 3, 1)
    assert line["prompt_tokens"] > 3
    assert 0 <= line["seconds_in_queue"] <= line["seconds_to_first_token"] <= line["seconds"]
    lines = [json.loads(line) for line in service.process.log.splitlines()]
    assert all({"time", "level", "message"} <= set(line) for line in lines)
    assert secret not in service.process.log
    [summary] = [line for line in lines if "url" in line]
    assert summary["url"] == service.url
    assert summary["models"][0]["model"] == "tiny-model"


def test_metrics_have_the_names_that_people_know(service: Service) -> None:
    before = service.metric("vllm:generation_tokens_total")
    body = {"prompt": "x", "max_tokens": 5, "min_tokens": 5}
    assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code == 200
    assert service.metric("vllm:generation_tokens_total") == before + 5
    assert service.metric("vllm:time_to_first_token_seconds_count") >= 1
    assert service.metric("vllm:inter_token_latency_seconds_count") >= 1
    assert service.metric("vllm:num_requests_running") == 0
    assert service.metric("vllm:num_requests_waiting") == 0
    assert service.metric("tgi_queue_size") == 0
    text = httpx.get(f"{service.url}/metrics", timeout=60).text
    assert 'fst_http_requests_total{route="/v1/completions",status="200"}' in text
