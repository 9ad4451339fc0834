"""The real service over HTTP: native routes, OpenAI's client, errors, the end."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from full_stack_transformer import __version__
from full_stack_transformer.arguments.sampling import SamplingParameters, as_keywords
from full_stack_transformer.generation.text_generator import TextGenerator
from tests.conftest import RunFst
from tests.logged_process import running_service


@pytest.fixture(scope="module")
def url(model_dir: Path) -> Iterator[str]:
    """A running service, which ends well."""
    with running_service(model_dir, "--max_batch_size", "2", "--max_queue_size", "3") as (
        url,
        process,
    ):
        yield url
        assert process.stop() == 0
        assert "Traceback" not in process.log


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http


def test_texts_are_those_of_the_library(http: httpx.Client, generator: TextGenerator) -> None:
    body = {"seed_text": "The reader", "generation_max_len": 20, "num_return_sequences": 2}
    body |= {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 3}
    answer = http.post("/generated_texts/", json=body)
    assert answer.status_code == 200
    sampling = SamplingParameters(
        max_new_tokens=20,
        temperature=0.9,
        top_k=50,
        top_p=0.9,
        repetition_penalty=1.1,
        seed=3,
    )
    given = as_keywords(sampling)
    expected = generator.generate("The reader", num_return_sequences=2, **given)
    assert answer.json() == {"texts": expected}


def test_ignored_words_never_appear(http: httpx.Client) -> None:
    body: dict[str, Any] = {
        "seed_text": "The",
        "ignored_words": ["e", "a"],
        "num_return_sequences": 2,
    }
    body["generation_max_len"] = 24
    for text in http.post("/generated_texts/", json=body).json()["texts"]:
        assert not set("ea") & set(text)


def test_the_openai_client_completes(client: openai.OpenAI, generator: TextGenerator) -> None:
    [model] = client.models.list().data
    assert model.id == "tiny-model"
    expected = generator.generate("A small model", max_new_tokens=16, seed=5)[0]
    answer = client.completions.create(
        model=model.id, prompt="A small model", max_tokens=16, seed=5
    )
    assert answer.choices[0].text == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(
        generator.model.tokenizer.encode_prompt("A small model")
    )
    assert answer.usage.completion_tokens == 16
    pieces = client.completions.create(
        model=model.id, prompt="A small model", max_tokens=16, seed=5, stream=True
    )
    chunks = list(pieces)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) > 5


def test_several_choices_stream_side_by_side(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="tiny-model", prompt="The", max_tokens=12, n=3, seed=1, echo=True
    )
    texts = ["", "", ""]
    for chunk in client.completions.create(
        model="tiny-model", prompt="The", max_tokens=12, n=3, seed=1, echo=True, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in whole.choices] == texts
    assert all(text.startswith("The") for text in texts)


def test_stop_strings_end_the_text(client: openai.OpenAI) -> None:
    plain = (
        client.completions.create(model="tiny-model", prompt="The", max_tokens=20, seed=1)
        .choices[0]
        .text
    )
    stop = plain[6:9]
    stopped = client.completions.create(
        model="tiny-model", prompt="The", max_tokens=20, seed=1, stop=stop
    )
    assert stopped.choices[0].text == plain[: plain.find(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_the_openai_client_understands_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context is 128 tokens"):
        client.completions.create(model="tiny-model", prompt="word " * 100, max_tokens=100)
    with pytest.raises(openai.BadRequestError, match="context is 128 tokens"):
        client.completions.create(
            model="tiny-model", prompt="word " * 100, max_tokens=100, stream=True
        )
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny-model", prompt="x", temperature=-1)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"seed_text": 1}',
        b'{"seed_text": "x", "top_p": NaN}',
        b'{"seed_text": "x", "temperature": Infinity}',
        b'{"seed_text": "x", "temperature": 1e999}',
        b'{"seed_text": "\\ud800"}',
        b'{"seed_text": "x", "generation_max_len": -2}',
        b'{"seed_text": "x", "generation_max_len": 9223372036854775808}',
        b'{"seed_text": "x", "ignored_words": [""]}',
        b"\xff\xfe",
        b'{"seed_text": "' + b"x" * 300_000 + b'"}',
        b"[" * 100_000,
        b" " * 3_000_000,
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
def test_bad_bodies_are_refused_in_few_words(body: bytes, http: httpx.Client) -> None:
    for path, expected in {"/generated_texts/": 422, "/v1/completions": 400}.items():
        if path.startswith("/v1/"):
            body = body.replace(b"seed_text", b"prompt").replace(
                b"generation_max_len", b"max_tokens"
            )
        answer = http.post(path, content=body)
        assert answer.status_code == (413 if len(body) > 1_048_576 else expected)
        assert set(answer.json()) == {"error"}
        assert len(answer.content) < 1000
        assert b"xxxx" not in answer.content


def test_a_full_queue_says_try_again_later(http: httpx.Client) -> None:
    """Five texts fill two slots and a queue of three; clients ask for so many until one is refused."""
    body = {"prompt": "x", "max_tokens": 120, "min_tokens": 120, "n": 5}
    refused: list[httpx.Response] = []

    def ask() -> None:
        while not refused:
            answer = http.post("/v1/completions", json=body)
            if answer.status_code != 200:
                refused.append(answer)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in refused:
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"


def test_more_than_is_ever_taken_at_once_is_refused_for_good(http: httpx.Client) -> None:
    body = {"seed_text": "x", "num_return_sequences": 6}
    answer = http.post("/generated_texts/", json=body)
    assert answer.status_code == 400
    assert "at most 5" in answer.json()["error"]["message"]


def test_the_service_tells_what_it_serves(http: httpx.Client) -> None:
    version = http.get("/version").json()
    assert version["package_version"] == __version__
    assert version["model"] == "tiny-model"
    assert version["description"]["validation_loss"] == 5.5
    [facts] = version["models"]
    assert (facts["step"], facts["context_tokens"], facts["num_swaps"]) == (0, 128, 0)
    for path in ("/health", "/health_check/"):
        assert http.get(path).json() == {"status": "ok"}


def test_the_documentation_asks_no_other_host(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200
    assert "https://" not in page.text
    schema = http.get("/openapi.json").json()
    body = schema["paths"]["/generated_texts/"]["post"]["requestBody"]
    properties = body["content"]["application/json"]["schema"]["properties"]
    assert all("description" in facts for facts in properties.values())


def test_clients_at_once_get_what_they_would_get_alone(
    http: httpx.Client, generator: TextGenerator
) -> None:
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        body = {"seed_text": f"Number {number}", "generation_max_len": 30, "seed": number}
        texts[number] = http.post("/generated_texts/", json=body).json()["texts"][0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, text in texts.items():
        expected = generator.generate(f"Number {number}", max_new_tokens=30, seed=number)
        assert [text] == expected
    assert len(texts) == 5


def test_a_client_that_goes_away_frees_its_slot(http: httpx.Client) -> None:
    """More streams than slots and queue together, all dropped after their first piece."""
    body = {"prompt": "x", "max_tokens": 100, "stream": True}
    for _ in range(12):
        with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            assert next(answer.iter_lines()).startswith("data: ")
    assert http.post("/generated_texts/", json={"seed_text": "x"}).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_running_requests_finish(model_dir: Path, number: signal.Signals) -> None:
    with running_service(model_dir) as (url, process):
        body = {"prompt": "x", "max_tokens": 120, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        last = json.loads(events[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] in ("length", "stop")
        assert process.wait() == (130 if number == signal.SIGINT else 0)
        assert "Traceback" not in process.log


def test_a_port_in_use_is_one_sentence(model_dir: Path, run_fst: RunFst) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_fst("serve", model_dir, "--port", str(port))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_model_is_one_sentence(tmp_path: Path, run_fst: RunFst) -> None:
    done = run_fst("serve", tmp_path)
    assert done.returncode == 1
    assert "found an empty directory" in done.stderr
    assert len(done.stderr.splitlines()) == 1
