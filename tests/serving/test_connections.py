"""Connections that are late, malformed, too large or slow; each keeps to its deadline and hurts nobody."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.hardening.raw import ask_raw, post
from tests.hardening.service import Service
from tests.logged_process import running_service


@pytest.fixture(scope="module")
def service(model_dir: Path) -> Iterator[Service]:
    """Deadlines of a fraction of a second, and JSON logs."""
    options = ("--header_timeout_seconds", "0.5", "--body_timeout_seconds", "0.7")
    with running_service(model_dir, *options, "--log_format", "json") as (url, process):
        yield Service(url, process)
        assert process.stop() == 0


def _ask(service: Service, *parts: bytes) -> tuple[int | None, str]:
    answer = asyncio.run(ask_raw(service.address, parts))
    assert not answer.was_reset
    assert answer.num_bytes < 1024
    return answer.status, json.loads(answer.body)["error"]["message"] if answer.body else ""


def test_a_late_head_is_told_so(service: Service) -> None:
    started = time.perf_counter()
    status, message = _ask(service, b"GET /health HTTP/1.1\r\nhost: ")
    assert (status, "head" in message) == (408, True)
    assert 0.4 < time.perf_counter() - started < 10


def test_a_head_that_drips_is_late_too(service: Service) -> None:
    parts = [b"GET /health HTTP/1.1\r\n", *([b"a"] * 100)]
    assert _ask(service, *parts)[0] == 408


def test_a_late_body_is_told_so(service: Service) -> None:
    status, message = _ask(service, post("/v1/completions", {"prompt": "x"})[:-3])
    assert (status, "body" in message) == (408, True)


def test_a_silent_connection_is_closed(service: Service) -> None:
    with socket.create_connection(service.address, timeout=30) as connection:
        assert connection.recv(1) == b""


def test_a_large_body_is_refused_without_a_reset(service: Service) -> None:
    status, message = _ask(service, post("/v1/completions", b" " * 20_000_000))
    assert (status, "1,048,576 bytes" in message) == (413, True)


def test_a_large_head_is_refused(service: Service) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"b" * 100_000 + b"\r\n\r\n"
    assert _ask(service, head)[0] == 400


def test_requests_after_one_another_share_a_connection(service: Service) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    two = post("/v1/completions", body, close=False) + post("/v1/completions", body)

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection(*service.address)
        writer.write(two)
        received = await reader.read(-1)
        writer.close()
        return received

    assert asyncio.run(ask()).count(b"HTTP/1.1 200") == 2


def test_logs_are_json_lines_without_texts(service: Service) -> None:
    secret = "the-text-of-a-user"
    headers = {"x-request-id": "log-1"}
    body = {"prompt": secret, "max_tokens": 3, "user": secret}
    assert (
        httpx.post(f"{service.url}/v1/completions", json=body, headers=headers).status_code == 200
    )
    assert httpx.post(f"{service.url}/v1/completions", json=body | {secret: 1}).status_code == 400
    httpx.get(f"{service.url}/{secret}")
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
    text = httpx.get(f"{service.url}/metrics").text
    assert 'fst_http_requests_total{route="/v1/completions",status="200"}' in text
