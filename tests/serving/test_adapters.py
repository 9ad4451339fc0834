"""Adapters of a running service: models of their own, loaded and unloaded while texts run."""

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from full_stack_transformer.errors import ModelError, RequestError
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.serving.client import ServiceClient
from full_stack_transformer.serving.workers.adapters import Adapters, open_adapters
from full_stack_transformer.serving.workers.engine_worker import EngineWorker
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.opening import OpeningOptions, open_served
from full_stack_transformer.serving.workers.served import ServedModel
from tests.generation.small_adapters import write_adapter
from tests.logged_process import LoggedProcess, running_service
from tests.serving.browser import running_browser, visit
from tests.serving.conftest import KEY, KeyedService
from tests.serving.tiny_model import make_tiny_model, one_core

# PEFT asks transformers by a name that will go.
pytestmark = [
    pytest.mark.usefixtures("decoder"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

ADMIN_KEY = "an-admin-key-of-the-tests"
_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_TEMPLATE = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}assistant> "


@pytest.fixture(scope="module")
def root(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters a, b and c of the model; b has a chat template, and beside them is one that is outside."""
    root = tmp_path_factory.mktemp("shelf") / "root"
    backbone = AutoModelForCausalLM.from_pretrained(model_dir)
    for number, name in enumerate(("a", "b", "c", "../outside"), 1):
        write_adapter(
            root / name,
            backbone,
            seed=number,
            rank=4 * number,
            base_model_name_or_path=str(model_dir),
        )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / file, root / "b" / file)
    (root / "b" / "chat_template.jinja").write_text(_TEMPLATE)
    _spoil(root, model_dir)
    return root


def _spoil(root: Path, model_dir: Path) -> None:
    """Adapters that cannot be served, for one reason each."""
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    for name in (
        "cut",
        "pickled",
        "dora",
        "nan",
        "endless",
        "linked",
        "linked_below",
        "other_words",
        "half",
        "pipe",
        "bad_words",
    ):
        shutil.copytree(root / "a", root / name)
    content = (root / "a" / weights).read_bytes()
    (root / "cut" / weights).write_bytes(content[:-100])
    (root / "pickled" / weights).unlink()
    torch.save({"x": torch.ones(1)}, root / "pickled" / "adapter_model.bin")
    said = json.loads((root / "a" / config).read_text())
    (root / "dora" / config).write_text(json.dumps({**said, "use_dora": True}))
    (root / "nan" / config).write_text(json.dumps({**said, "lora_alpha": float("nan")}))
    (root / "endless" / config).write_text(json.dumps({**said, "r": float("inf")}))
    (root / "linked_below" / "additional_chat_templates").mkdir()
    below = root / "linked_below" / "additional_chat_templates" / "default.jinja"
    below.symlink_to(root / ".." / "outside" / weights)
    (root / "linked" / weights).unlink()
    (root / "linked" / weights).symlink_to(root / ".." / "outside" / weights)
    (root / "half" / config).write_text(json.dumps(said)[:40])
    (root / "away").symlink_to(root.parent / "outside")
    (root / "circle").symlink_to(root / "circle")
    os.mkfifo(root / "pipe" / "description.json")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (root / "bad_words" / file).write_text("{")
    other = make_tiny_model(root.parent / "others", name="other", preset="micro")
    write_adapter(root / "of_other", AutoModelForCausalLM.from_pretrained(other), seed=9)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / file, root / "other_words" / file)


@dataclass(frozen=True)
class Shelf:
    """A service of a model with the adapter `first`, which may load those below a root."""

    http: httpx.Client
    process: LoggedProcess

    def text(self, model: str, **given: Any) -> str:
        """A continuation by a model."""
        answer = self.http.post("/v1/completions", json=_wanted(model, **given))
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        return str(answer.json()["choices"][0]["text"])

    def load(self, name: str, path: str, key: str = ADMIN_KEY, **given: Any) -> httpx.Response:
        return self._as_admin(_LOAD, {"lora_name": name, "lora_path": path, **given}, key)

    def unload(self, name: str, key: str = ADMIN_KEY) -> httpx.Response:
        return self._as_admin(_UNLOAD, {"lora_name": name}, key)

    def _as_admin(self, route: str, body: dict[str, Any], key: str) -> httpx.Response:
        return self.http.post(route, json=body, headers={"authorization": f"Bearer {key}"})

    def names(self) -> list[str]:
        return [one["id"] for one in self.http.get("/v1/models").json()["data"]]


def _wanted(model: str, **given: Any) -> dict[str, Any]:
    usual = {"prompt": "The reader", "max_tokens": 40, "temperature": 1, "seed": 3}
    return {**usual, "model": model, **given}


@pytest.fixture(scope="module")
def shelf(model_dir: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    keys, admin_keys = (tmp_path_factory.mktemp("keys") / name for name in ("keys", "admin_keys"))
    keys.write_text(KEY + "\n")
    admin_keys.write_text(ADMIN_KEY + "\n")
    options = (
        *("--weights_dtype", "float32", "--adapters", f"first={root / 'a'}", "--max_adapters", "3"),
        *("--adapters_root", str(root), "--admin_keys_file", str(admin_keys)),
        *("--api_keys_file", str(keys), "--log_format", "json"),
    )
    headers = {"authorization": f"Bearer {KEY}"}
    with (
        running_service(model_dir, *options) as (url, process),
        httpx.Client(base_url=url, headers=headers, timeout=60) as http,
    ):
        yield Shelf(http, process)
        assert process.stop() == 0
        assert "Traceback" not in process.log
        assert ADMIN_KEY not in process.log
        assert '"model": "first"' in process.log


@pytest.fixture(scope="module")
def merged(root: Path) -> dict[str, TextGenerator]:
    """The same adapters added to the weights of their base."""
    with one_core():
        return {
            name: TextGenerator.open(root / name, device="cpu", weights_dtype="float32")
            for name in ("a", "b", "c")
        }


# ------------------------------------------------------------------ models of their own


def test_an_adapter_is_a_model_and_answers_as_the_merged_one(
    shelf: Shelf, merged: dict[str, TextGenerator]
) -> None:
    base, first = shelf.http.get("/v1/models").json()["data"]
    assert (base["parent"], first["id"], first["parent"]) == (None, "first", "tiny-model")
    assert shelf.http.get("/v1/models/first").json() == first
    facts = shelf.http.get("/version").json()["models"][1]
    assert (facts["model"], facts["parent"], facts["checkpoint"]) == ("first", "tiny-model", "a")
    given: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0}
    expected = merged["a"].generate("The reader", **given)[0]
    assert shelf.text("first", temperature=0) == expected
    given |= {"temperature": 1, "seed": 3}
    expected = merged["a"].generate("The reader", **given)[0]
    assert shelf.text("first") == expected != shelf.text("tiny-model")
    native = {"seed_text": "The reader", "generation_max_len": 40, "temperature": 1, "seed": 3}
    answer = shelf.http.post("/generated_texts/", json={**native, "model": "first"})
    assert answer.json()["texts"] == [expected]
    answer = shelf.http.post("/v1/embeddings", json={"model": "first", "input": "The reader"})
    vector = merged["a"].embed(["The reader"])[0]
    found = answer.json()["data"][0]["embedding"]
    assert np.allclose(found, vector / np.linalg.norm(vector), atol=1e-4)
    metrics = shelf.http.get("/metrics").text
    assert 'vllm:generation_tokens_total{model_name="first"}' in metrics
    assert 'vllm:num_requests_running{model_name="first"}' in metrics
    assert 'fst_kv_blocks{model_name="first"' not in metrics


def test_an_adapter_brings_its_chat_template(
    shelf: Shelf, merged: dict[str, TextGenerator]
) -> None:
    assert shelf.load("talker", "b").status_code == 200
    chat = {"model": "talker", "messages": [{"role": "user", "content": "The reader"}]}
    sampling = {"temperature": 1, "seed": 3, "max_tokens": 30}
    answer = shelf.http.post("/v1/chat/completions", json={**chat, **sampling}).json()
    expected = merged["b"].generate(
        merged["b"].template.encode(
            [{"role": "user", "content": "The reader"}], merged["b"].model.tokenizer
        ),
        max_new_tokens=30,
        temperature=1,
        seed=3,
    )
    assert answer["model"] == "talker"
    assert answer["choices"][0]["message"]["content"] == expected[0]
    facts = {one["model"]: one for one in shelf.http.get("/version").json()["models"]}
    assert facts["talker"]["has_chat_template"] and not facts["tiny-model"]["has_chat_template"]
    assert shelf.unload("talker").text == "Success: LoRA adapter 'talker' removed successfully."


def test_the_bot_is_told_of_adapters(shelf: Shelf) -> None:
    async def described() -> list[str]:
        async with ServiceClient(str(shelf.http.base_url), api_key=KEY) as client:
            return [one.model for one in await client.describe_models()]

    assert asyncio.run(described()) == ["tiny-model", "first"]


def test_streams_of_different_adapters_are_as_if_alone(shelf: Shelf) -> None:
    assert shelf.load("second", "b").text == "Success: LoRA adapter 'second' added successfully."
    wanted = [
        _wanted(model, seed=seed, max_tokens=60, n=2)
        for seed in range(3)
        for model in ("tiny-model", "first", "second")
    ]
    alone = [_streamed(shelf, one) for one in wanted]
    with ThreadPoolExecutor(len(wanted)) as pool:
        together = list(pool.map(lambda one: _streamed(shelf, one), wanted))
    assert together == alone
    assert len({*map(tuple, alone)}) == len(wanted)
    assert shelf.unload("second").status_code == 200


def _streamed(
    shelf: Shelf, wanted: dict[str, Any], begun: threading.Event | None = None
) -> list[str]:
    """The texts of a stream, all of whose pieces name its model."""
    texts = [""] * wanted.get("n", 1)
    with shelf.http.stream("POST", "/v1/completions", json={**wanted, "stream": True}) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            piece = json.loads(line.removeprefix("data: "))
            assert piece["model"] == wanted["model"], piece
            texts[piece["choices"][0]["index"]] += piece["choices"][0]["text"]
            if begun is not None:
                begun.set()
    return texts


# ------------------------------------------------------------------ loading and unloading


def test_streams_go_on_while_adapters_come_and_go(shelf: Shelf) -> None:
    assert shelf.load("passing", "c").status_code == 200
    wanted = [
        _wanted("passing", max_tokens=100, n=8),
        _wanted("tiny-model", max_tokens=100, n=8),
    ]
    alone = [_streamed(shelf, one) for one in wanted]
    begun = [threading.Event() for _ in wanted]
    with ThreadPoolExecutor(len(wanted)) as pool:
        streams = [pool.submit(_streamed, shelf, *one) for one in zip(wanted, begun, strict=True)]
        assert all(event.wait(60) for event in begun)
        assert shelf.unload("passing").status_code == 200
        answer = shelf.http.post("/v1/completions", json=_wanted("passing"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        # Another content under the same name, while texts with the old one go on.
        assert shelf.load("passing", "b").status_code == 200
        assert [stream.result() for stream in streams] == alone
    assert _streamed(shelf, wanted[0]) != alone[0]
    assert shelf.load("passing", "c").status_code == 400
    assert shelf.load("passing", "c", load_inplace=True).status_code == 200
    assert _streamed(shelf, wanted[0]) == alone[0]
    assert shelf.unload("passing").status_code == 200
    assert shelf.unload("passing").status_code == 404
    assert shelf.names() == ["tiny-model", "first"]


def test_only_an_admin_key_loads_and_unloads(shelf: Shelf, keyed_service: KeyedService) -> None:
    for key, status, code in (
        ("wrong", 401, "invalid_api_key"),
        (ADMIN_KEY[:-1], 401, "invalid_api_key"),
        (KEY, 403, "admin_key_required"),
    ):
        for answer in (shelf.load("x", "a", key), shelf.unload("first", key)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert shelf.http.post(f"{_LOAD}/", content=b"{").status_code == 403
    # It opens the other routes too.
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    assert shelf.http.get("/v1/models", headers=headers).status_code == 200
    # Where there is no admin key nobody may.
    body = {"lora_name": "x", "lora_path": "a"}
    headers = {"authorization": f"Bearer {keyed_service.key}"}
    answer = httpx.post(keyed_service.url + _LOAD, json=body, headers=headers, timeout=60)
    assert answer.status_code == 403
    assert shelf.names() == ["tiny-model", "first"]


_REFUSED: dict[str, tuple[str, int, str]] = {
    "../outside": ("up", 400, "must lie below the directory"),
    "a/../../outside": ("up again", 400, "must lie below the directory"),
    "/etc": ("absolute", 400, "must lie below the directory"),
    "away": ("a link", 400, "must lie below the directory"),
    "linked": ("a linked file", 400, "a link to a file outside"),
    "a\0": ("null byte", 400, "cannot be read below the directory"),
    "circle": ("a circle of links", 400, "cannot be read below the directory"),
    "y" * 200: ("a long name", 404, "there is no adapter directory"),
    "pipe": ("a pipe", 400, "neither file nor directory"),
    "bad_words": ("a broken tokenizer", 400, "lora_path"),
    "missing": ("missing", 404, "there is no adapter directory"),
    ".": ("the root itself", 404, "there is no adapter directory"),
    "a/adapter_config.json": ("a file", 404, "there is no adapter directory"),
    "cut": ("half-written", 400, "lora_path/adapter_model.safetensors cannot be read"),
    "half": ("half a config", 400, "lora_path is no adapter"),
    "pickled": ("pickled", 400, "has no adapter_model.safetensors"),
    "dora": ("DoRA", 400, "merge the two instead: fst merge"),
    "nan": ("NaN", 400, "its alpha is no number"),
    "endless": ("an infinite rank", 400, "its rank or its alpha is no number"),
    "linked_below": ("a linked file below it", 400, "a link to a file outside"),
    "of_other": ("another base", 400, "the adapter lora_path does not fit"),
    "other_words": ("another tokenizer", 400, "has a tokenizer of"),
}


@pytest.mark.parametrize("path", _REFUSED, ids=[one[0] for one in _REFUSED.values()])
def test_what_cannot_be_served_is_refused_in_one_sentence(
    shelf: Shelf, root: Path, path: str
) -> None:
    _, status, words = _REFUSED[path]
    answer = shelf.load("x", path)
    message = answer.json()["error"]["message"]
    assert (answer.status_code, words in message) == (status, True), message
    assert str(root) not in message and str(root.parent) not in message
    assert shelf.names() == ["tiny-model", "first"]
    assert shelf.http.get("/ready").json()["num_running"] == 0


def test_names_and_numbers_are_bounded(shelf: Shelf, root: Path) -> None:
    for name in ("", "x" * 200, "a b", "../x", "é", "a\nb", "tiny-model", "first"):
        assert shelf.load(name, "a").status_code == 400, name
    assert shelf.unload("tiny-model").status_code == 404
    assert shelf.load("second", str(root / "b")).status_code == 200
    assert shelf.load("third", "c").status_code == 200
    answer = shelf.load("fourth", "a")
    assert (answer.status_code, "--max_adapters" in answer.text) == (400, True)
    assert shelf.unload("second").status_code == shelf.unload("third").status_code == 200


def test_the_playground_chooses_adapters_and_sees_them_come_and_go(shelf: Shelf) -> None:
    with running_browser() as browser, visit(browser, str(shelf.http.base_url)) as tab:
        tab.page.goto(tab.url)
        dialog = tab.page.get_by_role("dialog", name="This service wants a key")
        dialog.get_by_label("Key", exact=True).fill(KEY)
        dialog.get_by_role("button").click()
        tab.wait_until_ready()
        models, area = tab.page.locator("#model"), tab.page.get_by_label("Text to continue")
        assert models.locator("option").all_inner_texts() == ["tiny-model", "first"]
        models.select_option("first")
        area.fill("The reader")
        tab.set_parameters(max_tokens=40, temperature=1, seed=3)
        area.press("Control+Enter")
        tab.wait_until_idle()
        assert area.input_value() == "The reader" + shelf.text("first")
        assert shelf.load("late", "c").status_code == 200
        models.locator("option", has_text="late").wait_for(state="attached")
        models.select_option("late")
        assert shelf.unload("late").status_code == 200
        models.locator("option", has_text="late").wait_for(state="detached")
        assert models.input_value() == "tiny-model"
        tab.problems[:] = [one for one in tab.problems if "401" not in one]


# ------------------------------------------------------------------ beside which model


def _opened(*paths: Path) -> ServedModels:
    options = OpeningOptions("cpu", 4, "float32", None)
    with one_core():
        return ServedModels([open_served(None, path, options) for path in paths], options)


def _adapter(models: ServedModels, name: str) -> ServedModel:
    return next(one for one in models.adapters if one.name == name)


def test_an_adapter_stands_beside_the_model_that_it_was_trained_on(
    model_dir: Path, root: Path
) -> None:
    other = root.parent / "others" / "other"
    models = _opened(other, model_dir)
    open_adapters([f"a={root / 'a'}"], models, most=4)
    assert _adapter(models, "a").parent == "tiny-model"
    with pytest.raises(ModelError, match=r"none of them is served \(there are: other, tiny-model"):
        open_adapters([f"o={root / 'of_other'}"], models, most=4)
    open_adapters([f"other:o={root / 'of_other'}"], models, most=4)
    assert _adapter(models, "o").parent == "other"
    with pytest.raises(ModelError, match="does not fit"):
        open_adapters([f"other:c={root / 'c'}"], models, most=4)
    with pytest.raises(ModelError, match="a model a is served"):
        open_adapters([f"a={root / 'b'}"], models, most=4)
    with pytest.raises(ModelError, match="--max_adapters is 0"):
        open_adapters([f"b={root / 'b'}"], models, most=0)
    with pytest.raises(ModelError, match="should be an adapter directory"):
        open_adapters([f"b={model_dir}"], models, most=4)


def test_an_adapter_follows_its_directory_and_its_base(
    model_dir: Path, root: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "changing"
    shutil.copytree(root / "a", directory)
    models = _opened(model_dir)
    open_adapters([f"x={directory}"], models, most=4)
    worker = EngineWorker(max_queue_size=4)
    adapters = Adapters(models, worker, root=None, most=4)

    async def life() -> None:
        with pytest.raises(RequestError, match="the operator allows it with --adapters_root"):
            await adapters.load("y", str(directory))
        before = _adapter(models, "x")
        await adapters.follow()
        assert _adapter(models, "x") is before
        weights = directory / "adapter_model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(b"junk")
        await adapters.follow()
        assert _adapter(models, "x") is before
        weights.write_bytes(content)
        os.utime(weights, (1, 1))
        await adapters.follow()
        after = _adapter(models, "x")
        assert after.num_swaps == 1 and before.adapter is not None and before.adapter.is_unloaded
        [base] = models.bases
        [new] = _opened(model_dir).bases
        models.add(new)
        await adapters.follow()
        assert _adapter(models, "x").engine is new.engine is not base.engine
        weights.write_bytes(b"junk")
        models.add(base)
        await adapters.follow()
        assert not models.adapters

    try:
        asyncio.run(life())
    finally:
        worker.stop()
