"""What `fst serve` answers: texts, scores, vectors, predictions, errors, and what it says of itself.

One service with models of all tasks; requests come one after the other. Nothing is left to the defaults of
sampling, which may change. Of errors only status, type and code are noted, not the words.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.behaviour.commands import fst_words, running
from tests.behaviour.facts import Facts, key_paths, plain, without
from tests.behaviour.steps import Step
from tests.behaviour.trainings import LANGUAGE_MODEL

Json = dict[str, Any]

_KEY = "a-key-of-the-transcript"
_OTHER_MODELS = {
    "chat": "models/chat",
    "classes": "experiments/sequence_classification/0",
    "masks": "experiments/masked_lm/0",
    "choices": "experiments/multiple_choice/0",
    "spans": "experiments/span_selection/0",
    "labels": "experiments/token_labelling/0",
    "vectors": "experiments/sentence_embedding/0",
}
_GREEDY: Json = {
    "temperature": 0,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "typical_p": 1,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
_DRAWN: Json = {**_GREEDY, "temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 5}
_PROMPT: Json = {"model": "lm", "prompt": "The reader", "max_tokens": 16}
_SCHEMA = {
    "type": "object",
    "required": ["kind"],
    "additionalProperties": False,
    "properties": {"kind": {"enum": ["reader", "corpus"]}},
}
_JSON_FORM = {"type": "json_schema", "json_schema": {"name": "kind", "schema": _SCHEMA}}
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
_COMPLETIONS: dict[str, Json] = {
    "greedy": {**_PROMPT, **_GREEDY},
    "seed": {**_PROMPT, **_DRAWN},
    "penalties": {
        **_PROMPT,
        **_DRAWN,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "min_p": 0.02,
        "typical_p": 0.9,
    },
    "token_ids": {**_PROMPT, **_DRAWN, "prompt": [0, 40, 50, 60]},
    "several": {**_PROMPT, **_DRAWN, "prompt": ["The corpus", "Nobody"], "n": 2},
    "echo": {**_PROMPT, **_DRAWN, "echo": True, "logprobs": 3},
    "scores": {**_PROMPT, **_GREEDY, "echo": True, "logprobs": 2, "max_tokens": 0},
    "stop": {**_PROMPT, **_DRAWN, "stop": [" and", "."], "min_tokens": 2, "max_tokens": 30},
    "logit_bias": {**_PROMPT, **_GREEDY, "logit_bias": {"40": 100, "50": -100}},
    "best_of": {**_PROMPT, **_DRAWN, "best_of": 3},
    "ignored_words": {**_PROMPT, **_DRAWN, "ignored_words": ["e", "t"]},
    "json_schema": {**_PROMPT, **_DRAWN, "max_tokens": 60, "response_format": _JSON_FORM},
    "regex": {**_PROMPT, **_DRAWN, "response_format": {"type": "regex", "regex": "[a-c]{3}-\\d+"}},
}
_STREAMS: dict[str, Json] = {
    "greedy": {**_PROMPT, **_GREEDY, **_USAGE},
    "several": {**_PROMPT, **_DRAWN, "n": 2, "logprobs": 1, "echo": True, "stream": True},
    "stop": {**_PROMPT, **_DRAWN, "stop": ["."], "max_tokens": 40, "stream": True},
}
_MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "Who reads?"}]},
]
_CHAT: Json = {"model": "chat", "messages": _MESSAGES, "max_tokens": 16, "min_tokens": 8}
_BEGUN = [*_MESSAGES, {"role": "assistant", "content": "The reader"}]
_CHATS: dict[str, Json] = {
    "greedy": {**_CHAT, **_GREEDY},
    "several": {**_CHAT, **_DRAWN, "n": 2, "logprobs": True, "top_logprobs": 2},
    "begun": {**_CHAT, **_DRAWN, "messages": _BEGUN, "continue_final_message": True},
    "without_template": {**_CHAT, **_DRAWN, "model": "lm"},
    "newer_name": {**without(_CHAT, ["max_tokens"]), **_DRAWN, "max_completion_tokens": 9},
    "json_schema": {**_CHAT, **_DRAWN, "max_tokens": 60, "response_format": _JSON_FORM},
}
_CHAT_STREAMS: dict[str, Json] = {
    "greedy": {**_CHAT, **_GREEDY, **_USAGE},
    "scored": {**_CHAT, **_DRAWN, "logprobs": True, "top_logprobs": 1, "stream": True},
}
_NATIVE: Json = {
    "seed_text": "Every sample",
    "generation_max_len": 12,
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "num_return_sequences": 2,
    "seed": 5,
}
_TEXTS = ["Return a new list.", "The file is closed, é 🙂", "x"]
# key -> path and body
_POSTS: dict[str, tuple[str, Json]] = {
    "generated_texts/two": ("/generated_texts/", _NATIVE),
    "generated_texts/ignored": ("/generated_texts/", {**_NATIVE, "ignored_words": ["a", "e"]}),
    "generated_texts/chat_model": ("/generated_texts/", {**_NATIVE, "model": "chat"}),
    "embeddings/floats": ("/v1/embeddings", {"model": "vectors", "input": _TEXTS}),
    "embeddings/of_lm": ("/v1/embeddings", {"model": "lm", "input": _TEXTS}),
    "embeddings/base64": (
        "/v1/embeddings",
        {"model": "vectors", "input": "A text", "encoding_format": "base64"},
    ),
    "embeddings/token_ids": ("/v1/embeddings", {"model": "lm", "input": [0, 40, 50]}),
    "tasks/classify": ("/classify", {"texts": _TEXTS}),
    "tasks/classify_pairs": ("/classify", {"texts": _TEXTS, "text_pairs": _TEXTS}),
    "tasks/fill_mask": ("/fill_mask", {"texts": ["The [MASK] of a [MASK]", "[MASK]"]}),
    "tasks/choose": ("/choose", {"text": "open(file)", "choices": ["Open it.", "Shut", "No"]}),
    "tasks/answer": (
        "/answer",
        {
            "question": "When does read raise an error?",
            "context": "Read a line. If the file is closed, raise ValueError. Return a list of names.",
        },
    ),
    "tasks/label": ("/label", {"texts": _TEXTS}),
    "tasks/embed": ("/embed", {"texts": _TEXTS}),
    "tasks/similarity": ("/similarity", {"texts": _TEXTS}),
    "tasks/similarity_of_lm": ("/similarity", {"texts": _TEXTS, "model": "lm"}),
    **{f"completions/{name}": ("/v1/completions", body) for name, body in _COMPLETIONS.items()},
    **{f"chats/{name}": ("/v1/chat/completions", body) for name, body in _CHATS.items()},
}
_GETS = {
    "models/all": "/v1/models",
    "models/one": "/v1/models/chat",
    "ready": "/ready",
    "health": "/health",
    "health_check": "/health_check/",
}
# key -> method, path, body, headers beside the key
_ERRORS: dict[str, tuple[str, str, Json | str | None, dict[str, str]]] = {
    "route": ("GET", "/nothing", None, {}),
    "method": ("GET", "/v1/completions", None, {}),
    "model": ("POST", "/v1/completions", {**_PROMPT, "model": "none"}, {}),
    "model_of_route": ("GET", "/v1/models/none", None, {}),
    "model_of_other_task": ("POST", "/classify", {"texts": ["a"], "model": "lm"}, {}),
    "generation_of_task_model": ("POST", "/v1/completions", {**_PROMPT, "model": "labels"}, {}),
    "no_json": ("POST", "/v1/completions", "{", {}),
    "nan": ("POST", "/v1/completions", '{"temperature": NaN}', {}),
    "unknown_field": ("POST", "/v1/completions", {**_PROMPT, "what": 1}, {}),
    "native_field": ("POST", "/generated_texts/", {"seed_text": "a", "what": 1}, {}),
    "task_field": ("POST", "/classify", {"texts": []}, {}),
    "pairs": ("POST", "/classify", {"texts": ["a", "b"], "text_pairs": ["a"]}, {}),
    "choices": ("POST", "/choose", {"text": "a", "choices": ["b"]}, {}),
    "suffix": ("POST", "/v1/completions", {**_PROMPT, "suffix": "end"}, {}),
    "n": ("POST", "/v1/completions", {**_PROMPT, "n": 1000}, {}),
    "best_of": ("POST", "/v1/completions", {**_PROMPT, "n": 2, "best_of": 1}, {}),
    "no_tokens": ("POST", "/v1/completions", {**_PROMPT, "max_tokens": 0}, {}),
    "stream_options": ("POST", "/v1/completions", {**_PROMPT, "stream_options": {}}, {}),
    "context": ("POST", "/v1/completions", {**_PROMPT, "prompt": [40] * 500}, {}),
    "token_id": ("POST", "/v1/completions", {**_PROMPT, "prompt": [1_000_000]}, {}),
    "bias_id": ("POST", "/v1/completions", {**_PROMPT, "logit_bias": {"999999": 1}}, {}),
    "role": ("POST", "/v1/chat/completions", {"messages": [{"role": "x", "content": ""}]}, {}),
    "dimensions": ("POST", "/v1/embeddings", {"input": "a", "dimensions": 3}, {}),
    "large": ("POST", "/v1/completions", json.dumps({"prompt": "a" * (1 << 20)}), {}),
    "key": ("GET", "/v1/models", None, {"authorization": "Bearer wrong"}),
    "no_key": ("POST", "/classify", {"texts": ["a"]}, {"authorization": ""}),
    "origin": ("GET", "/v1/models", None, {"origin": "https://example.org"}),
}


def http_steps() -> list[Step]:
    """Of the service."""
    tasks = [path.split("/")[1] for path in _OTHER_MODELS.values() if path != "models/chat"]
    needs = ("models/chat", f"train/{LANGUAGE_MODEL}", *(f"train/{task}" for task in tasks))
    return [Step("http", _answers, needs, goes_on=True)]


@contextmanager
def _service(work: Path) -> Iterator[httpx.Client]:
    (work / "keys.txt").write_text(f"{_KEY}\n", encoding="utf-8")
    words = fst_words(
        *("serve", f"experiments/{LANGUAGE_MODEL}/0", "--served_model_name", "lm"),
        *(word for one in _OTHER_MODELS.items() for word in ("--more_models", "=".join(one))),
        *("--port", "0", "--device", "cpu", "--weights_dtype", "float32"),
        *("--api_keys_file", "keys.txt"),
    )
    with running(work, words) as process:
        address = re.search(r"http://[0-9.]+:[0-9]+", process.wait_for("serving "))
        assert address is not None
        headers = {"authorization": f"Bearer {_KEY}"}
        with httpx.Client(
            base_url=address.group(), headers=headers, timeout=120, trust_env=False
        ) as http:
            yield http
        if (code := process.stop()) != 0:
            raise RuntimeError(f"the service left with {code}: {process.log[-1000:]}")


def _answers(work: Path) -> Facts:
    with _service(work) as http:
        facts = {key: _whole(http.get(path)) for key, path in _GETS.items()}
        facts |= {key: _whole(http.post(path, json=body)) for key, (path, body) in _POSTS.items()}
        for name, streams in (("completions", _STREAMS), ("chat/completions", _CHAT_STREAMS)):
            for key, body in streams.items():
                facts[f"streams/{name}/{key}"] = _streamed(http, f"/v1/{name}", body)
        facts |= {f"errors/{key}": _refused(http, *request) for key, request in _ERRORS.items()}
        facts |= _self_description(http)
    return facts


def _kind(response: httpx.Response) -> Json:
    kind = response.headers.get("content-type", "").partition(";")[0]
    return {"status": response.status_code, "type": kind}


def _whole(response: httpx.Response) -> Json:
    """An answer; of one that is an error neither words nor place."""
    if response.is_error:
        return _error(response)
    return {**_kind(response), "body": plain(response.json())}


def _error(response: httpx.Response) -> Json:
    error = response.json()["error"]
    return {**_kind(response), "error": {name: error.get(name) for name in ("type", "code")}}


def _refused(
    http: httpx.Client, method: str, path: str, body: Json | str | None, headers: dict[str, str]
) -> Json:
    content = body if body is None or isinstance(body, str) else json.dumps(body)
    return _error(http.request(method, path, content=content, headers=headers))


def _streamed(http: httpx.Client, path: str, body: Json) -> Json:
    """A stream put together again: where its events are cut depends on the clock."""
    with http.stream("POST", path, json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    choices: dict[int, Json] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        known = choices.setdefault(
            choice["index"], {"text": "", "roles": [], "reason": None, "scores": {}}
        )
        delta = choice.get("delta", {})
        known["text"] += choice.get("text") or delta.get("content") or ""
        known["roles"] += [delta["role"]] if "role" in delta else []
        known["reason"] = choice["finish_reason"] or known["reason"]
        for name, scores in (choice.get("logprobs") or {}).items():
            known["scores"].setdefault(name, []).extend(scores or [])
    return {
        **_kind(response),
        "choices": plain([choices[index] for index in sorted(choices)]),
        "usage": [event["usage"] for event in events if event.get("usage")],
        "keys": key_paths([without(event, ["logprobs"]) for event in events]),
        "is_done": lines[-1:] == ["[DONE]"],
    }


def _self_description(http: httpx.Client) -> Facts:
    version = http.get("/version").json()
    metrics = http.get("/metrics").text
    return {
        "version/keys": key_paths(version),
        "version/models": [
            {name: model[name] for name in ("model", "task", "context_tokens", "has_chat_template")}
            for model in version["models"]
        ],
        "metrics": sorted(re.findall(r"^# TYPE (\S+) (?:\S+)$", metrics, re.MULTILINE)),
        "pages": {path: _kind(http.get(path)) for path in ("/", "/docs", "/openapi.json")},
        "openapi": _routes(http.get("/openapi.json").json()),
    }


def _routes(schema: Json) -> Json:
    """Of each route the names in its body and in its answers; what schemas are called may change."""
    return {
        f"{method} {path}": {
            "body": _property_names(schema, route.get("requestBody", {})),
            "answers": {
                status: _property_names(schema, answer)
                for status, answer in route["responses"].items()
            },
        }
        for path, methods in schema["paths"].items()
        for method, route in methods.items()
    }


def _property_names(schema: Json, part: Any) -> list[str]:
    found: set[str] = set()
    followed: set[str] = set()

    def look(value: Any, path: str) -> None:
        if isinstance(value, list):
            for one in value:
                look(one, path)
        if not isinstance(value, dict):
            return
        reference = value.get("$ref")
        if isinstance(reference, str) and f"{path} {reference}" not in followed:
            followed.add(f"{path} {reference}")
            target: Any = schema
            for name in reference.removeprefix("#/").split("/"):
                target = target[name]
            look(target, path)
        properties = value.get("properties")
        for name, one in (properties if isinstance(properties, dict) else {}).items():
            found.add(f"{path}/{name}")
            look(one, f"{path}/{name}")
        for name, one in value.items():
            if name not in ("properties", "$defs"):
                look(one, path)

    look(part, "")
    return sorted(found)
