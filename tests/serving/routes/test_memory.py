"""Who shares what has been read, and what the service says of its memory."""

import re
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from full_stack_transformer.serving.routes.answering import sharing
from tests.serving.conftest import KEY, KeyedService

OTHER_KEY = "another-key-of-the-tests"


def _metric(http: httpx.Client, name: str) -> float:
    text = http.get("/metrics").text
    return sum(map(float, re.findall(rf"^{re.escape(name)}{{.*}} (.*)$", text, re.MULTILINE)))


def test_only_requests_of_one_key_share_what_has_been_read(
    keyed_service: KeyedService, http: httpx.Client
) -> None:
    """Otherwise anybody could tell by time what another one asked."""
    prompt = [7 + (31 * place) % 200 for place in range(70)]

    def num_reused(key: str, route: str = "completions") -> float:
        before = _metric(http, "vllm:prefix_cache_hits_total")
        fields: dict[str, Any] = {"prompt": prompt, "max_tokens": 2, "seed": 1}
        if route == "embeddings":
            fields = {"input": prompt}
        answer = httpx.post(
            f"{keyed_service.url}/v1/{route}",
            json={"model": "tiny-model", **fields},
            headers={"authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        return _metric(http, "vllm:prefix_cache_hits_total") - before

    assert num_reused(OTHER_KEY, "embeddings") == 0
    assert [num_reused(key) for key in (KEY, KEY, OTHER_KEY, OTHER_KEY)] == [0, 64, 64, 64]
    prompt[0] += 1
    assert [num_reused(key) for key in (KEY, OTHER_KEY, KEY, OTHER_KEY)] == [0, 0, 64, 64]


@pytest.mark.parametrize(
    ("mode", "expected"), [("shared", ["", "", ""]), ("per_key", ["", "a", "b"])]
)
def test_modes_of_sharing(mode: str, expected: list[str]) -> None:
    assert [sharing(_request(mode, key)) for key in (None, "a", "b")] == expected
    assert sharing(_request("off", "a")) != sharing(_request("off", "a"))


def _request(mode: str, key: str | None) -> Any:
    app = SimpleNamespace(state=SimpleNamespace(prefix_cache=mode))
    return SimpleNamespace(app=app, state=SimpleNamespace(facts=SimpleNamespace(key=key)))


def test_version_and_metrics_say_what_keys_and_values_take(http: httpx.Client) -> None:
    [model] = http.get("/version").json()["models"]
    memory = model["key_value_memory"]
    assert memory["num_tokens"] == memory["num_blocks"] * memory["block_size"]
    assert memory["num_bytes"] > 0
    assert memory["num_texts_of_full_length"] == 32
    assert _metric(http, "fst_kv_blocks") == memory["num_blocks"]
    assert 0 <= _metric(http, "vllm:kv_cache_usage_perc") <= 1
    assert _metric(http, "vllm:num_preemptions_total") == 0
