"""Models of other tasks answer over HTTP what they predict in this process."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from full_stack_transformer.tasks.opening import OpenedTask, open_task
from tests.logged_process import running_service
from tests.serving.task_models import TASKS, make_task_models
from tests.tasks.small_tasks import are_close


@dataclass(frozen=True)
class _Served:
    http: httpx.Client
    here: dict[str, OpenedTask]


@pytest.fixture(scope="module")
def served(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Served]:
    """A generating model and one of each task, in one service."""
    root = tmp_path_factory.mktemp("tasks")
    options = make_task_models(root)
    here = {name: open_task(root / name, device="cpu") for name in TASKS}
    with (
        running_service(model_dir, *options, "--max_queue_size", "32") as (url, process),
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        yield _Served(http, here)
        assert process.stop() == 0
        assert "Traceback" not in process.log


def _ask(served: _Served, path: str, **body: Any) -> Any:
    answer = served.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _predicted(served: _Served, task: str, *rows: dict[str, Any]) -> list[Any]:
    return served.here[task].predict(rows)


@pytest.mark.parametrize(
    ("path", "task", "texts"),
    [
        ("/classify", "sequence_classification", ["the cat runs", "a tree"]),
        ("/label", "token_labelling", ["the cat runs again", "nothing"]),
        ("/fill_mask", "masked_lm", ["the <mask> runs", "<mask> and <mask>"]),
    ],
)
def test_texts_get_predictions(served: _Served, path: str, task: str, texts: list[str]) -> None:
    mask = served.here[task].task.tokenizer.mask_token
    texts = [text.replace("<mask>", str(mask)) for text in texts]
    found = _ask(served, path, texts=texts)
    assert found["model"] == task
    assert are_close(
        found["predictions"], _predicted(served, task, *({"text": one} for one in texts))
    )


def test_a_choice_and_an_answer(served: _Served) -> None:
    row = {"text": "which animal", "choices": ["the cat", "a tree", "nothing"]}
    [expected] = _predicted(served, "multiple_choice", row)
    found = _ask(served, "/choose", **row)
    assert are_close({key: found[key] for key in expected}, expected)
    row = {"question": "which animal", "context": "the tree and the cat again"}
    [expected] = _predicted(served, "span_selection", row)
    found = _ask(served, "/answer", **row)
    assert are_close({key: found[key] for key in expected}, expected)


def test_embeddings_are_those_of_the_model(served: _Served) -> None:
    texts = ["the cat runs", "a tree"]
    expected = [
        one["embedding"]
        for one in _predicted(served, "sentence_embedding", *({"text": text} for text in texts))
    ]
    assert are_close(_ask(served, "/embed", texts=texts)["embeddings"], expected)
    similarity = _ask(served, "/similarity", texts=[*texts, texts[0]])["similarity"]
    assert similarity[0][2] == pytest.approx(1.0, abs=1e-5)
    assert similarity[0][1] == pytest.approx(similarity[1][0], abs=1e-5)
    openai = _ask(served, "/v1/embeddings", input=texts)
    assert openai["model"] == "sentence_embedding"
    vector = openai["data"][0]["embedding"]
    assert sum(value * value for value in vector) == pytest.approx(1.0, abs=1e-5)
    tokenizer = served.here["sentence_embedding"].task.tokenizer
    num_tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert openai["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    # Without a model of that task the generating one stands in, when it is asked by name.
    [generating] = [
        model["model"]
        for model in served.http.get("/version").json()["models"]
        if model["task"] == "causal_lm"
    ]
    assert len(_ask(served, "/embed", texts=texts, model=generating)["embeddings"]) == 2


def test_the_version_names_tasks_and_the_mask(served: _Served) -> None:
    models = served.http.get("/version").json()["models"]
    assert {model["task"] for model in models} == {"causal_lm", *TASKS}
    [masked] = [model for model in models if model["task"] == "masked_lm"]
    assert masked["control_tokens"] == [served.here["masked_lm"].task.tokenizer.mask_token]
    assert masked["step"] == 3


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/classify", {"texts": []}, 422, "texts"),
        ("/classify", {"texts": ["a"], "text_pairs": ["b", "c"]}, 422, "text_pairs"),
        ("/classify", {"texts": ["a"], "model": "masked_lm"}, 400, "sequence_classification"),
        ("/classify", {"texts": ["a"], "model": "unheard of"}, 404, "no model"),
        ("/fill_mask", {"texts": ["no mask"]}, 400, "should hold"),
        ("/choose", {"text": "a", "choices": ["one"]}, 422, "choices"),
        ("/answer", {"question": "", "context": "a"}, 422, "question"),
        ("/embed", {"texts": ["a"], "model": "masked_lm"}, 400, "sentence_embedding"),
        ("/v1/embeddings", {"input": [1, 2], "model": "sentence_embedding"}, 400, "token ids"),
        ("/v1/completions", {"prompt": "a", "model": "masked_lm"}, 400, "does not generate text"),
    ],
)
def test_what_is_impossible_is_said_clearly(
    served: _Served, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = served.http.post(path, json=body)
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True)


def test_a_full_queue_of_texts_is_answered_early_and_predictions_go_on(served: _Served) -> None:
    """As many texts as slots and queue hold; who asks for another is told before the body is read."""
    tokens = {"max_tokens": 120, "min_tokens": 120}
    body = {"prompt": ["x"] * 4, "n": 16, **tokens, "model": "tiny-model"}
    with ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            filling = pool.submit(served.http.post, "/v1/completions", json=body)
            answers: list[httpx.Response] = []
            while not filling.done():
                answers.append(served.http.post("/v1/completions", content=b"no JSON at all"))
                if answers[-1].status_code == 429:
                    _ask(served, "/classify", texts=["the cat runs"])
                    assert "try again later" in answers[-1].json()["error"]["message"]
                    return
            assert filling.result().status_code == 200, filling.result().text
        pytest.fail(f"never refused early: {answers}")


def test_a_wrong_row_hurts_nobody_beside_it(served: _Served) -> None:
    """Requests that wait together are computed together; each hears of its own mistakes."""
    mask = str(served.here["masked_lm"].task.tokenizer.mask_token)
    texts = [f"the {mask} runs" if number % 3 else "no mask" for number in range(24)]
    together = threading.Barrier(len(texts))

    def ask(text: str) -> int:
        together.wait()
        return served.http.post("/fill_mask", json={"texts": [text]}).status_code

    with ThreadPoolExecutor(len(texts)) as pool:
        statuses = list(pool.map(ask, texts))
    assert statuses == [200 if mask in text else 400 for text in texts]
    metrics = served.http.get("/metrics").text
    assert 'fst_task_rows_total{model_name="masked_lm"}' in metrics
