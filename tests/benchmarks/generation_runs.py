"""Workers of the benchmark of generation: processes that are asked in turn, and what their answers say.

Knows how to start the scripts beside this one, and nothing of which subjects there are, and of ratios.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from full_stack_transformer.machine import ISA_VARIABLE
from tests.benchmarks.generation_models import Cell
from tests.benchmarks.machine import NUM_CORES

HERE = Path(__file__).resolve().parent
# FST_ISA -> what holds CTranslate2, PyTorch, MKL and oneDNN, which both have, back to it. OpenVINO dies of a
# oneDNN that is held back from AVX-512.
_AVX2 = {
    "CT2_FORCE_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
_HELD_BACK = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", **_AVX2},
    "avx_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", **_AVX2},
}
# Threads of a runtime go on waiting for work for a while, 0.2 s in Intel's OpenMP; then the next may run.
_PAUSE_SECONDS = 0.25


@dataclass(frozen=True)
class Subject:
    """A line of the table."""

    label: str
    name: str
    """What `generation_peers.py` calls it."""
    weights: str
    package: str
    files: str = ""
    """The kind of `generation_files.py` that it reads, if not what transformers wrote."""
    files_weights: str = ""
    is_in_short: bool = False


@dataclass
class Runs:
    """All answers of a subject for one model."""

    rates: dict[Cell, list[float]] = field(default_factory=dict)
    """Tokens per second of each repetition."""
    prompts: dict[tuple[Cell, int], list[list[int]]] = field(default_factory=dict)
    """Of each stream of each repetition."""
    ids: dict[tuple[Cell, int], list[list[int]]] = field(default_factory=dict)
    """Tokens of each stream of each repetition."""
    loading_peak_mb: float = 0.0
    generating_peak_mb: float = 0.0
    problem: str = ""
    """Why there are no answers, or what is wrong with them."""

    def median(self, cell: Cell) -> float:
        """Tokens per second; 0 where there are none."""
        return statistics.median(self.rates.get(cell, [0.0]))

    def spread(self, cell: Cell) -> float:
        """Of the repetitions, as a share of the median."""
        rates = self.rates[cell]
        return (max(rates) - min(rates)) / statistics.median(rates)


class Worker:
    """A process that holds one model."""

    def __init__(self, python: str, job: dict[str, Any]) -> None:
        self.versions: dict[str, str] = {}
        # Not a pipe, which nobody would empty; `close` closes it.
        self._errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(HERE / "generation_peers.py"), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **(os.environ if job["subject"] == "openvino" else _environment()),
                "OMP_NUM_THREADS": str(job["num_threads"]),
            },
        )

    def wait(self) -> str:
        """Until the model is loaded; what went wrong, if something did."""
        answer, problem = self._read()
        self.versions = answer
        return problem

    def ask(self, prompts: list[list[int]], num_new: int) -> tuple[dict[str, Any], str]:
        """The answer, and what went wrong, if something did."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "num_new": num_new}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer, problem = self._read()
        time.sleep(_PAUSE_SECONDS)
        if not problem and any(len(ids) != num_new for ids in answer["ids"]):
            problem = f"FAILED: expected {num_new} tokens of each stream"
        return answer, problem

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _read(self) -> tuple[dict[str, Any], str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer, ""
        status = self._process.wait()
        self._errors.seek(0)
        errors = self._errors.read().strip()
        print(errors, file=sys.stderr)
        return {}, f"FAILED: {(errors.splitlines() or [f'status {status}'])[-1]}"


def _environment() -> dict[str, str]:
    """That of the workers."""
    return {**os.environ, **_HELD_BACK.get(os.environ.get(ISA_VARIABLE, ""), {})}


def decoding_rate(times: Sequence[Sequence[float]]) -> float:
    """Tokens per second of all streams together while all of them decode.

    From when the last stream has its first token to when the first stream has its last: reading prompts
    is outside, and so are steps in which only some streams run, as in engines that let them join and
    leave.

    Args:
        times: for each stream when each of its tokens came.
    """
    start, end = max(one[0] for one in times), min(one[-1] for one in times)
    num_tokens = sum(start < moment <= end for one in times for moment in one)
    return num_tokens / (end - start)


def reading_rate(times: Sequence[Sequence[float]], num_prompt: int) -> float:
    """Tokens of prompts per second until all streams have their first token."""
    return num_prompt * len(times) / max(one[0] for one in times)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that are the same before the first that is not."""
    pairs = zip(one, other, strict=True)
    return next((number for number, (left, right) in enumerate(pairs) if left != right), len(one))


def has_packages(python: str, packages: Sequence[str]) -> dict[str, bool]:
    """Which of the packages an interpreter can import."""
    code = "import sys, json, importlib.util as util; "
    code += "print(json.dumps({name: util.find_spec(name) is not None for name in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", code, *packages], stdout=subprocess.PIPE, check=True)
    result: dict[str, bool] = json.loads(done.stdout)
    return result


def call(python: str, script: str, job: dict[str, Any]) -> Any:
    """Run a script beside this one; what its last line says, if it says anything.

    Raises:
        SystemExit: it failed.
    """
    environment = {**_environment(), "OMP_NUM_THREADS": str(NUM_CORES)}
    command = [python, str(HERE / script), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise SystemExit(f"{script} {job} failed")
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if script == "generation_reference.py" else None
