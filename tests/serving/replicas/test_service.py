"""`fst serve --ray_address local --replicas 2`: one service, also when a replica is killed."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from full_stack_transformer.errors import ServiceUnavailableError
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.serving.client import ServiceClient, WantedContinuation
from full_stack_transformer.serving.schemas import GeneratedTextsRequest
from tests.logged_process import LoggedProcess
from tests.serving.processes import descendants
from tests.serving.tiny_model import make_tiny_model, one_core

pytest.importorskip("ray")

KEY = "a-key-of-the-replicas-0001"
_HEADERS = {"authorization": f"Bearer {KEY}"}
_LENGTH = 1500


@dataclass(frozen=True)
class Service:
    """The service, and where Ray writes its logs."""

    url: str
    model: Path
    process: LoggedProcess
    ray_directory: Path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two replicas behind a front; the last test ends it."""
    root = tmp_path_factory.mktemp("replicas")
    model = make_tiny_model(root, max_length=2048)
    # Unix sockets have short names.
    ray_directory = Path(tempfile.mkdtemp(prefix="fst-ray-", dir="/tmp"))
    command = (
        *(sys.executable, "-m", "full_stack_transformer", "serve", str(model), "--device", "cpu"),
        *("--ray_address", "local", "--replicas", "2", "--port", "0", "--shutdown_seconds", "2"),
    )
    environment = {
        **os.environ,
        "FST_API_KEYS": KEY,
        "RAY_TMPDIR": str(ray_directory),
    }
    process = LoggedProcess(command, "serving ", environment)
    try:
        found = re.search(r"http://[0-9.]+:[0-9]+", process.start())
        assert found is not None
        yield Service(found.group(), model, process, ray_directory)
    finally:
        children = descendants(process.pid)
        process.kill()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(ray_directory, ignore_errors=True)


def _run(work: Callable[[ServiceClient, httpx.AsyncClient], Awaitable[None]], url: str) -> None:
    async def run() -> None:
        async with (
            ServiceClient(url, api_key=KEY) as client,
            httpx.AsyncClient(base_url=url, headers=_HEADERS, timeout=60) as http,
        ):
            await work(client, http)

    asyncio.run(run())


def _stream(
    client: ServiceClient, text: str = "The", length: int = _LENGTH
) -> AsyncIterator[object]:
    wanted = WantedContinuation(
        model="tiny-model", prompt=text, max_tokens=length, temperature=1, seed=1
    )
    return client.stream_completion(wanted)


def _replicas(service: Service) -> list[int]:
    return descendants(service.process.pid, "ray::ServeReplica")


def test_texts_are_those_of_the_library(service: Service) -> None:
    with one_core():
        generator = TextGenerator.open(service.model, device="cpu")
    expected = generator.generate("The reader", max_new_tokens=20, seed=3, num_return_sequences=2)

    async def work(client: ServiceClient, http: httpx.AsyncClient) -> None:
        request = GeneratedTextsRequest(
            seed_text="The reader", generation_max_len=20, num_return_sequences=2, seed=3
        )
        assert await client.generate_texts(request) == expected
        body = {"model": "tiny-model", "prompt": "The reader", "max_tokens": 20, "seed": 3}
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        pieces = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
        assert "".join(pieces) == expected[0]
        assert len(pieces) > 3, "the pieces arrive as they are made"

    _run(work, service.url)


def test_a_front_keeps_the_promises_of_the_service(service: Service) -> None:
    with httpx.Client(base_url=service.url, timeout=30) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/").status_code == 200
        refused = http.get("/v1/models")
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        http.headers.update(_HEADERS)
        assert http.get("/v1/models/").json()["data"][0]["id"] == "tiny-model"
        assert http.get("/nothing").status_code == 404
        assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
        large = http.post("/v1/completions", content=b" " * 2_000_000)
        assert large.status_code == 413
        invalid = http.post("/v1/completions", json={"model": "tiny-model", "prompt": 1.5})
        assert invalid.status_code == 400
        packed = {"content-encoding": "gzip"}
        assert http.post("/v1/completions", content=b"{}", headers=packed).status_code == 415
        answer = http.get(
            "/version", headers={"x-request-id": "mine", "x-request-timeout-seconds": "0"}
        )
        assert answer.headers.get_list("x-request-id") == ["mine"]
        assert http.post("/v1/load_lora_adapter", json={}).status_code == 403


