"""How fast training is: ours and other ways of training the same model on the same tokens.

python tests/benchmarks/train.py --short
python tests/benchmarks/train.py --peer_python PYTHON_WITH_ACCELERATE

GPT-2's architecture on random token ids, full rows and short documents (mean 40 tokens). Each way is a
process of its own (`train_peers.py`) that waits while another one trains its block of steps: A B C A B C.
Useful tokens per second are targets that are no padding. Ours is the task, the loader and the Lightning
loop of `fst train`, packed for short documents; the peers pad batches in random order, as they come:

    trainer            transformers' Trainer, its defaults: fp32, dropout 0.1
    litgpt             bf16 autocast, AdamW as torch makes it
    nanogpt            no biases, bf16 autocast, fused AdamW; also compiled as a whole

MFU is measured against the fastest matrix product in the same run. Prints as its last line the ratios and
what they are to be, where higher is better everywhere.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY))  # run by its path, this script sees only its own directory

from full_stack_transformer.machine import (  # noqa: E402
    ALLOCATOR_SETTINGS,
    ALLOCATOR_VARIABLE,
    measure_matmul_peak,
)
from tests.benchmarks.train_peers import NUM_THREADS, SHAPES  # noqa: E402


@dataclass(frozen=True)
class Cell:
    """What is trained."""

    name: str
    shape: str
    is_short: bool
    num_steps: int
    """Of a block."""
    aims: dict[str, float]
    """Ratio to each peer that is aimed at; 0 for a peer that is only shown."""
    mfu_aim: float = 0.0


CELLS = (
    Cell(
        *("full rows, small", "small", False, 4),
        {"trainer": 2.8, "litgpt": 0, "nanogpt": 1.35, "nanogpt compiled": 1.25},
        mfu_aim=0.7,
    ),
    Cell(
        *("full rows, big", "big", False, 2),
        {"trainer": 2.8, "litgpt": 0, "nanogpt": 1.35, "nanogpt compiled": 1.25},
        mfu_aim=0.7,
    ),
    Cell("short documents, small", "small", True, 4, {"trainer": 6.0, "litgpt": 0, "nanogpt": 0}),
)
SHORT_CELLS = (
    Cell("full rows, small", "small", False, 1, {"trainer": 2.8, "litgpt": 0, "nanogpt": 1.35}),
)
_OVERHEAD_STEPS = 40
_MAX_OVERHEAD_MS = 1.0
_MIN_USED_SLOTS = 0.95


@dataclass
class Subject:
    """A process that trains a block when it is told to."""

    name: str
    process: subprocess.Popen[str]
    blocks: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""

    @classmethod
    def start(cls, name: str, job: dict[str, Any], peer_python: str) -> "Subject":
        """Set it up, and wait until it is ready."""
        is_ours = name.startswith("ours")
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        environment["OMP_NUM_THREADS"] = str(NUM_THREADS)
        if is_ours:  # as `fst train` starts itself
            environment[ALLOCATOR_VARIABLE] = ALLOCATOR_SETTINGS
        python = peer_python if name == "trainer" else sys.executable
        process = subprocess.Popen(
            [python, str(HERE / "train_peers.py"), json.dumps({**job, "subject": name})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        subject = cls(name, process)
        subject._read()
        return subject

    def run(self, num_steps: int, *, is_counted: bool = True) -> None:
        """Train a block."""
        if self.problem:
            return
        _pipe(self.process.stdin).write(f"{num_steps}\n")
        _pipe(self.process.stdin).flush()
        block = self._read()
        if block and is_counted:
            self.blocks.append(block)

    def rates(self) -> list[float]:
        """Useful tokens per second of each block."""
        return [block["tokens"] / block["seconds"] for block in self.blocks]

    def step_seconds(self) -> float:
        """Median over the blocks."""
        return statistics.median(float(block["seconds"] / block["steps"]) for block in self.blocks)

    def close(self) -> None:
        """End the process."""
        _pipe(self.process.stdin).close()
        self.process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        line = _pipe(self.process.stdout).readline()
        if line:
            block: dict[str, Any] = json.loads(line)
            return block
        errors = _pipe(self.process.stderr).read().strip().splitlines()
        self.problem = errors[-1] if errors else "ended without a word"
        return {}


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def run_cell(cell: Cell, options: argparse.Namespace) -> dict[str, Subject]:
    """Train all ways in turn; the first block of each warms it up and is not counted."""
    job = {
        "shape": cell.shape,
        "is_short": cell.is_short,
        "num_documents": 4000,
        "compile": not options.short,
    }
    subjects = {
        name: Subject.start(name, job, options.peer_python) for name in ("ours", *cell.aims)
    }
    for repetition in range(options.repetitions + 1):
        for subject in subjects.values():
            subject.run(cell.num_steps, is_counted=repetition > 0)
    for subject in subjects.values():
        if subject.problem:
            print(f"{cell.name}: {subject.name} is left out: {subject.problem}")
        subject.close()
    return {name: subject for name, subject in subjects.items() if not subject.problem}


def report_cell(
    cell: Cell, subjects: dict[str, Subject], peak: float, results: dict[str, dict[str, float]]
) -> None:
    """Print a table, and note the ratios."""
    ours = subjects["ours"]
    print(f"\n{cell.name}: useful tokens/s, median (least to most), ms a step")
    for name, subject in subjects.items():
        rates = subject.rates()
        ratio = statistics.median(ours.rates()) / statistics.median(rates)
        print(
            f"  {name:18}{statistics.median(rates):8,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            f"  {1000 * subject.step_seconds():7,.0f} ms  we are {ratio:.2f}x"
        )
        if cell.aims.get(name):
            results["ratios"][f"{name}, {cell.name}"] = round(ratio, 2)
            results["aims"][f"{name}, {cell.name}"] = cell.aims[name]
    if cell.mfu_aim and cell.shape in ("small", "big"):
        mfu = _flops_per_step(cell.shape) / ours.step_seconds() / peak
        print(f"  MFU of ours: {mfu:.1%} of {peak / 1e9:,.0f} GFLOP/s in bf16")
        results["ratios"][f"MFU, {cell.name}"] = round(mfu, 3)
        results["aims"][f"MFU, {cell.name}"] = cell.mfu_aim
    if cell.is_short:
        used = sum(block["tokens"] for block in ours.blocks)
        used /= sum(block["slots"] for block in ours.blocks)
        print(
            f"  slots that hold a target when packed: {used:.1%} (a document's first token is none)"
        )
        results["ratios"]["slots with a target when packed"] = round(used, 3)
        results["aims"]["slots with a target when packed"] = _MIN_USED_SLOTS


def _flops_per_step(shape: str) -> float:
    """Forward and backward, 6 N + 12 L Q T a token: Chowdhery et al. 2022, appendix B."""
    layers, width, _, vocabulary, rows, tokens = SHAPES[shape]
    weights = layers * 12 * width**2 + vocabulary * width
    return (6 * weights + 12 * layers * width * tokens) * rows * tokens


def measure_overhead(options: argparse.Namespace) -> float:
    """What Lightning's loop adds to a step of a tiny model, in ms."""
    job = {"shape": "tiny", "is_short": False, "num_documents": 500, "compile": False}
    names = ("ours", "ours without Lightning")
    subjects = [Subject.start(name, job, sys.executable) for name in names]
    for repetition in range(options.repetitions + 2):
        for subject in subjects:
            subject.run(_OVERHEAD_STEPS, is_counted=repetition > 0)
    for subject in subjects:
        subject.close()
    with_lightning, without = (subject.step_seconds() for subject in subjects)
    return 1000 * (with_lightning - without)


