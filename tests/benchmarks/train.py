"""How fast training is: ours and other ways of training the same model on the same tokens.

python tests/benchmarks/train.py --short
FST_ISA=avx2 python tests/benchmarks/train.py
python tests/benchmarks/train.py --peer_python PYTHON_WITH_ACCELERATE

GPT-2's architecture on random token ids, full rows and short documents (mean 40 tokens). Each way is a
process of its own (`train_peers.py`) that waits while another one trains its block of steps: A B C A B C.
Useful tokens per second are targets that are no padding. Ours is the task, the loader and the Lightning
loop of `fst train`, packed for short documents; the peers pad batches in random order, as they come:

    trainer            transformers' Trainer, its defaults: fp32, dropout 0.1
    litgpt             AdamW as torch makes it
    nanogpt            no biases, fused AdamW; also compiled as a whole

All but the Trainer multiply in bf16 where the hardware does, else in fp32; --precision decides otherwise.
MFU is measured against the fastest matrix product in the same run. A step of Muon is compared with forward
and backward of the demo's model. Prints as its last line the ratios and what they are to be, where higher
is better everywhere.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY))  # run by its path, this script sees only its own directory

from full_stack_transformer.machine import (  # noqa: E402
    ALLOCATOR_SETTINGS,
    ALLOCATOR_VARIABLE,
    measure_matmul_peak,
    multiplies_bfloat16,
    prepare_libraries,
    processor_features,
    processor_name,
)

prepare_libraries()  # before torch is imported

import torch  # noqa: E402

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
    """Ratio to each peer that is aimed at in bf16; 0 for a peer that is only shown."""
    mfu_aim: float = 0.0

    def aim(self, name: str, precision: str) -> float:
        """In fp32: ahead of every peer that has an aim, and of nanoGPT's in every cell."""
        if precision == "bf16":
            return self.aims[name]
        return 1.0 if self.aims[name] or name == "nanogpt" else 0.0


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
    Cell("full rows, short", "short", False, 2, {"trainer": 2.0, "litgpt": 0, "nanogpt": 1.2}),
)
_OVERHEAD_STEPS = 40
_MAX_OVERHEAD_MS = 1.0
_MIN_USED_SLOTS = 0.95
_MAX_MUON_SHARE = 0.2


@dataclass
class Subject:
    """A process that trains a block when it is told to."""

    name: str
    process: subprocess.Popen[str]
    blocks: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""

    @classmethod
    def start(cls, name: str, job: dict[str, Any], peer_python: str) -> "Subject":
        """Start the process; `wait` until it is ready."""
        is_ours = name.startswith("ours")
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        environment["OMP_NUM_THREADS"] = str(NUM_THREADS)
        # Otherwise other load would decide: with torch's default the peers' threads spin.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
        return cls(name, process)

    def wait(self) -> None:
        """Until it has imported and made everything."""
        self._read()

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
        "precision": options.precision,
    }
    subjects = {
        name: Subject.start(name, job, options.peer_python) for name in ("ours", *cell.aims)
    }
    for subject in subjects.values():
        subject.wait()
    for repetition in range(options.repetitions + 1):
        for subject in subjects.values():
            subject.run(cell.num_steps, is_counted=repetition > 0)
    for subject in subjects.values():
        if subject.problem:
            print(f"{cell.name}: {subject.name} is left out: {subject.problem}")
        subject.close()
    return {name: subject for name, subject in subjects.items() if not subject.problem}


def report_cell(
    cell: Cell,
    subjects: dict[str, Subject],
    peak: float,
    results: dict[str, dict[str, float]],
    precision: str,
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
        if name in cell.aims and cell.aim(name, precision):
            results["ratios"][f"{name}, {cell.name}"] = round(ratio, 2)
            results["aims"][f"{name}, {cell.name}"] = cell.aim(name, precision)
    if cell.mfu_aim and cell.shape in ("small", "big"):
        mfu = _flops_per_step(cell.shape) / ours.step_seconds() / peak
        print(f"  MFU of ours: {mfu:.1%} of {peak / 1e9:,.0f} GFLOP/s in {precision}")
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
    job["precision"] = options.precision
    names = ("ours", "ours without Lightning")
    subjects = [Subject.start(name, job, sys.executable) for name in names]
    for subject in subjects:
        subject.wait()
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
    parser.add_argument("--precision", choices=("auto", "bf16", "32"), default="auto")
    parser.add_argument("--peer_python", default=sys.executable, help="Python with accelerate")
    options = parser.parse_args()
    if options.short:
        options.repetitions = 3
    cpu = torch.device("cpu")
    if options.precision == "auto":
        options.precision = "bf16" if multiplies_bfloat16(cpu) else "32"
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    torch.set_num_threads(NUM_THREADS)
    _print_head(options.precision)
    results: dict[str, dict[str, float]] = {"ratios": {}, "aims": {}}
    for cell in SHORT_CELLS if options.short else CELLS:
        before = measure_matmul_peak(cpu, dtype)
        subjects = run_cell(cell, options)
        peak = max(before, measure_matmul_peak(cpu, dtype))
        report_cell(cell, subjects, peak, results, options.precision)
    if not options.short:
        overhead = measure_overhead(options)
        print(f"\nLightning adds {overhead:.2f} ms to a step (aim: under {_MAX_OVERHEAD_MS:g})")
        results["ratios"]["1 ms / Lightning's overhead"] = round(1 / max(overhead, 0.01), 2)
        results["aims"]["1 ms / Lightning's overhead"] = 1.0
    share = measure_muon(options.precision)
    print(f"a step of Muon takes {share:.2f} of forward and backward (aim: {_MAX_MUON_SHARE:g})")
    results["ratios"]["0.2 / Muon's step by forward and backward"] = round(0.2 / share, 2)
    results["aims"]["0.2 / Muon's step by forward and backward"] = 1.0
    print(json.dumps({"benchmark": "train", **results}))


def measure_muon(precision: str) -> float:
    """Processor time of a step of the demo's model by that of its forward and backward pass."""
    from full_stack_transformer.modelling.acceleration import accelerate
    from full_stack_transformer.modelling.backbones import new_backbone
    from full_stack_transformer.modelling.losses import next_token_loss
    from full_stack_transformer.training.optimization import make_optimizer

    torch.set_num_threads(1)
    ids = {"begin": 0, "end": 1, "pad": 2}
    backbone = new_backbone("mini", vocab_size=4096, max_length=256, special_token_ids=ids)
    accelerate(backbone)
    optimizer = make_optimizer(backbone, name="muon", learning_rate=1e-3, weight_decay=0.1)
    tokens = torch.randint(3, 4096, (8, 256))
    passes, steps = [], []
    for _ in range(6):
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = backbone.train()(input_ids=tokens, use_cache=False).logits
            loss, count = next_token_loss(logits, tokens)
        torch.autograd.backward(loss / count)
        between = time.process_time()
        optimizer.step()
        passes.append(between - started)
        steps.append(time.process_time() - between)
        optimizer.zero_grad()
    return statistics.median(steps[1:]) / statistics.median(passes[1:])


def _print_head(precision: str) -> None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    )
    packages = ("torch", "transformers", "pytorch-lightning")
    features = processor_features()
    shown = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if name in features]
    print(f"{processor_name()} with {', '.join(shown)}; precision {precision} (Trainer: 32)")
    print(f"cores {os.cpu_count()}, threads {NUM_THREADS}, commit {done.stdout.strip()}")
    print(f"load {os.getloadavg()[0]:.1f}")
    print(", ".join(f"{name} {version(name)}" for name in packages))


if __name__ == "__main__":
    main()
