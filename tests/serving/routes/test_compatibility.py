"""What other services' clients send: neutral values mean "not given", unknown fields are named."""

import json
from typing import Any

import httpx
import openai
import pytest

from tests.serving.conftest import KeyedService

MODEL = "tiny-model"
HELLO: dict[str, Any] = {"role": "user", "content": "Hello?"}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "The", "max_tokens": 3, "temperature": 0}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [HELLO], "max_tokens": 3, "temperature": 0}

# The neutral values of requests of OpenAI, vLLM and llama.cpp.
NEUTRAL: dict[str, Any] = {
    # OpenAI
    **dict.fromkeys(("best_of", "logit_bias", "logprobs", "n", "presence_penalty", "seed", "stop")),
    **dict.fromkeys(("stream", "stream_options", "suffix", "top_p", "user", "frequency_penalty")),
    # vLLM
    "top_k": -1,
    "min_p": 0,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": True,
    "stop_token_ids": [],
    "priority": 0,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "prompt_logprobs")),
    **dict.fromkeys(("guided_grammar", "guided_decoding_backend", "truncate_prompt_tokens")),
    "ignore_eos": False,
    "allowed_token_ids": None,
    "bad_words": [],
    "logits_processors": None,
    "return_tokens_as_token_ids": None,
    "echo": False,
    "structured_outputs": None,
    "request_id": "a",
    "cache_salt": None,
    "kv_transfer_params": None,
    "vllm_xargs": {},
    # llama.cpp
    "n_predict": -1,
    "cache_prompt": True,
    "mirostat": 0,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "tfs_z": 1.0,
    "typical_p": 1.0,
    "id_slot": -1,
    "n_keep": 0,
    "n_probs": 0,
    "min_keep": 0,
    "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ["\n", ":"],
    "repeat_last_n": 64,
    "repeat_penalty": 1.0,
    "grammar": "",
    "samplers": ["dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
    "lora": [],
    "t_max_predict_ms": -1,
    "top_n_sigma": -1.0,
    "n_indent": 0,
    "return_tokens": False,
    "timings_per_token": False,
    "post_sampling_probs": False,
    "json_schema": None,
}
ONLY_COMPLETION: dict[str, Any] = {
    "best_of": 1,
    "logprobs": False,
    "suffix": "",
    "stop": "",
    "seed": -1,
    "max_tokens": 3,
}
ONLY_CHAT: dict[str, Any] = {
    **dict.fromkeys(("tools", "functions", "function_call", "tool_choice", "audio", "prediction")),
    **dict.fromkeys(
        ("modalities", "web_search_options", "parallel_tool_calls", "reasoning_effort")
    ),
    "logprobs": False,
    "top_logprobs": 0,
    "add_generation_prompt": True,
    "chat_template": None,
    "chat_template_kwargs": {},
    "documents": [],
    "add_special_tokens": False,
    "stop": [],
    "response_format": {"type": "text", "json_schema": None},
    "seed": -1,
    "verbosity": None,
    "metadata": {},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "",
}


def _text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers
    [choice] = answer.json()["choices"]
    return str(choice.get("text") or choice["message"]["content"])


@pytest.mark.parametrize(
    ("path", "body", "own"),
    [("completions", COMPLETION, ONLY_COMPLETION), ("chat/completions", CHAT, ONLY_CHAT)],
    ids=["completions", "chat"],
)
def test_neutral_values_change_nothing(
    http: httpx.Client, path: str, body: dict[str, Any], own: dict[str, Any]
) -> None:
    plain = _text(http.post(f"/v1/{path}", json=body | {"repetition_penalty": 1.0}))
    assert _text(http.post(f"/v1/{path}", json=NEUTRAL | own | body)) == plain
    every = dict.fromkeys((*NEUTRAL, *ONLY_CHAT, *ONLY_COMPLETION, "max_completion_tokens"))
    _text(http.post(f"/v1/{path}", json={**every, **body}))


@pytest.mark.parametrize(
    "neutral",
    [
        *({"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto", "tools": []}),
        *({"function_call": "none"}, {"modalities": ["text"]}, {"top_k": 0}, {"max_tokens": -1}),
        *({"stream_options": {}}, {"stream_options": {"include_usage": False}}, {"user": ""}),
        *({"logit_bias": {}}, {"logit_bias": []}, {"ignored_words": []}, {"response_format": {}}),
        {"samplers": "edskypmxt"},
    ],
    ids=str,
)
def test_what_is_empty_is_not_given(http: httpx.Client, neutral: dict[str, Any]) -> None:
    assert _text(http.post("/v1/chat/completions", json=CHAT | neutral))


