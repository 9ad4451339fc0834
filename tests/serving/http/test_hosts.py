"""How a request names the service, its path and its body: hosts, targets, methods, lengths, encodings."""

import asyncio
import gzip
import json
import zlib
from typing import Any

import httpx
import pytest

from full_stack_transformer.serving.http.guard import AllowedHosts
from tests.conftest import RunFst
from tests.hardening.raw import RawAnswer, ask_raw, connected
from tests.serving.conftest import KEY, KeyedService

BODY = b'{"prompt": "x", "max_tokens": 1}'


def _ask(url: str | httpx.URL, *parts: bytes) -> RawAnswer:
    found = httpx.URL(url)
    assert found.port is not None
    return asyncio.run(ask_raw((found.host, found.port), parts))


def _get(target: str, host: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    lines = [f"{method} {target} HTTP/{version}", f"host: {host}", *headers, "connection: close"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        *(
            ("localhost", True),
            ("LOCALHOST:9228", True),
            ("localhost.", True),
            ("a.localhost", True),
        ),
        *(("127.0.0.1", True), ("127.0.0.1:80", True), ("127.8.9.1", True), ("[::1]:9228", True)),
        *(
            ("evil.example", False),
            ("localhost.evil.example", False),
            ("127.0.0.1.evil.example", False),
        ),
        *(
            ("", False),
            ("x", False),
            ("10.0.0.1", False),
            ("2130706433", False),
            ("0.0.0.0", False),
        ),
        *(("localhost@evil.example", False), ("evil.example:127", False), ("[::2]", False)),
        *(
            ("localhost evil.example", False),
            ("[localhost]", False),
            ("0x7f.1", False),
            (".", False),
        ),
        *(("notlocalhost", False), ("[::ffff:127.0.0.1]", True), ("localhost:1x", False)),
    ],
)
def test_a_service_on_this_machine_has_loopback_names(host: str, allowed: bool) -> None:
    assert AllowedHosts("127.0.0.1").allows(host) is allowed


def test_further_names_are_given() -> None:
    hosts = AllowedHosts(
        "192.168.1.5", ["Models.Example", "*.zoo.example"], ["https://page.example:8"]
    )
    for name in ("models.example:80", "a.zoo.example", "page.example", "192.168.1.5", "localhost"):
        assert hosts.allows(name), name
    for name in (
        "zoo.example",
        "a.models.example",
        "evilzoo.example",
        "192.168.1.6",
        "evil.example",
    ):
        assert not hosts.allows(name), name
    for everywhere in ("0.0.0.0", "::"):
        hosts = AllowedHosts(everywhere)
        assert hosts.allows("203.0.113.5:9228")
        assert hosts.allows("[2001:db8::1]:9228")
        assert not hosts.allows("evil.example")
    assert AllowedHosts("127.0.0.1", ["*"]).allows("evil.example")
    assert AllowedHosts("127.0.0.1", [], ["*"]).allows("evil.example")
    assert AllowedHosts("::1").allows("[0:0:0:0:0:0:0:1]")


def test_a_name_that_was_rebound_is_refused(
    keyed_service: KeyedService, strict_http: httpx.Client
) -> None:
    """A page of evil.example, whose name leads to this machine, is no page of this service."""
    for url in (keyed_service.url, strict_http.base_url):
        for target in ("/", "/health", "/v1/models", "/playground/main.js"):
            headers = ("origin: http://evil.example:9228", f"authorization: Bearer {KEY}")
            answer = _ask(url, _get(target, "evil.example:9228", *headers))
            assert answer.status == 403, target
            assert json.loads(answer.body)["error"]["code"] == "host_not_allowed"
            assert b"evil" not in answer.body
    for host in ("a.models.example", "203.0.113.9:80", "localhost"):
        assert _ask(strict_http.base_url, _get("/version", host)).status == 200
    # HTTP/1.0 may be without a name; no browser speaks it.
    assert _ask(keyed_service.url, b"GET /health HTTP/1.0\r\n\r\n").status == 200


def test_hosts_are_names(run_fst: RunFst) -> None:
    done = run_fst("serve", "nothing", "--allowed_hosts", "https://models.example")
    assert done.returncode == 2
    assert "--allowed_hosts must be a name without scheme and port" in done.stderr


