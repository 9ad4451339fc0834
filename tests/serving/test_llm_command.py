"""The `llm` command (https://llm.datasette.io) asks the service, set up as its documentation says."""

import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.serving.conftest import KeyedService

PROMPT = "What is a corpus?"
OPTIONS = {"temperature": "0", "max_tokens": "12", "seed": "1"}


@pytest.fixture
def settings(keyed_service: KeyedService, tmp_path: Path) -> Path:
    """Directory of the command's settings, with our model by its chats and by its completions."""
    entry = f"model_name: tiny-model\n  api_base: {keyed_service.url}/v1\n  api_key_name: ours\n"
    models = f"- model_id: ours\n  {entry}- model_id: ours-plain\n  completion: true\n  {entry}"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    return tmp_path


def _ask(settings: Path, key: str, *words: str) -> "subprocess.CompletedProcess[str]":
    options = [word for name, value in OPTIONS.items() for word in ("-o", name, value)]
    return subprocess.run(
        [sys.executable, "-m", "llm", "prompt", PROMPT, "--no-log", "--key", key, *options, *words],
        env={**os.environ, "LLM_USER_PATH": str(settings)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("words", [(), ("--no-stream",)], ids=["streamed", "whole"])
def test_it_chats(
    settings: Path, keyed_service: KeyedService, client: openai.OpenAI, words: tuple[str, ...]
) -> None:
    answer = client.chat.completions.create(
        model="tiny-model",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        max_tokens=12,
        seed=1,
    )
    done = _ask(settings, keyed_service.key, "-m", "ours", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (answer.choices[0].message.content or "").strip()


def test_it_completes(settings: Path, keyed_service: KeyedService, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny-model", prompt=PROMPT, temperature=0, max_tokens=12, seed=1
    )
    done = _ask(settings, keyed_service.key, "-m", "ours-plain")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer.choices[0].text.strip()


def test_it_shows_our_errors(settings: Path) -> None:
    done = _ask(settings, "a-key-that-opens-nothing", "-m", "ours")
    assert done.returncode == 1
    assert "this service needs a key" in done.stderr
