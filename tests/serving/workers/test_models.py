"""Several models in one service, and the better one that training writes meanwhile."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from full_stack_transformer.errors import ModelError
from full_stack_transformer.serving.workers.opening import OpeningOptions, open_served
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
    options = (
        *("--watch", "--served_model_name", "good", "--more_models", f"other={model_dir}"),
        *("--draft_model", str(watched)),
    )
    with running_service(watched, *options) as (url, process):
        yield Service(url, process)
        assert process.stop() == 0
        assert "Traceback" not in process.log


def _log_probability(service: Service, model: str) -> float:
    """Of the likeliest first token, which tells one model from another.

    Through PyTorch its last digits depend on the requests beside it, and with them later tokens.
    """
    body = {"model": model, "prompt": "The", "max_tokens": 12, "temperature": 0, "logprobs": 0}
    answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["model"] == model
    found: float = answer.json()["choices"][0]["logprobs"]["token_logprobs"][0]
    return found


def _is_close(one: float, other: float) -> bool:
    return abs(one - other) < 0.01


def test_models_are_asked_by_name(service: Service) -> None:
    listed = httpx.get(f"{service.url}/v1/models", timeout=60).json()["data"]
    assert [model["id"] for model in listed] == ["good", "other"]
    assert not _is_close(_log_probability(service, "good"), _log_probability(service, "other"))
    native = {"seed_text": "The", "generation_max_len": 12, "temperature": 0}
    texts = [
        httpx.post(f"{service.url}/generated_texts/", json=native | named, timeout=60).json()[
            "texts"
        ]
        for named in ({}, {"model": "good"}, {"model": "other"})
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_draft_model_guesses_for_the_first_model_and_is_counted(service: Service) -> None:
    def asked(model: str) -> str:
        body = {"model": model, "prompt": "The", "max_tokens": 60, "temperature": 0}
        answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60)
        text: str = answer.json()["choices"][0]["text"]
        return text

    good, other = httpx.get(f"{service.url}/version", timeout=60).json()["models"]
    if not good["computed_by"].startswith("C++"):
        pytest.skip("through PyTorch only who asks for a draft has guesses")
    assert good["draft_model"]["model"] == "watched" and not good["draft_model"]["is_broken"]
    assert "int8" in good["draft_model"]["computed_by"]
    assert other["draft_model"] is None
    assert asked("good") and asked("other")
    lines = httpx.get(f"{service.url}/metrics", timeout=60).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    labels = 'kind="draft",model_name="good"'
    proposed, accepted, drafts = (
        float(values[f"vllm:spec_decode_num_{name}_total{{{labels}}}"])
        for name in ("draft_tokens", "accepted_tokens", "drafts")
    )
    assert proposed >= accepted > 0 < drafts
    assert f'fst_guesses_are_off{{{labels},num_texts="1"}}' in values
    assert not [one for one in values if 'kind="draft",model_name="other"' in one]


def test_a_better_model_is_served_without_dropping_a_request(
    service: Service, watched: Path, tmp_path: Path
) -> None:
    """Clients ask all the time while the directory is replaced, first by a broken model."""
    before = _log_probability(service, "good")
    stop, faults, found = threading.Event(), [], list[float]()

    def ask() -> None:
        while not stop.is_set():
            try:
                found.append(_log_probability(service, "good"))
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
    after = _log_probability(service, "good")
    assert not _is_close(before, after)
    assert all(_is_close(one, before) or _is_close(one, after) for one in found)
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
    assert "behind a load balancer" in done.stderr
