"""Several models in one service, and the better one that training writes meanwhile."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from full_stack_transformer.errors import ModelError
from full_stack_transformer.serving.workers.models import OpeningOptions, open_served
from full_stack_transformer.storage import read_json, replace_directory, write_json
from tests.conftest import RunFst
from tests.hardening.service import Service
from tests.logged_process import running_service
from tests.serving.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that the tests replace."""
    return make_tiny_model(tmp_path_factory.mktemp("watched"), name="watched", seed=1)


@pytest.fixture(scope="module")
def service(model_dir: Path, watched: Path) -> Iterator[Service]:
    options = ("--watch", "--served_model_name", "good", "--more_models", f"other={model_dir}")
    with running_service(watched, *options) as (url, process):
        yield Service(url, process)
        assert process.stop() == 0
        assert "Traceback" not in process.log


def _text(service: Service, model: str) -> str:
    body = {"model": model, "prompt": "The", "max_tokens": 12, "temperature": 0, "logprobs": 0}
    answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["model"] == model
    choice = answer.json()["choices"][0]
    # Random weights often repeat a letter; its log-probability tells one model from another.
    return f"{choice['text']} {choice['logprobs']['token_logprobs']}"


def test_models_are_asked_by_name(service: Service) -> None:
    listed = httpx.get(f"{service.url}/v1/models", timeout=60).json()["data"]
    assert [model["id"] for model in listed] == ["good", "other"]
    assert _text(service, "good") != _text(service, "other")
    native = {"seed_text": "The", "generation_max_len": 12, "temperature": 0}
    texts = [
        httpx.post(f"{service.url}/generated_texts/", json=native | named, timeout=60).json()[
            "texts"
        ]
        for named in ({}, {"model": "good"}, {"model": "other"})
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_better_model_is_served_without_dropping_a_request(
    service: Service, watched: Path, tmp_path: Path
) -> None:
    """Clients ask all the time while the directory is replaced, first by a broken model."""
    before = _text(service, "good")
    stop, faults, texts = threading.Event(), [], set()

    def ask() -> None:
        while not stop.is_set():
            try:
                texts.add(_text(service, "good"))
            except (AssertionError, httpx.HTTPError) as error:
                faults.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        broken = tmp_path / "broken"
        shutil.copytree(watched, broken)
        (broken / "model.safetensors").write_bytes(b"no weights")
        replace_directory(broken, watched)
        service.process.wait_for_log("cannot be served")
        replace_directory(make_tiny_model(tmp_path, name="better", seed=7), watched)
        service.process.wait_for_log("now serving good at step 7")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults
    after = _text(service, "good")
    assert texts <= {before, after}
    assert after != before
    facts = httpx.get(f"{service.url}/version", timeout=60).json()["models"][0]
    assert (facts["step"], facts["num_swaps"]) == (7, 1)


def test_parts_that_do_not_belong_together_are_found_at_the_start(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path)
    settings = read_json(directory / "generation_config.json")
    write_json(directory / "generation_config.json", settings | {"eos_token_id": 99_999})
    with pytest.raises(ModelError, match=r"99999.*do not belong together"):
        open_served(None, directory, OpeningOptions("cpu", 1, "auto", None))


def test_several_workers_are_refused_with_an_explanation(model_dir: Path, run_fst: RunFst) -> None:
    done = run_fst("serve", model_dir, "--workers", "4")
    assert done.returncode == 2
    assert "behind a balancer" in done.stderr
