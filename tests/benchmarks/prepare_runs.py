"""Runs of the subjects of the benchmark of preparation: a process each, and what they wrote compared.

Knows how to start the scripts beside this one, and nothing of which subjects there are, and of ratios.
"""

import filecmp
import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_FILES = ("corpus.npy", "sample_start_positions.npy")


@dataclass(frozen=True)
class Subject:
    """One line of the table."""

    label: str
    name: str
    """What `prepare_peers.py` calls it."""
    package: str
    aim: float = 0.0
    is_sliced: bool = False
    """Runs on a slice even in the long run."""
    stub_sha256: bool = False


@dataclass(frozen=True)
class Corpus:
    """A file of documents, and what it holds."""

    path: Path
    mb: float
    unique_mb: float
    num_documents: int


@dataclass
class Runs:
    """All repetitions of a subject."""

    corpus: Corpus
    results: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""
    """Why there are no results, or what is wrong with them."""

    def median(self, key: str) -> float:
        """Of all repetitions."""
        return statistics.median(float(result[key]) for result in self.results)

    def rates(self, full: Corpus) -> list[float]:
        """MB/s of each repetition, extrapolated to the full corpus."""
        scale = full.mb / self.corpus.mb
        return [
            full.mb / (run["load_seconds"] + (run["seconds"] - run["load_seconds"]) * scale)
            for run in self.results
        ]


class Runner:
    """Starts processes, and compares what they write with what ours wrote for the same corpus."""

    def __init__(self, scratch: Path, peer_python: str, fields: dict[str, Any]) -> None:
        self.scratch = scratch
        self.fields = fields
        self.versions: dict[str, str] = {}
        self._peer_python = peer_python
        self._references: dict[Path, Path] = {}
        self._num_runs = 0

    def run(self, subject: Subject, runs: Runs) -> None:
        """Run once more, unless the subject is not to be had."""
        if runs.problem:
            return
        self._num_runs += 1
        out = self.scratch / f"run-{self._num_runs}"
        job = {
            **self.fields,
            "subject": subject.name,
            "stub_sha256": subject.stub_sha256,
            "documents": str(runs.corpus.path),
            "out": str(out),
        }
        result, problem = self._start(subject.package, job)
        if result is None:
            runs.problem = problem
        else:
            self.versions.update(result["versions"])
            runs.results.append(result)
            self._compare(subject, runs, Path(result.get("directory", out)))
        if not any(out in reference.parents for reference in self._references.values()):
            shutil.rmtree(out, ignore_errors=True)

    def _start(self, package: str, job: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        is_here = importlib.util.find_spec(package) is not None
        python = sys.executable if is_here else self._peer_python
        environment = {
            **os.environ,
            "HF_HOME": str(self.scratch),
            "HF_HUB_OFFLINE": "1",
            # Two processes of datasets.map on as many cores: threads inside them only get in the way.
            "TOKENIZERS_PARALLELISM": "false" if job["subject"] == "datasets" else "true",
        }
        done = subprocess.run(
            [python, HERE / "prepare_peers.py", json.dumps(job)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return result, ""
        last_line = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        is_missing = last_line.startswith("ModuleNotFoundError")
        if not is_missing:
            print(done.stderr, file=sys.stderr)
        return None, f"{'skipped' if is_missing else 'FAILED'}: {last_line}"

    def _compare(self, subject: Subject, runs: Runs, directory: Path) -> None:
        train = directory / "train" if subject.name == "ours" else directory
        if subject.name == "ours":
            self._references.setdefault(runs.corpus.path, train)
        reference = self._references[runs.corpus.path]
        different = [
            name
            for name in _FILES
            if not filecmp.cmp(train / name, reference / name, shallow=False)
        ]
        if different:
            runs.problem = f"DIFFERS from ours: {', '.join(different)}"


def build_corpus(cache: Path, mb: float) -> Corpus:
    """A corpus of at least `mb` megabytes, of the files of this Python."""
    cache.mkdir(parents=True, exist_ok=True)
    python = hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:8]
    path = cache / f"documents-{python}-{mb:g}mb.txt"
    return Corpus(path, **call("prepare_corpus.py", path, "--mb", mb))


def call(script: str, *arguments: object) -> dict[str, Any]:
    """Run a script beside this one; what its last line says."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