@pytest.mark.parametrize(
    ("path", "wish"),
    [
        ("chat/completions", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("chat/completions", {"tool_choice": "required"}),
        ("chat/completions", {"modalities": ["text", "audio"]}),
        ("chat/completions", {"chat_template": "{{ 1 }}"}),
        ("chat/completions", {"add_generation_prompt": False}),
        ("chat/completions", {"echo": True}),
        ("completions", {"use_beam_search": True}),
        ("completions", {"length_penalty": 0.5}),
        ("completions", {"guided_choice": ["a", "b"]}),
        ("completions", {"stop_token_ids": [1]}),
        ("completions", {"skip_special_tokens": False}),
        ("completions", {"mirostat": 2}),
        ("completions", {"tfs_z": 0.9}),
        ("completions", {"grammar": 'root ::= "a"'}),
        ("completions", {"samplers": ["temperature", "top_k", "top_p", "min_p"]}),
        ("completions", {"n_predict": 5}),  # and max_tokens is 3
    ],
    ids=str,
)
def test_what_would_change_the_answer_is_refused_by_name(
    http: httpx.Client, path: str, wish: dict[str, Any]
) -> None:
    body = CHAT if path.startswith("chat") else COMPLETION
    answer = http.post(f"/v1/{path}", json=body | wish)
    [name] = wish
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name)
    assert error["message"] == f"{name}: not supported by this service; leave it out"


def test_llama_cpps_names_do_what_ours_do(http: httpx.Client) -> None:
    body = {"prompt": "The", "temperature": 0, "n_predict": 2, "repeat_penalty": 1.3}
    answer = http.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 2
    ours = {"prompt": "The", "temperature": 0, "max_tokens": 2, "repetition_penalty": 1.3}
    same = http.post("/v1/completions", json=ours).json()
    assert answer["choices"] == same["choices"]


def test_any_seed_of_64_bits_is_one(http: httpx.Client) -> None:
    bodies = [
        COMPLETION | {"temperature": 1, "seed": seed} for seed in (-7, -7, -(2**63), 2**63 - 1)
    ]
    texts = [_text(http.post("/v1/completions", json=body)) for body in bodies]
    assert texts[0] == texts[1]


# ---------------------------------------------------------------------- what comes back


def test_an_answer_comes_back_whole(client: openai.OpenAI) -> None:
    """As OpenAI's clients do it: the message that was received is the next request's."""
    messages: list[Any] = [HELLO]
    for _ in range(3):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=3, logprobs=True, top_logprobs=2
        )
        messages += [answer.choices[0].message, HELLO]
    dumped: list[Any] = [one if isinstance(one, dict) else one.model_dump() for one in messages]
    client.chat.completions.create(model=MODEL, messages=dumped, max_tokens=3)


def test_every_part_of_an_answer_comes_back(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=CHAT | {"logprobs": True, "top_logprobs": 1})
    [choice] = answer.json()["choices"]
    returned = {**choice, **choice["message"], "usage": answer.json()["usage"]}
    again = http.post("/v1/chat/completions", json=CHAT | {"messages": [HELLO, returned, HELLO]})
    assert again.status_code == 200
    names = {
        f"messages.{name}" for name in ("index", "message", "logprobs", "finish_reason", "usage")
    }
    assert set(again.headers["x-ignored-fields"].split(", ")) == names


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": None, "function_call": None},
        {"role": "assistant"},
        {"role": "assistant", "content": "", "audio": None, "annotations": [], "tool_calls": []},
        {
            "role": "assistant",
            "content": "x",
            "refusal": None,
            "reasoning_content": "so",
            "name": "",
        },
        {"role": "assistant", "content": []},
        {"role": "developer", "content": "Be short.", "name": "me"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "x", "cache_control": {"type": "a"}}],
        },
    ],
    ids=str,
)
def test_messages_of_other_clients_are_read(http: httpx.Client, message: dict[str, Any]) -> None:
    _text(http.post("/v1/chat/completions", json=CHAT | {"messages": [message, HELLO]}))