def main() -> None:
    """Run all cells and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one small cell, uncompiled")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peer_python", default=sys.executable, help="Python with accelerate")
    options = parser.parse_args()
    if options.short:
        options.repetitions = 1
    torch.set_num_threads(NUM_THREADS)
    _print_head()
    results: dict[str, dict[str, float]] = {"ratios": {}, "aims": {}}
    cpu = torch.device("cpu")
    for cell in SHORT_CELLS if options.short else CELLS:
        before = measure_matmul_peak(cpu, torch.bfloat16)
        subjects = run_cell(cell, options)
        peak = max(before, measure_matmul_peak(cpu, torch.bfloat16))
        report_cell(cell, subjects, peak, results)
    overhead = measure_overhead(options)
    print(f"\nLightning adds {overhead:.2f} ms to a step (aim: under {_MAX_OVERHEAD_MS:g})")
    results["ratios"]["1 ms / Lightning's overhead"] = round(1 / max(overhead, 0.01), 2)
    results["aims"]["1 ms / Lightning's overhead"] = 1.0
    print(json.dumps({"benchmark": "train", **results}))


def _print_head() -> None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    )
    packages = ("torch", "transformers", "pytorch-lightning")
    print(f"cores {os.cpu_count()}, threads {NUM_THREADS}, commit {done.stdout.strip()}")
    print(", ".join(f"{name} {version(name)}" for name in packages))


if __name__ == "__main__":
    main()