def test_metrics_name_their_replica(service: Service) -> None:
    with httpx.Client(base_url=service.url, headers=_HEADERS) as http:
        text = http.get("/metrics").text
    found = set(re.findall(r'^tgi_queue_size\{replica="(\w+)"\}', text, re.MULTILINE))
    assert len(found) == 2
    assert text.count("# HELP tgi_queue_size ") == 1
    assert "fst_front_http_requests_total" in text


def test_a_client_that_goes_away_ends_its_generation(service: Service) -> None:
    async def work(client: ServiceClient, http: httpx.AsyncClient) -> None:
        stream = _stream(client)
        await anext(aiter(stream))
        assert (await http.get("/ready")).json()["num_running"] == 1
        await stream.aclose()  # type: ignore[attr-defined]
        whole = asyncio.create_task(http.post("/v1/completions", json=_body()))
        await asyncio.sleep(0.3)
        whole.cancel()
        await _until_idle(http)

    _run(work, service.url)


def _body() -> dict[str, object]:
    return {"model": "tiny-model", "prompt": "The", "max_tokens": _LENGTH}


async def _until_idle(http: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + 10
    while (await http.get("/ready")).json()["num_running"]:
        assert time.monotonic() < deadline, "texts that nobody reads go on"
        await asyncio.sleep(0.05)


def test_only_requests_in_flight_feel_the_death_of_a_replica(service: Service) -> None:
    replicas = _replicas(service)
    assert len(replicas) == 2

    async def work(client: ServiceClient, http: httpx.AsyncClient) -> None:
        streams = [_stream(client, text) for text in ("The", "A", "Small", "One")]
        for stream in streams:
            await anext(aiter(stream))
        # Nothing of these has been sent yet.
        whole = [asyncio.create_task(http.post("/v1/completions", json=_body())) for _ in range(4)]
        await asyncio.sleep(0.2)
        os.kill(replicas[0], signal.SIGKILL)
        ends = await asyncio.gather(*map(_drain, streams), return_exceptions=True)
        broken = [end for end in ends if end is not None]
        assert 1 <= len(broken) <= 3
        for end in broken:
            assert isinstance(end, ServiceUnavailableError)
            assert "failed while it streamed" in str(end), "an error event, not a cut connection"
        answers = await asyncio.gather(*whole)
        assert [answer.status_code for answer in answers] == [200] * 4
        assert (await http.get("/ready")).status_code == 200
        for _ in range(4):
            await _drain(_stream(client, length=5))

    _run(work, service.url)


async def _drain(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


def test_the_replica_is_replaced(service: Service) -> None:
    deadline = time.monotonic() + 60
    with httpx.Client(base_url=service.url, headers=_HEADERS) as http:
        while http.get("/metrics").text.count("\ntgi_queue_size{") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_keys_are_not_in_the_logs_of_ray(service: Service) -> None:
    logs = [path for path in service.ray_directory.rglob("*") if path.is_file()]
    assert any("serve" in str(path) for path in logs)
    assert not [path for path in logs if KEY.encode() in path.read_bytes()]


def test_the_end_lets_streams_finish_or_says_why_not(service: Service) -> None:
    async def work(client: ServiceClient, http: httpx.AsyncClient) -> None:
        body = _body() | {"stream": True, "n": 24, "max_tokens": 2000}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            service.process.send_signal(signal.SIGTERM)
            *_, last = [line async for line in lines if line]
        assert "the service is stopping" in last or last == "data: [DONE]"

    _run(work, service.url)
    children = descendants(service.process.pid)
    assert service.process.wait() == 0
    assert "Traceback" not in service.process.log
    assert children
