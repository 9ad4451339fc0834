"""Sampling parameters at their borders, alone and in pairs, beside texts of others that must not change."""

import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from full_stack_transformer.arguments.sampling import DECLARED, NUMERIC
from full_stack_transformer.generation.runners.native.library import why_not

_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny-model", "prompt": "hello hello there"},
    "/v1/chat/completions": {
        "model": "tiny-model",
        "messages": [{"role": "user", "content": "hello hello"}],
    },
}
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


def _borders() -> dict[str, list[Any]]:
    """Values of each field at its bounds, just inside, just outside, and absurd ones."""
    found: dict[str, list[Any]] = {}
    for name in NUMERIC:
        least, most = (DECLARED[name].metadata[key] for key in ("least", "most"))
        if name == "max_new_tokens":
            most = 30
        found[_NAMES.get(name, name)] = (
            [least, most, -1, 1e-40, 1e38, 1e308]
            if most > 100
            else [least, most, 1e-40, 1e-5, -0.0, 1e38]
        )
    found["logit_bias"] = [
        {},
        {"5": 100},
        {"5": -100},
        {"5": 1e39},
        {str(n): -100 for n in range(290)},
    ]
    found["stop"] = ["", [], ["e"], [" " * 2000]]
    found["n"] = [0, 1, 3]
    return found


def _siblings() -> list[tuple[str, dict[str, Any]]]:
    """Each border by itself and 60 pairs, through two routes."""
    borders = _borders()
    bodies = [{name: value} for name, values in borders.items() for value in values]
    pairs = list(itertools.combinations(bodies, 2))
    chosen = random.Random(0).sample(
        [pair for pair in pairs if pair[0].keys() != pair[1].keys()], 60
    )
    bodies += [first | second for first, second in chosen]
    bodies.append({"repetition_penalty": 1e-40, "typical_p": 0.5})
    bodies.append({"repetition_penalty": 0.01, "typical_p": 0.5, "presence_penalty": -2})
    routes = itertools.cycle(_ROUTES)
    return [
        (route, {**_ROUTES[route], "max_tokens": 20, **body})
        for route, body in zip(routes, bodies, strict=False)
    ]


def _stream(http: httpx.Client, number: int) -> tuple[str, str | None]:
    """The text of one seeded stream and how it ended."""
    body = {
        **_ROUTES["/v1/completions"],
        "prompt": f"The {number}",
        "max_tokens": 100,
        "seed": number,
        "temperature": 1.0,
        "stream": True,
        "logit_bias": {"0": -100},
        "min_tokens": 100,
    }
    text, reason = "", None
    with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                text += choice["text"]
                reason = choice["finish_reason"] or reason
    return text, reason


def test_no_request_harms_another_one(http: httpx.Client) -> None:
    alone = [_stream(http, number) for number in range(8)]
    assert {reason for _, reason in alone} == {"length"}
    siblings = iter(_siblings())
    with ThreadPoolExecutor(8 + 4) as threads:
        streams = []
        codes: list[tuple[int, dict[str, Any]]] = []

        def ask(sibling: tuple[str, dict[str, Any]]) -> None:
            route, body = sibling
            answer = http.post(route, json=body)
            codes.append((answer.status_code, body))
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error["message"], body

        while chunk := list(itertools.islice(siblings, 40)):
            streams = [threads.submit(_stream, http, number) for number in range(8)]
            for done in [threads.submit(ask, one) for one in chunk]:
                done.result()
            found = [stream.result() for stream in streams]
            assert [reason for _, reason in found] == ["length"] * 8
            if why_not() is None:  # through PyTorch last bits depend on the company
                assert found == alone
    assert {code for code, _ in codes} == {200, 400}, codes
    # What is within the bounds is answered, whatever its company.
    assert not [body for code, body in codes if code != 200 and _is_within(body)]


def _is_within(body: dict[str, Any]) -> bool:
    for name in NUMERIC:
        value = body.get(_NAMES.get(name, name))
        field = DECLARED[name]
        is_whole = isinstance(field.default, float) or value == int(value or 0)
        is_inside = value is None or field.metadata["least"] < value < field.metadata["most"]
        if not (is_whole and is_inside):
            return False
    return not body.keys() & {"stop", "n", "logit_bias"}


@pytest.mark.parametrize("penalty", [0, 1e-40, 0.0099, 10.01, -1, 1e308])
def test_a_repetition_penalty_has_two_bounds(http: httpx.Client, penalty: float) -> None:
    body = {**_ROUTES["/v1/completions"], "max_tokens": 2, "repetition_penalty": penalty}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "repetition_penalty" in answer.json()["error"]["message"]
