"""Preparation on two nodes of Ray with one CPU each, against one worker and two threads without Ray.

    python -m tests.benchmarks.prepare_cluster [--short] [--backend tokenizers|gigatoken]

The input is Python's documentation, many times. Runs take turns (A B C A B C), each with a small and a large
input: what counts is the difference, without the start, which is printed apart. Processor seconds are those
of the command and, with Ray, of all processes of both nodes; they hold on a machine that others use too, the
tokens/s do not. The last line is JSON: the tokens/s of the nodes as a part of twice those of one worker, and
the processor seconds of one worker as a part of those of the nodes.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from full_stack_transformer.arguments.data import CollectDocumentsArguments
from full_stack_transformer.document_sources.collect import main as collect_documents
from full_stack_transformer.machine import processor_name
from tests.benchmarks.machine import commit
from tests.ray_nodes import RayNodes, ray_nodes

_AIMS = {"tokens_per_second": 0.7, "processor_seconds": 0.7}
_RUNS = {"one worker": ("--num_workers", "1"), "two threads": ("--num_workers", "2"), "nodes": ()}


@dataclass(frozen=True)
class _Run:
    """What one run took, or the difference of two."""

    num_tokens: int
    seconds: float
    processor_seconds: float

    def __sub__(self, other: "_Run") -> "_Run":
        return _Run(
            self.num_tokens - other.num_tokens,
            self.seconds - other.seconds,
            self.processor_seconds - other.processor_seconds,
        )


def main() -> None:
    """Measure, and print a line for each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="small inputs, one run of each")
    parser.add_argument("--backend", choices=["tokenizers", "gigatoken"], default="tokenizers")
    given = parser.parse_args()
    times = 1 if given.backend == "tokenizers" else 10
    found: dict[str, list[_Run]] = {name: [] for name in _RUNS}
    with tempfile.TemporaryDirectory(prefix="fst-cluster-") as place, ray_nodes() as nodes:
        root = Path(place)
        small = _written(root, "small", times)
        large = _written(root, "large", times * (6 if given.short else 24))
        print(f"{large.stat().st_size / 1e6:,.1f} MB with {given.backend}", flush=True)
        _measured(root, small, "nodes", given.backend, nodes)  # the nodes import what they need
        for _ in range(1 if given.short else 3):
            for name, runs in found.items():
                start, whole = (
                    _measured(root, text, name, given.backend, nodes) for text in (small, large)
                )
                runs.append(whole - start)
                rate = runs[-1].num_tokens / runs[-1].seconds
                print(
                    f"{name}: {rate:,.0f} tokens/s and {runs[-1].processor_seconds:.1f} processor s; the "
                    f"small input {start.seconds:.1f} s and {start.processor_seconds:.1f} processor s",
                    flush=True,
                )
    rates = {
        name: statistics.median(run.num_tokens / run.seconds for run in runs)
        for name, runs in found.items()
    }
    work = {
        name: statistics.median(run.processor_seconds for run in runs)
        for name, runs in found.items()
    }
    print(f"{processor_name()}, commit {commit()}")
    for name in ("two threads", "nodes"):
        print(f"{name}: {rates[name] / rates['one worker']:.2f} times the tokens/s of one worker")
    ratios = {
        "tokens_per_second": round(rates["nodes"] / rates["one worker"] / 2, 3),
        "processor_seconds": round(work["one worker"] / work["nodes"], 3),
    }
    print(json.dumps({"benchmark": "prepare_cluster", "ratios": ratios, "aims": _AIMS}))


def _written(root: Path, name: str, times: int) -> Path:
    directory = collect_documents(
        CollectDocumentsArguments(source="python_docs", documents_root=root / "documents")
    )
    content = (directory / "train.txt").read_bytes()
    text = root / f"{name}.txt"
    with text.open("wb") as file:
        for _ in range(times):
            file.write(content)
    return text


def _measured(root: Path, text: Path, name: str, backend: str, nodes: RayNodes) -> _Run:
    """One run."""
    command = [
        *(sys.executable, "-m", "full_stack_transformer", "prepare_dataset"),
        *("--documents_train_file", str(text), "--validation_fraction", "0.01"),
        *("--datasets_root", str(root / "datasets"), "--dataset_name", "x"),
        *("--tokenizer_backend", backend, "--tokenizer_path", _tokenizer(root, text)),
    ]
    command += _RUNS[name] or ("--ray_address", nodes.address)
    # The reference takes all cores for one call.
    environment = {**nodes.environment, "TOKENIZERS_PARALLELISM": "false"}
    before = os.times()
    with _ProcessorSeconds(nodes) as of_nodes:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    after = os.times()
    seconds = after.children_user - before.children_user
    seconds += after.children_system - before.children_system
    description = json.loads((Path(done.stdout.strip()) / "description.json").read_text())
    if name == "nodes":
        seconds += of_nodes.total
    return _Run(description["number_of_train_tokens"], description["seconds_taken"], seconds)


def _tokenizer(root: Path, text: Path) -> str:
    """A BPE of the first megabytes, trained once."""
    found = root / "datasets/tokenizer/0/tokenizer"
    if not found.is_dir():
        short = root / "short.txt"
        short.write_bytes(text.read_bytes()[: 3 << 20])
        subprocess.run(
            [
                *(sys.executable, "-m", "full_stack_transformer", "prepare_dataset"),
                *("--documents_train_file", str(short), "--validation_fraction", "0.05"),
                *("--datasets_root", str(root / "datasets"), "--dataset_name", "tokenizer"),
            ],
            check=True,
            capture_output=True,
        )
    return str(found)


class _ProcessorSeconds:
    """Processor seconds of all processes of the nodes inside the `with`; `total` is known after it."""

    def __init__(self, nodes: RayNodes) -> None:
        self._nodes = nodes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self.total = 0.0

    def _look(self) -> None:
        for node in self._nodes.nodes:
            for process in node.processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    spent = process.cpu_times()
                    self._last[process.pid] = spent.user + spent.system

    def _watch(self) -> None:
        # Processes end with the command that they worked for: what they had taken shortly before counts.
        while not self._ended.wait(0.2):
            self._look()

    def __enter__(self) -> "_ProcessorSeconds":
        time.sleep(1)  # the processes of the run before end
        self._look()
        self._first = dict(self._last)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.total = sum(self._last.values()) - sum(self._first.values())


if __name__ == "__main__":
    main()
