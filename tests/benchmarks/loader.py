"""How fast a corpus becomes batches: ours and its peers, the same tokens in the same epoch.

python tests/benchmarks/loader.py --short

    corpus ──> ours, the algorithm of 2020, Hugging Face datasets, litdata ──> padded batches of 16, int64

Useful tokens per second are the tokens of the corpus, without padding, by the time of an epoch. Two corpora:
short documents (mean 41 tokens, at most 256), and full rows of 256. Each subject is a process of its own
(`loader_peers.py`), some epochs of each in turn, A B C A B C, files in the page cache, one thread, no
workers. Every subject hands out every token once, which is compared. Beside it: how much of ours is
padding, and how long finding a position to resume from takes. A peer that is not installed is skipped
aloud. Ends with status 1 when a subject hands out other tokens, and prints as its last line the ratios and
what they are to be, where higher is better everywhere.

litdata's own requirements bring another torch; `pip install --no-deps litdata`, then torch==2.13.0, boto3,
filelock, lightning-utilities, obstore, requests, tifffile and datasets make an interpreter for --peer_python.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run by its path, this script sees only its own directory

from full_stack_transformer.datasets.batches import (  # noqa: E402
    BatchPlan,
    ConcatenatedSamples,
    LengthBatches,
    PackedBatches,
    Samples,
)
from full_stack_transformer.datasets.corpus import Corpus, CorpusWriter  # noqa: E402
from full_stack_transformer.machine import processor_name  # noqa: E402
from tests.benchmarks.loader_peers import BATCH_SIZE, PAD_ID, ROW_LENGTH  # noqa: E402
from tests.datasets.corpora import ManySamples, short_lengths  # noqa: E402

_MAX_PADDING, _MIN_SLOTS_USED, _MAX_RESUME_SECONDS = 0.02, 0.95, 1.0
_SHORT, _FULL = "short documents", "full rows"


@dataclass
class Subject:
    """One line of the table."""

    label: str
    name: str
    """What `loader_peers.py` calls it."""
    package: str
    workload: str
    aim: float = 0.0
    directory: Path = Path()
    """Its copy of the corpus."""
    process: "subprocess.Popen[str] | None" = None
    first: dict[str, Any] = field(default_factory=dict)
    """What it holds, and its versions."""
    seconds: list[float] = field(default_factory=list)
    """Of an epoch, in each repetition."""
    problem: str = ""

    @property
    def is_ours(self) -> bool:
        """What the peers are compared with."""
        return self.name == "ours"

    @property
    def rate(self) -> float:
        """Useful tokens per second."""
        return float(self.first["num_tokens"]) / statistics.median(self.seconds)


def make_subjects() -> list[Subject]:
    """Ours comes first in each workload."""
    ours, peer = "full_stack_transformer", "datasets"
    return [
        Subject("ours", "ours", ours, _SHORT),
        Subject("ours, packed", "ours packed", ours, _SHORT),
        Subject("algorithm of 2020", "ancestor", "torch", _SHORT, aim=7),
        Subject("litdata", "litdata", "litdata", _SHORT, aim=6),
        Subject("Hugging Face datasets", "datasets", peer, _SHORT, aim=8),
        Subject("ours", "ours", ours, _FULL),
        Subject("algorithm of 2020", "ancestor", "torch", _FULL, aim=7),
        Subject("litdata, TokensLoader", "litdata tokens", "litdata", _FULL, aim=6),
        Subject("Hugging Face datasets", "datasets", peer, _FULL, aim=8),
    ]


def write_workload(directory: Path, lengths: NDArray[np.int64]) -> None:
    """A corpus of random tokens, and its sizes."""
    num_tokens = int(lengths.sum())
    tokens = np.random.default_rng(0).integers(0, PAD_ID, num_tokens)
    with CorpusWriter(directory, PAD_ID + 1) as writer:
        writer.append(tokens, lengths)
    sizes = {"num_samples": len(lengths), "num_tokens": num_tokens}
    (directory / "sizes.json").write_text(json.dumps(sizes))


def start(subject: Subject, workload: Path, peer_python: str) -> None:
    """Start its process, which makes its own copy of the corpus and hands out an epoch."""
    is_here = importlib.util.find_spec(subject.package) is not None
    subject.directory = workload.with_name(f"{workload.name}-{subject.name.replace(' ', '-')}")
    subject.directory.mkdir()
    for path in workload.iterdir():
        (subject.directory / path.name).hardlink_to(path)
    python = sys.executable if is_here else peer_python
    home = {"HF_HOME": str(subject.directory), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (subject.directory / "log").open("w") as log:
        subject.process = subprocess.Popen(
            [python, HERE / "loader_peers.py", subject.name, subject.directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **home},
        )


def await_first(subject: Subject, reference: Subject) -> None:
    """Wait until it is ready, and compare what it handed out."""
    line = ask(subject, "")
    if not line:
        lines = (subject.directory / "log").read_text().strip().splitlines()
        last_line = (lines or ["it said nothing"])[-1]
        is_missing = last_line.startswith("ModuleNotFoundError")
        subject.problem = f"{'SKIPPED' if is_missing else 'FAILED'}: {last_line}"
        return
    subject.first = json.loads(line)
    for name in ("num_tokens", "token_sum"):
        if subject.first[name] != reference.first[name]:
            subject.problem = f"DIFFERS from ours: {subject.first}"


def ask(subject: Subject, line: str) -> str:
    """Write a line, if any, and wait for the next one; it is empty when the process has ended."""
    assert subject.process is not None
    assert subject.process.stdin is not None
    assert subject.process.stdout is not None
    if line:
        print(line, file=subject.process.stdin, flush=True)
    return subject.process.stdout.readline()


def measure(options: argparse.Namespace, scratch: Path) -> list[Subject]:
    """All epochs of all subjects, interleaved."""
    num_tokens = int(options.million_tokens * 1e6)
    workloads = {
        _SHORT: (scratch / "short", short_lengths(num_tokens // 41)),
        _FULL: (scratch / "full", np.full(num_tokens // ROW_LENGTH, ROW_LENGTH)),
    }
    for directory, lengths in workloads.values():
        write_workload(directory, lengths)
    subjects = make_subjects()
    for subject in subjects:
        start(subject, workloads[subject.workload][0], options.peer_python)
    references = {subject.workload: subject for subject in subjects if subject.is_ours}
    for subject in subjects:
        print(f"starting: {subject.label}, {subject.workload}", file=sys.stderr)
        await_first(subject, references[subject.workload])
    for reference in references.values():
        if reference.problem:
            raise SystemExit(f"ours: {reference.problem}")
    for _ in range(options.repetitions):
        for subject in subjects:
            if not subject.problem:
                subject.seconds.append(float(ask(subject, "again")))
    for subject in subjects:
        if subject.process is not None:
            subject.process.communicate()
    return subjects


def resume_seconds(scratch: Path) -> dict[int, float]:
    """Making a plan and the batch in the middle of epoch 3: of a million samples in files, and of a
    billion whose lengths are computed; the slowest batching."""
    lengths = short_lengths(1_000_000)
    with CorpusWriter(scratch / "million", PAD_ID) as writer:
        writer.append(np.zeros(lengths.sum(), dtype=np.uint16), lengths)
    million = Corpus(scratch / "million", num_samples=len(lengths), num_tokens=int(lengths.sum()))
    all_samples: tuple[Samples, ...] = (million, ManySamples(10**9))
    return {
        len(samples): max(_seconds_to_middle(samples, batching) for batching in range(3))
        for samples in all_samples
    }


def _seconds_to_middle(samples: Samples, batching: int) -> float:
    started = time.perf_counter()
    plan: BatchPlan
    if batching == 0:
        plan = PackedBatches(samples, batch_size=BATCH_SIZE, row_length=ROW_LENGTH, seed=0)
    elif batching == 1:
        plan = LengthBatches(samples, batch_size=BATCH_SIZE, seed=0)
    else:
        rows = ConcatenatedSamples(samples.num_tokens, ROW_LENGTH)
        plan = LengthBatches(rows, batch_size=BATCH_SIZE, seed=0)
    plan.batch(3, plan.num_batches_per_epoch // 2)
    return time.perf_counter() - started


def find_ratios(
    subjects: list[Subject], resuming: dict[int, float]
) -> dict[str, tuple[float, float]]:
    """Each ratio and its aim; higher is better."""
    ours = {subject.workload: subject for subject in subjects if subject.is_ours}
    ratios = {
        f"{subject.label}, {subject.workload}": (
            ours[subject.workload].rate / subject.rate,
            subject.aim,
        )
        for subject in subjects
        if subject.aim and subject.seconds
    }
    padding = _padding(ours[_SHORT])
    ratios[f"padding: {_MAX_PADDING:.0%} / ours"] = (_MAX_PADDING / padding, 1.0)
    packed = next(subject for subject in subjects if subject.name == "ours packed")
    used = 1 - _padding(packed)
    ratios[f"slots used when packed: ours / {_MIN_SLOTS_USED:.0%}"] = (used / _MIN_SLOTS_USED, 1.0)
    for num_samples, seconds in resuming.items():
        name = f"position in {num_samples:,} samples: {_MAX_RESUME_SECONDS:g} s / ours"
        ratios[name] = (_MAX_RESUME_SECONDS / seconds, 1.0)
    return ratios


def _padding(subject: Subject) -> float:
    """Share of the slots that hold no token."""
    return 1 - float(subject.first["num_tokens"]) / float(subject.first["num_slots"])


def print_machine(subjects: list[Subject], load: float) -> None:
    """Machine, versions and commit."""
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = " and uncommitted changes" if _git("status", "--porcelain") else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions: dict[str, str] = {}
    for subject in subjects:
        versions.update(subject.first.get("versions", {}))
    described = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    print(f"machine     {processor_name()}, {cores} cores, load {load:.1f} at the start")
    print(f"versions    Python {platform.python_version()}, {described}")
    print(f"commit      {commit}{changed}\n")


def print_table(subjects: list[Subject]) -> None:
    """A line per subject."""
    ours = {subject.workload: subject for subject in subjects if subject.is_ours}
    head = ("workload", "subject", "n", "us/batch", "Mtok/s", "spread", "padding", "ours is", "aim")
    print("{:17}{:24}{:>3}{:>10}{:>8}{:>8}{:>9}{:>9}{:>6}".format(*head))
    for subject in subjects:
        if not subject.seconds:
            print(f"{subject.workload:17}{subject.label:24}{subject.problem}")
            continue
        median = statistics.median(subject.seconds)
        spread = (max(subject.seconds) - min(subject.seconds)) / median
        print(
            f"{subject.workload:17}{subject.label:24}{len(subject.seconds):3}"
            f"{median / subject.first['num_batches'] * 1e6:10,.0f}{subject.rate / 1e6:8.1f}"
            f"{spread:8.0%}{_padding(subject):9.1%}"
            + (
                f"{ours[subject.workload].rate / subject.rate:8.1f}x{subject.aim:5g}x"
                if subject.aim
                else ""
            )
        )


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--short", action="store_true", help="under a minute: few tokens")
    parser.add_argument("--million_tokens", type=float, help="of a corpus (4, short 0.8)")
    parser.add_argument("--repetitions", type=int, help="runs of each subject (7, short 3)")
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter that has peers")
    options = parser.parse_args()
    for name, (long, short) in {"million_tokens": (4, 0.8), "repetitions": (7, 3)}.items():
        if getattr(options, name) is None:
            setattr(options, name, short if options.short else long)
    return options


def main() -> int:
    options = parse_options()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        subjects = measure(options, Path(scratch))
        resuming = resume_seconds(Path(scratch))
    print_machine(subjects, load)
    print_table(subjects)
    for num_samples, seconds in resuming.items():
        print(f"a position in {num_samples:,} samples is found in {seconds * 1000:.1f} ms")
    ratios = find_ratios(subjects, resuming)
    print()
    for name, (ratio, aim) in ratios.items():
        print(f"{name:50} {ratio:8.2f}  (aim {aim:g})")
    problems = {
        f"{subject.label}, {subject.workload}": subject.problem
        for subject in subjects
        if subject.problem
    }
    summary = {
        "benchmark": "loader",
        "ratios": {name: round(ratio, 3) for name, (ratio, _) in ratios.items()},
        "aims": {name: aim for name, (_, aim) in ratios.items()},
        "problems": problems,
    }
    print(json.dumps(summary), flush=True)
    return int(any(not problem.startswith("SKIPPED") for problem in problems.values()))


if __name__ == "__main__":
    sys.exit(main())
