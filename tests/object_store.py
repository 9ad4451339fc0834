"""A server of S3 on loopback, and a proxy before it that answers badly by a seeded plan."""

import contextlib
import http.client
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

BUCKET = "bucket"
_SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
)
_INTERNAL = b"<Error><Code>InternalError</Code><Message>try again</Message></Error>"


@dataclass
class Faults:
    """Which requests fail, and what came: change it between requests."""

    probability: float = 0.0
    kinds: tuple[str, ...] = ("500", "503", "cut", "lost")
    """500 and 503: instead of an answer. cut: half an answer. lost: done, but without an answer. slow: after
    a while. refused: 403."""
    only: str = ""
    """Only requests with this text in method and path."""
    slow_seconds: float = 0.3
    draws: random.Random = field(default_factory=lambda: random.Random(0))
    requests: list[str] = field(default_factory=list)
    """Method and path of all."""
    failed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, request: str) -> str:
        """What happens to a request; empty: nothing."""
        with self.lock:
            self.requests.append(request)
            if self.only not in request or self.draws.random() >= self.probability:
                return ""
            kind = self.draws.choice(self.kinds)
            self.failed.append(f"{kind} {request}")
            return kind


class S3Server:
    """The address to use, and the faults of its proxy."""

    def __init__(self, endpoint: str, faults: Faults) -> None:
        self.endpoint = endpoint
        self.faults = faults

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that uses it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key-of-a-test",
            "AWS_SECRET_ACCESS_KEY": "secret-of-a-test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults
    target: tuple[str, int]

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _forward(self) -> None:
        body = self._body()
        kind = self.faults.draw(f"{self.command} {self.path}")
        if kind in ("500", "503", "refused"):
            content = {"500": _INTERNAL, "503": _SLOW_DOWN}.get(
                kind, b"<Error><Code>AccessDenied</Code><Message>secret-of-a-test</Message></Error>"
            )
            self._answer({"500": 500, "503": 503}.get(kind, 403), [], content)
            return
        if kind == "slow":
            time.sleep(self.faults.slow_seconds)
        connection = http.client.HTTPConnection(*self.target, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if kind == "lost":
            self.close_connection = True
            return
        self._answer(answer.status, answer.getheaders(), content, is_cut=kind == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            del self.headers["Expect"]  # answered by http.server already
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        del self.headers["Transfer-Encoding"]
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        body = b"".join(parts)
        self.headers["Content-Length"] = str(len(body))
        return body

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, *, is_cut: bool = False
    ) -> None:
        self.send_response_only(status)
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        of_head = lengths[0] if self.command == "HEAD" and lengths else str(len(content))
        self.send_header("Content-Length", of_head)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            self.close_connection = True


@contextlib.contextmanager
def serve_s3() -> Iterator[S3Server]:
    """A server with an empty bucket, behind a proxy without faults."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    faults = Faults()
    handler = type("Proxy", (_Proxy,), {"faults": faults, "target": server.get_host_and_port()})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    proxy.daemon_threads = True
    proxy.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients may go away
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield S3Server(f"http://127.0.0.1:{proxy.server_port}", faults)
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        server.stop()


@contextlib.contextmanager
def s3_of_test(monkeypatch: pytest.MonkeyPatch, server: S3Server) -> Iterator[S3Server]:
    """The server with an empty bucket, and this process set up to use it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    vars(server.faults).update(vars(Faults()))
    _request(server, "POST", "/moto-api/reset")
    _request(server, "PUT", f"/{BUCKET}")
    yield server


def _request(server: S3Server, method: str, path: str) -> None:
    connection = http.client.HTTPConnection(server.endpoint.removeprefix("http://"), timeout=30)
    try:
        connection.request(method, path)
        assert connection.getresponse().status == 200
    finally:
        connection.close()
