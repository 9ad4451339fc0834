"""A running service for the tests of its routes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from full_stack_transformer.generation.text_generator import TextGenerator
from tests.logged_process import LoggedProcess, running_service
from tests.serving.tiny_model import one_core

KEY = "a-key-of-the-tests-0001"


@dataclass(frozen=True)
class KeyedService:
    """A service that wants a key."""

    url: str
    key: str
    process: LoggedProcess


@pytest.fixture(scope="session")
def keyed_service(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KeyedService]:
    """A service with keys and one allowed site, which ends well."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# for the tests\n{KEY}\nanother-key-of-the-tests # a second one\n")
    options = (
        *("--api_keys_file", str(keys), "--allowed_origins", "https://friend.example"),
        *("--max_queue_size", "96"),
    )
    with running_service(model_dir, *options) as (url, process):
        yield KeyedService(url, KEY, process)
        assert process.stop() == 0
        assert "Traceback" not in process.log


@pytest.fixture(scope="session")
def client(keyed_service: KeyedService) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(
        base_url=f"{keyed_service.url}/v1", api_key=keyed_service.key, max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="session")
def http(keyed_service: KeyedService) -> Iterator[httpx.Client]:
    """Plain HTTP with the key."""
    headers = {"authorization": f"Bearer {keyed_service.key}"}
    with httpx.Client(base_url=keyed_service.url, headers=headers, timeout=60) as http:
        yield http


@pytest.fixture(scope="session")
def generator(model_dir: Path) -> TextGenerator:
    """The same model without the service."""
    with one_core():
        return TextGenerator.open(model_dir, device="cpu")


@pytest.fixture(scope="session")
def strict_http(model_dir: Path) -> Iterator[httpx.Client]:
    """A service that refuses unknown fields and listens on all interfaces."""
    options = ("--strict_fields", "--host", "0.0.0.0", "--allowed_hosts", "*.models.example")
    with (
        running_service(model_dir, *options) as (url, _),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        yield http