def test_an_absolute_target_is_its_path(strict_http: httpx.Client) -> None:
    port = strict_http.base_url.port
    for target in (
        f"http://127.0.0.1:{port}/v1/models",
        "HTTP://localhost/v1/models?a=b",
        "http://localhost",
    ):
        # The target's host counts, whatever the header says.
        assert _ask(strict_http.base_url, _get(target, "evil.example")).status == 200, target
    head = _get(
        "http://localhost/v1/completions",
        "localhost",
        f"content-length: {len(BODY)}",
        method="POST",
    )
    assert _ask(strict_http.base_url, head + BODY).status == 200
    for target, status in {
        "http://evil.example/v1/models": 403,
        "http://localhost@evil.example/v1/models": 404,
        "ftp://localhost/v1/models": 404,
        "http:///v1/models": 404,
    }.items():
        assert _ask(strict_http.base_url, _get(target, "localhost")).status == status, target


def test_head_is_get_without_a_body(http: httpx.Client) -> None:
    for path in (
        "/v1/models",
        "/health",
        "/version",
        "/docs",
        "/openapi.json",
        "/",
        "/ready",
        "/v1/models/",
    ):
        whole, head = http.get(path), http.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == whole.headers["content-type"]
    assert http.head("/v1/completions").status_code == 405
    assert http.head("/nothing").status_code == 404


def test_a_slash_at_the_end_is_no_other_path(http: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/models/tiny-model", "/health", "/version", "/docs", "/metrics"):
        assert http.get(f"{path}/").status_code == http.get(path).status_code == 200, path
    for path in ("/v1/completions", "/generated_texts"):
        for spelled in (path, f"{path}/"):
            assert http.post(spelled, content=BODY.replace(b"prompt", b"user")).status_code == 200
    assert http.post("/v1/chat/completions/", content=b"{}").json()["error"]["param"] == "messages"
    for path in ("/v1/completions//", "/health//", "/v1/", "/v1"):
        assert http.get(path).status_code == 404, path


@pytest.mark.parametrize(
    "lengths",
    [
        ("content-length: 5", "transfer-encoding: chunked"),
        ("transfer-encoding: chunked", "content-length: 0"),
        ("Transfer-Encoding: Chunked", "Content-Length: 32"),
    ],
    ids=str,
)
def test_two_lengths_of_a_body_end_the_connection(
    strict_http: httpx.Client, lengths: tuple[str, ...]
) -> None:
    two = _get("/v1/completions", "localhost", *lengths, method="POST")
    two += b"0\r\n\r\n" + _get("/version", "localhost")

    async def ask() -> bytes:
        address = strict_http.base_url.host, strict_http.base_url.port or 0
        async with connected(address) as (reader, writer):
            writer.write(two.replace(b"connection: close\r\n", b""))
            return await reader.read(-1)

    answer = asyncio.run(ask())
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "GZIP", "gzip, identity"])
def test_a_compressed_body_is_refused_by_name(http: httpx.Client, coding: str) -> None:
    body = zlib.compress(BODY) if coding == "deflate" else gzip.compress(BODY)
    for path in ("/v1/completions", "/generated_texts/"):
        answer = http.post(path, content=body, headers={"content-encoding": coding})
        assert answer.status_code == 415
        assert "without content-encoding" in answer.json()["error"]["message"]
    plain = http.post("/v1/completions", content=BODY, headers={"content-encoding": "identity"})
    assert plain.status_code == 200


def test_openais_javascript_client_may_ask_from_an_allowed_page(
    keyed_service: KeyedService,
) -> None:
    wanted = (
        "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,"
        "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,x-stainless-timeout,"
        "x-stainless-runtime-version,openai-organization,x-evil,x-stainless-\u00e9"
    )
    asked: dict[str, Any] = {
        "origin": "https://friend.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": wanted.encode("latin-1"),
    }
    answer = httpx.options(f"{keyed_service.url}/v1/chat/completions", headers=asked, timeout=60)
    assert answer.status_code == 204
    allowed = answer.headers["access-control-allow-headers"].split(", ")
    assert set(allowed) == {*wanted.split(",")[:-2], "x-request-id"}
    asked["origin"] = "https://evil.example"
    answer = httpx.options(f"{keyed_service.url}/v1/chat/completions", headers=asked, timeout=60)
    assert (answer.status_code, "access-control-allow-headers" in answer.headers) == (403, False)
