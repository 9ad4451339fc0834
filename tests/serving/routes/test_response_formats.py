"""Formats that explode: refused within bounds, while the others' texts go on."""

import contextlib
import json
import statistics
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.logged_process import LoggedProcess, running_service
from tests.serving.conftest import KeyedService
from tests.serving.processes import descendants, has_ended, resident_megabytes, wait_for

# A grammar that was refused is remembered; each of these is another one.
_numbers = count(62_615_533, 2)


def _schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def _regex(expression: str) -> dict[str, Any]:
    return {"type": "regex", "regex": expression}


def _bomb() -> dict[str, Any]:
    return _schema({"type": "integer", "multipleOf": next(_numbers)})


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_grammar_bomb_is_refused_with_its_bounds(
    http: httpx.Client, route: str, stream: bool
) -> None:
    body = ROUTES[route] | {"response_format": _bomb(), "stream": stream}
    answer = http.post(route, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "the schema is too" in error["message"]
    assert "more than 64 MB" in error["message"] or "more than 2 seconds" in error["message"]
    begun = time.monotonic()
    assert http.post(route, json=body).json()["error"]["message"] == error["message"]
    assert time.monotonic() - begun < 1


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


_DOUBLED = {
    f"d{number}": {"anyOf": [{"type": "array", "items": one}, {"properties": {"x": one, "y": one}}]}
    for number, one in ((n, {"$ref": f"#/$defs/d{n + 1}"}) for n in range(30))
}
# Status, or None where either is right: followed, or refused within bounds.
SIBLINGS: dict[str, tuple[dict[str, Any], int | None]] = {
    "two multiples": (
        _schema({"type": "integer", "allOf": [{"multipleOf": one} for one in (97, 89, 83)]}),
        400,
    ),
    "a bomb in an object": (
        _schema({"properties": {"a": {"type": "integer", "multipleOf": 99_999_989}}}),
        400,
    ),
    "a bomb beside a word": (
        _schema({"anyOf": [{"const": "x"}, {"type": "integer", "multipleOf": 99_999_971}]}),
        400,
    ),
    "a loop of references": (
        _schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        400,
    ),
    "combinations": (
        _schema(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"p{n}{m}": {}}} for m in "abcd"]}
                    for n in "abcdefghij"
                ]
            }
        ),
        400,
    ),
    "a depth of 60": (_schema(_nested(60)), 200),
    "a depth of 300": (_schema(_nested(300)), 400),
    "references that double": (
        _schema({"$defs": {**_DOUBLED, "d30": {"type": "string"}}, "$ref": "#/$defs/d0"}),
        200,
    ),
    "2,000 properties": (
        _schema({"properties": {f"property_{n}": {"type": "string"} for n in range(2000)}}),
        None,
    ),
    "a choice of 3,000": (_schema({"enum": [f"choice {n}" for n in range(3000)]}), 200),
    "too many bytes": (_schema({"enum": [f"choice {n}" for n in range(10_000)]}), 400),
    "a billion items": (
        _schema(
            {"type": "array", "items": {"type": "string", "maxLength": 10**9}, "minItems": 10**9}
        ),
        200,
    ),
    "patterns of names": (
        _schema({"patternProperties": {f"^.*{c}.*$": {"type": "string"} for c in "abcdefghij"}}),
        400,
    ),
    "nested repetitions": (_regex("(a{1,1000}){1,1000}"), 200),
    "classes that repeat": (_regex(r"(\p{L}|\p{N}){1,900}x(\p{L}){1,900}"), None),
    "memory of a place": (_regex("(a|b)*a(a|b){200}"), 200),
    "nested groups": (_regex("(" * 3000 + "a" + ")" * 3000), 400),
}


@pytest.mark.parametrize(("wanted", "status"), SIBLINGS.values(), ids=SIBLINGS)
def test_other_formats_that_explode_are_followed_or_refused(
    http: httpx.Client, wanted: dict[str, Any], status: int | None
) -> None:
    body = {"prompt": "x", "max_tokens": 12, "seed": 1, "response_format": wanted}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code in ((200, 400) if status is None else (status,)), answer.text
    if answer.status_code == 400:
        # Not the schema, which may be long and confidential.
        assert len(answer.json()["error"]["message"]) < 300


def _chat_seconds(http: httpx.Client) -> float:
    begun = time.monotonic()
    body = ROUTES["/v1/chat/completions"] | {"max_tokens": 16, "temperature": 0}
    http.post("/v1/chat/completions", json=body).raise_for_status()
    return time.monotonic() - begun


def _leave_after(seconds: float, http: httpx.Client) -> None:
    try:
        body = ROUTES["/v1/completions"] | {"response_format": _bomb()}
        http.post("/v1/completions", json=body, timeout=seconds)
    except httpx.TimeoutException:
        pass


def test_chats_go_on_beside_eight_bombs_whose_clients_leave(
    keyed_service: KeyedService, http: httpx.Client
) -> None:
    quiet = statistics.median(_chat_seconds(http) for _ in range(10))
    bombs = [threading.Thread(target=_leave_after, args=(1.5, http)) for _ in range(8)]
    for bomb in bombs:
        bomb.start()
    beside, megabytes = [], [0.0]
    while any(bomb.is_alive() for bomb in bombs):
        beside.append(_chat_seconds(http))
        children = descendants(keyed_service.process.pid, "grammar_process")
        megabytes.append(sum(map(resident_megabytes, children)))
    assert statistics.median(beside) < 2 * quiet + 0.02
    assert max(megabytes) < 700
    # One with the vocabulary, and those kept for equal grammars.
    wait_for(lambda: len(descendants(keyed_service.process.pid, "grammar_process")) <= 5)
    assert keyed_service.process.log.count("Traceback") == 0


@pytest.fixture(scope="module")
def bombed(model_dir: Path) -> Iterator[tuple[str, LoggedProcess]]:
    """A service of its own, to be stopped."""
    with running_service(model_dir) as service:
        yield service


def test_a_service_with_bombs_stops_as_fast_as_without(bombed: tuple[str, LoggedProcess]) -> None:
    url, process = bombed
    json_object = {"prompt": "x", "max_tokens": 4, "response_format": {"type": "json_object"}}
    httpx.post(f"{url}/v1/completions", json=json_object, timeout=60).raise_for_status()
    answers: list[httpx.Response] = []

    def explode() -> None:
        body = ROUTES["/v1/completions"] | {"response_format": _bomb()}
        # On a busy machine some come when the service no longer listens.
        with contextlib.suppress(httpx.TransportError):
            answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))

    bombs = [threading.Thread(target=explode) for _ in range(8)]
    for bomb in bombs:
        bomb.start()
    wait_for(lambda: len(_children(process)) > 2)
    children = _children(process)
    begun = time.monotonic()
    assert process.stop() == 0
    for bomb in bombs:
        bomb.join()
    assert time.monotonic() - begun < 30
    wait_for(lambda: all(map(has_ended, children)))
    assert {answer.status_code for answer in answers} <= {400, 503}
    assert any("is stopping" in json.dumps(answer.json()) for answer in answers)


def _children(process: LoggedProcess) -> list[int]:
    return descendants(process.pid, "grammar_process")
