"""The service against others on the same weights, with real processes and streaming clients.

    python -m tests.benchmarks.service --peer_python /path/to/python

Prompts of 64 tokens, 64 new tokens, greedy, 1, 8 and 32 clients: tokens a second over all clients, time to
the first token and between tokens (p50, p95). Peers: `transformers serve`, with and without its continuous
batching, and llama.cpp's server; `--peer_python` names an interpreter with transformers[serving], accelerate,
llama-cpp-python[server] and gguf. The bare engine, without texts and HTTP, is what the service is measured
against. Weights are bfloat16 everywhere. Servers run one after the other, in an order that each repetition
draws anew.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from full_stack_transformer.document_sources.python_docs import python_documents
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    open_saved_tokenizer,
)
from tests.benchmarks.service_files import write_model
from tests.benchmarks.service_load import stream_with_clients

_NUM_PROMPT_TOKENS, _NUM_NEW_TOKENS = 64, 64
_NUM_CLIENTS = (1, 8, 32)
_TEXTS_PER_CLIENT = 2
_SECONDS_TO_START = 300
_MAX_CLIENTS = 32


@dataclass(frozen=True)
class Server:
    """One of those that are compared."""

    name: str
    command: Callable[[Path, int], list[str]]
    model: Callable[[Path], str]
    extra: dict[str, Any]
    """Fields of the body that only this one knows."""


def _ours(directory: Path, port: int) -> list[str]:
    words = [sys.executable, "-m", "full_stack_transformer", "serve", str(directory / "model")]
    words += ["--port", str(port), "--max_batch_size", str(_MAX_CLIENTS), "--device", "cpu"]
    return [*words, "--weights_dtype", "bfloat16"]


def _transformers(python: str, *options: str) -> Callable[[Path, int], list[str]]:
    def command(directory: Path, port: int) -> list[str]:
        words = [python, "-m", "transformers.cli.transformers", "serve"]
        words += [str(directory / "model"), "--port", str(port), "--host", "127.0.0.1"]
        return [*words, "--device", "cpu", "--dtype", "bfloat16", *options]

    return command


def _llama_cpp(python: str) -> Callable[[Path, int], list[str]]:
    def command(directory: Path, port: int) -> list[str]:
        words = [python, "-m", "llama_cpp.server", "--model", str(directory / "model.gguf")]
        words += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "512"]
        words += ["--n_threads", str(os.cpu_count()), "--verbose", "false"]
        # Else a new request breaks off the one under way: this server makes one text at a time.
        return [*words, "--interrupt_requests", "false"]

    return command


def _servers(peer_python: str | None) -> list[Server]:
    ours = Server("fst serve", _ours, lambda directory: "model", {"min_tokens": _NUM_NEW_TOKENS})
    if peer_python is None:
        return [ours]
    batching = "--continuous-batching"
    return [
        ours,
        Server("transformers serve", _transformers(peer_python), _path_of_model, {}),
        Server(
            f"transformers serve {batching}",
            _transformers(peer_python, batching),
            _path_of_model,
            {},
        ),
        Server("llama.cpp", _llama_cpp(peer_python), lambda directory: "model", {}),
    ]


def _path_of_model(directory: Path) -> str:
    return str(directory / "model")


@contextlib.contextmanager
def _running(server: Server, directory: Path) -> Iterator[str]:
    """The server's address, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + _SECONDS_TO_START
    with tempfile.TemporaryFile() as log:
        command = server.command(directory, port)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    # All open the model before they listen; not all know this route.
                    if httpx.get(f"{url}/health", timeout=5).status_code < 500:
                        break
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    text = log.read().decode(errors="replace")[-2000:]
                    raise RuntimeError(f"{server.name} does not start: {text}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _prompts(tokenizer: DocumentTokenizer, texts: list[str], number: int) -> list[str]:
    """Texts of 64 tokens with the token that begins a document, each another one."""
    found: list[str] = []
    for text in texts:
        ids = tokenizer.encode_text(text)
        for start in range(0, len(ids) - _NUM_PROMPT_TOKENS, _NUM_PROMPT_TOKENS):
            prompt = tokenizer.decode(ids[start : start + _NUM_PROMPT_TOKENS - 1])
            if len(tokenizer.encode_prompt(prompt)) == _NUM_PROMPT_TOKENS:
                found.append(prompt)
    return random.Random(0).sample(found, number)


def _measure_server(
    server: Server, directory: Path, prompts: list[str]
) -> dict[int, dict[str, float]]:
    figures = {}
    with _running(server, directory) as url:
        for num_clients in (1, *_NUM_CLIENTS):  # the first time warms up
            some = prompts[: num_clients * _TEXTS_PER_CLIENT]
            load = asyncio.run(
                stream_with_clients(
                    url,
                    server.model(directory),
                    some,
                    num_clients=num_clients,
                    num_new_tokens=_NUM_NEW_TOKENS,
                    extra=server.extra,
                )
            )
            prompts = prompts[len(some) :] + some
            figures[num_clients] = load.summary()
    return figures


_BARE_ENGINE = """
import json, sys, time
from pathlib import Path
from full_stack_transformer.generation.token_requests import TokenRequest
from full_stack_transformer.generation.open_engine import open_engine
from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.modelling.model_directory import open_model
job = json.load(sys.stdin)
model = open_model(Path(job["model"]), device="cpu")
engine = open_engine(model.backbone, num_slots=32, weights_dtype="bfloat16")
rates = {}
greedy = SamplingParameters(max_new_tokens=64, temperature=0, seed=0)
for num_clients in (1, *job["num_clients"]):
    prompts = [model.tokenizer.encode_prompt(text) for text in job["prompts"][: num_clients * 2]]
    job["prompts"] = job["prompts"][len(prompts):] + job["prompts"][:len(prompts)]
    started, num_tokens = time.perf_counter(), 0
    while prompts or engine.num_running:
        while prompts and engine.num_running < num_clients:
            engine.add(TokenRequest(prompts.pop(), greedy))
        num_tokens += sum(event.token_id is not None for event in engine.step())
    rates[num_clients] = {"tokens_per_second": round(num_tokens / (time.perf_counter() - started), 1)}
print(json.dumps(rates))
"""


def _measure_engine(directory: Path, prompts: list[str]) -> dict[int, dict[str, float]]:
    job = {"model": str(directory / "model"), "prompts": prompts, "num_clients": _NUM_CLIENTS}
    command = [sys.executable, "-c", _BARE_ENGINE]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, check=True
    )
    return {int(key): value for key, value in json.loads(done.stdout).items()}


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer_python")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only")
    options = parser.parse_args()
    texts = [document.text for document in itertools.islice(python_documents(), 300)]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_model(directory, texts, options.preset)
        if options.peer_python is not None:
            files = [str(Path(__file__).with_name("service_files.py")), "gguf", str(directory)]
            subprocess.run([options.peer_python, *files], check=True)
        tokenizer = open_saved_tokenizer(directory / "model")
        prompts = _prompts(tokenizer, texts, 4 * _MAX_CLIENTS * _TEXTS_PER_CLIENT)
        subjects: dict[str, Callable[[], dict[int, dict[str, float]]]] = {
            "bare engine": lambda: _measure_engine(directory, prompts)
        }
        for server in _servers(options.peer_python):
            subjects[server.name] = lambda server=server: _measure_server(  # type: ignore[misc]
                server, directory, prompts
            )
        if options.only is not None:
            subjects = {key: value for key, value in subjects.items() if options.only in key}
        runs: dict[str, list[dict[int, dict[str, float]]]] = {key: [] for key in subjects}
        chance = random.Random(0)
        for _ in range(options.repetitions):
            for subject in chance.sample(sorted(subjects), len(subjects)):
                runs[subject].append(subjects[subject]())
                print(subject, runs[subject][-1], file=sys.stderr, flush=True)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"preset {options.preset}, n = {options.repetitions}, medians")
    for num_clients in _NUM_CLIENTS:
        print(f"\n{num_clients} clients")
        for subject, measured in runs.items():
            names = measured[0][num_clients]
            medians = {
                key: statistics.median(one[num_clients][key] for one in measured) for key in names
            }
            print(f"  {subject:<42}", *(f"{key} {value:g}  " for key, value in medians.items()))


if __name__ == "__main__":
    main()