@pytest.mark.parametrize(
    ("message", "place", "said"),
    [
        ({"role": "user", "content": None}, "content", "should be a text, or a list of parts"),
        ({"role": "user"}, "content", "is missing"),
        ({"role": "tool", "content": "x"}, "role", "'system', 'developer', 'user' or 'assistant'"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "tool_calls", "not supported"),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "refusal", "not supported"),
        (HELLO | {"content": [{"type": "text"}]}, "content[0].text", "is missing"),
        (HELLO | {"content": [{"type": "image_url"}]}, "content[0].type", "'text'"),
        (HELLO | {"content": "x" * 200_001}, "content", "not have more than 200,000 characters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_in_a_list_names_its_place(
    http: httpx.Client, message: dict[str, Any], place: str, said: str
) -> None:
    answer = http.post("/v1/chat/completions", json=CHAT | {"messages": [HELLO, message]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, f"messages[1].{place}")
    assert error["message"].startswith(f"messages[1].{place}: ")
    assert said in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "place", "said"),
    [
        ("completions", {"prompt": ["a", 1]}, "prompt[1]", "valid string"),
        ("completions", {"prompt": [[1, 2], [3, "x"]]}, "prompt[1][1]", "valid integer"),
        ("completions", {"prompt": [[1], []]}, "prompt[1]", "must not be empty"),
        ("completions", {"prompt": ["a"] * 2049}, "prompt", "not have more than 2,048 items"),
        ("completions", {"prompt": [[1], [99_999]]}, None, "prompt[1]: token ids must be between"),
        (
            "completions",
            {"prompt": ["a", "word " * 200]},
            "prompt",
            "prompt[1]: the model's context",
        ),
        ("completions", {"prompt": ["a"] * 129}, None, "at most 128 texts"),
        ("completions", {"n": 129}, "n", "less than or equal to 128"),
        ("embeddings", {"input": ["a", ""]}, "input[1]", "must not be empty"),
        ("embeddings", {"input": ["a"] * 2049}, "input", "not have more than 2,048 items"),
        ("embeddings", {"input": []}, "input", "should be a text, a list of token ids"),
        ("embeddings", {"input": ["a", "word " * 200]}, "input", "input[1]: the model's context"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_elements_are_named(
    http: httpx.Client, path: str, body: dict[str, Any], place: str | None, said: str
) -> None:
    answer = http.post(f"/v1/{path}", json={"model": MODEL, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, place), error
    assert said in error["message"]


def test_a_context_that_is_too_short_has_openais_code(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "word " * 200}]
    with pytest.raises(openai.BadRequestError) as chat:
        client.chat.completions.create(model=MODEL, messages=long)
    with pytest.raises(openai.BadRequestError) as completion:
        client.completions.create(model=MODEL, prompt="a", max_tokens=500)
    with pytest.raises(openai.BadRequestError) as embedding:
        client.embeddings.create(model=MODEL, input="word " * 200)
    codes = [(one.value.code, one.value.param) for one in (chat, completion, embedding)]
    names = ("messages", "prompt", "input")
    assert codes == [("context_length_exceeded", name) for name in names]


# ---------------------------------------------------------------------- unknown fields


def test_unknown_fields_are_named_once(http: httpx.Client, keyed_service: KeyedService) -> None:
    body = CHAT | {"of_a_proxy": 1, "<b>": "a secret", "messages": [HELLO | {"of_a_tool": [1]}] * 2}
    for _ in range(2):
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        named = answer.headers["x-ignored-fields"].split(", ")
        assert sorted(named) == ["(other)", "messages.of_a_tool", "of_a_proxy"]
    log = keyed_service.process.log
    assert log.count("of_a_proxy") == log.count("of_a_tool") == 1
    assert "secret" not in log


def test_many_unknown_fields_are_not_all_named(http: httpx.Client) -> None:
    body = COMPLETION | {f"field_{number}": number for number in range(1000)}
    answer = http.post("/v1/completions", json=body)
    assert answer.headers["x-ignored-fields"].count(",") == 16
    streamed = http.post("/v1/completions", json=COMPLETION | {"stream": True, "a_new_one": 1})
    assert streamed.headers["x-ignored-fields"] == "a_new_one"


def test_strict_fields_are_refused(strict_http: httpx.Client) -> None:
    answer = strict_http.post("/v1/completions", json=COMPLETION | {"of_a_proxy": 1})
    assert answer.status_code == 400
    message = "of_a_proxy: this route does not know this field; leave it out"
    assert answer.json()["error"]["message"] == message
    nested = CHAT | {"messages": [HELLO | {"of_a_tool": 1}]}
    answer = strict_http.post("/v1/chat/completions", json=nested)
    assert answer.json()["error"]["param"] == "messages[0].of_a_tool"
    # What we send we accept all the same.
    answer = strict_http.post("/v1/chat/completions", json=CHAT)
    messages = [HELLO, answer.json()["choices"][0]["message"], HELLO]
    _text(strict_http.post("/v1/chat/completions", json=CHAT | {"messages": messages} | ONLY_CHAT))


# ---------------------------------------------------------------------- usage


def test_usage_of_every_piece_counts_its_own_text(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = COMPLETION | {
        "prompt": ["The", "A small model"],
        "stream": True,
        "stream_options": options,
    }
    lines = http.post("/v1/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    last = chunks.pop()
    counted: dict[int, list[int]] = {0: [], 1: []}
    lengths: dict[int, set[int]] = {0: set(), 1: set()}
    for chunk in chunks:
        index = chunk["choices"][0]["index"]
        counted[index].append(chunk["usage"]["completion_tokens"])
        lengths[index].add(chunk["usage"]["prompt_tokens"])
    for values in counted.values():
        assert values == sorted(values)
        assert values[-1] == 3
    assert [len(one) for one in lengths.values()] == [1, 1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["prompt_tokens"] == sum(sum(one) for one in lengths.values())
    # As with vLLM, only together with include_usage.
    body["stream_options"] = {"continuous_usage_stats": True}
    assert '"usage"' not in http.post("/v1/completions", json=body).text
