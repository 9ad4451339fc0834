"""Who may ask: keys, pages of other sites, and what every answer says about itself."""

import hashlib
import socket
from pathlib import Path

import httpx
import pytest

from full_stack_transformer.errors import UsageError
from full_stack_transformer.serving.http.keys import read_api_keys
from tests.conftest import RunFst
from tests.serving.conftest import KeyedService

OPEN = {("GET", "/health"), ("GET", "/ready")}


def test_every_route_but_the_open_ones_wants_a_key(
    keyed_service: KeyedService, http: httpx.Client
) -> None:
    """Walks the routes of the running service, so that a new one cannot be forgotten."""
    paths = http.get("/openapi.json").json()["paths"]
    assert len(paths) >= 10
    hidden = dict.fromkeys(("/docs", "/redoc", "/openapi.json", "/x"), "get")
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    routes |= {(method.upper(), path) for path, method in hidden.items()}
    routes |= {("POST", "/generated_texts"), ("GET", "/v1/models/"), ("HEAD", "/metrics")}
    for method, path in sorted(routes):
        answer = httpx.request(method, keyed_service.url + path, content=b"{}", timeout=60)
        is_open = (method, path) in OPEN
        assert answer.status_code == (200 if is_open else 401), path
        if not is_open:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "target",
    [
        *(
            "/health/",
            "//health",
            "/health/../metrics",
            "/./metrics",
            "/HEALTH",
            "*",
            "http://localhost/metrics",
        ),
        *(
            "/health%2f..%2fmetrics",
            "/v1/models?x=/health",
            "/metrics#/health",
            "/health;/../metrics",
            "http://localhost/health/../metrics",
        ),
    ],
)
def test_no_spelling_of_a_path_gets_around_the_key(
    keyed_service: KeyedService, target: str
) -> None:
    host, port = keyed_service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        request = f"GET {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        connection.sendall(request.encode())
        assert connection.recv(100).startswith((b"HTTP/1.1 401", b"HTTP/1.1 400"))


@pytest.mark.parametrize(
    "header",
    [
        *("", "Bearer", "Bearer wrong-key-wrong-key", "Basic a-key-of-the-tests-0001"),
        *(
            "a-key-of-the-tests-0001",
            "Bearer a-key-of-the-tests-000",
            "Bearer a-key-of-the-tests-00011",
        ),
    ],
)
def test_what_is_no_key_opens_nothing(keyed_service: KeyedService, header: str) -> None:
    url = f"{keyed_service.url}/v1/models"
    assert httpx.get(url, headers={"authorization": header}, timeout=60).status_code == 401


def test_each_of_several_keys_opens(keyed_service: KeyedService) -> None:
    for key in (keyed_service.key, "another-key-of-the-tests"):
        headers = {"authorization": f"bearer {key}"}
        assert (
            httpx.get(f"{keyed_service.url}/version", headers=headers, timeout=60).status_code
            == 200
        )


def test_a_page_of_another_site_may_not_ask_unless_allowed(http: httpx.Client) -> None:
    body = {"seed_text": "x", "generation_max_len": 1}
    foreign = http.post("/generated_texts/", json=body, headers={"origin": "https://evil.example"})
    assert foreign.status_code == 403
    assert "access-control-allow-origin" not in foreign.headers
    allowed = http.post(
        "/generated_texts/", json=body, headers={"origin": "https://friend.example"}
    )
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
    own = http.post(
        "/generated_texts/", json=body, headers={"origin": str(http.base_url).rstrip("/")}
    )
    assert own.status_code == 200


def test_a_browser_may_ask_whether_it_may_ask(keyed_service: KeyedService) -> None:
    asked = {"origin": "https://friend.example", "access-control-request-method": "POST"}
    answer = httpx.options(f"{keyed_service.url}/v1/completions", headers=asked, timeout=60)
    assert answer.status_code == 204
    assert "authorization" in answer.headers["access-control-allow-headers"]
    asked["origin"] = "https://evil.example"
    answer = httpx.options(f"{keyed_service.url}/v1/completions", headers=asked, timeout=60)
    assert answer.status_code == 403


def test_every_answer_has_the_headers_of_security(
    http: httpx.Client, keyed_service: KeyedService
) -> None:
    for answer in (
        http.get("/health"),
        http.get("/x"),
        httpx.get(f"{keyed_service.url}/docs", timeout=60),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-request-id"]
        assert "server" not in answer.headers
    assert (
        http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    )


def test_keys_come_from_file_and_environment(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"a third key of mine".replace(b" ", b"-")).hexdigest()
    file = tmp_path / "keys"
    file.write_text(f"first-key-of-mine-1 # note\n\nsha256:{digest}\n")
    keys = read_api_keys(file, {"FST_API_KEYS": "second-key-of-mine, first-key-of-mine-1"})
    assert keys.num_keys == 3
    for key in ("first-key-of-mine-1", "second-key-of-mine", "a-third-key-of-mine"):
        assert keys.find(f"Bearer {key}".encode()) == hashlib.sha256(key.encode()).hexdigest()[:8]
    assert keys.find(f"Bearer {digest}".encode()) is None
    assert read_api_keys(None, {}).is_open


@pytest.mark.parametrize(
    "content", ["", "# nothing\n", "short\n", "a key with spaces in it\n", "ключ" * 5]
)
def test_a_file_without_real_keys_is_refused(
    content: str, tmp_path: Path, model_dir: Path, run_fst: RunFst
) -> None:
    """An empty file must not open the service to everybody."""
    file = tmp_path / "keys"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as refused:
        read_api_keys(file, {})
    assert content.strip() == "" or content.strip() not in str(refused.value)
    with pytest.raises(UsageError, match="cannot be read"):
        read_api_keys(tmp_path / "absent", {})
