"""How fast documents become a corpus: ours and its peers on the same text, the same bytes coming out.

python tests/benchmarks/prepare.py --short

    documents ──> ours, the algorithm of 2020, tokenizers, datasets.map, tiktoken, gigatoken ──> .npy

Each run is a fresh process (`prepare_peers.py`); runs are interleaved, A B C A B C. The corpus is built
from the files of this Python (`prepare_corpus.py`). MB/s are megabytes of input text by the wall time
from the files of text and vocabulary to the closed .npy files, without starting Python and importing;
in ours that includes the description, sha256 and fsync, which peers do not do. A slow subject runs on a
slice and is extrapolated: opening the vocabulary once, the rest in proportion; with --short that is every
peer but the fastest, and ours spends most of its time on what it does once. Peak memory counts the
process and its largest child. A peer that is not installed is skipped. Ends with status 1 when a peer's
files differ from ours, and prints as its last line the ratios and what they are to be, where higher is
better everywhere.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run by its path, this script sees only its own directory

from full_stack_transformer.machine import processor_name  # noqa: E402
from tests.benchmarks.prepare_runs import (  # noqa: E402
    Corpus,
    Runner,
    Runs,
    Subject,
    build_corpus,
    call,
)

SHARED_VOCABULARY = HERE.parents[2] / "shared" / "data" / "gpt2"
END_OF_DOCUMENT = "[END_OF_DOCUMENT]"

_MAX_PEAK_MB, _MAX_GROWTH, _MAX_HASHING = 300, 1.2, 0.05
# The difference of two times says nothing before.
_MIN_REPETITIONS = 3


OURS = Subject("ours", "ours", "full_stack_transformer")
UNHASHED = Subject("ours without sha256", "ours", "full_stack_transformer", stub_sha256=True)
ONCE = Subject("ours, what is done once", "ours", "full_stack_transformer")
PEERS = (
    Subject("algorithm of 2020", "ancestor", "tokenizers", 45, is_sliced=True),
    Subject("tokenizers encode_batch_fast", "tokenizers", "tokenizers", 30),
    Subject("datasets.map", "datasets", "datasets", 30),
    Subject("tiktoken", "tiktoken", "tiktoken", 10),
    Subject("whole-file gigatoken", "gigatoken", "gigatoken", 1.5),
)


@dataclass(frozen=True)
class Inputs:
    """What all runs share."""

    full: Corpus
    part: Corpus
    """The beginning of `full`."""
    tiny: Corpus
    """Next to nothing: what is left is the time that does not depend on the text."""
    tokenizer_path: Path


def make_inputs(options: argparse.Namespace) -> Inputs:
    """Build the corpus, or find it in the cache."""
    full = build_corpus(options.cache, options.mb)
    part = build_corpus(options.cache, min(options.slice_mb, options.mb))
    tiny = build_corpus(options.cache, 0.01)
    tokenizer_path = SHARED_VOCABULARY
    if not tokenizer_path.is_dir():
        tokenizer_path = part.path.with_suffix(".tokenizer")
        if not tokenizer_path.is_dir():
            call("prepare_vocabulary.py", "train", part.path, tokenizer_path)
    return Inputs(full, part, tiny, tokenizer_path)


def make_runner(inputs: Inputs, scratch: Path, peer_python: str) -> Runner:
    """Prepare the slice once: what is to come out of it, how samples look, what ours imports."""
    fields: dict[str, Any] = {
        "tokenizer_path": str(inputs.tokenizer_path),
        "documents_valid": str(inputs.tiny.path),
        "end_of_document": END_OF_DOCUMENT,
    }
    runner = Runner(scratch, peer_python, fields)
    first = Runs(inputs.part)
    runner.run(OURS, first)
    if not first.results:
        raise SystemExit(f"ours: {first.problem}")
    result = first.results[0]
    fields["preimport"] = result["modules"]
    fields.update(
        call("prepare_vocabulary.py", "convert", result["directory"], scratch / "vocabulary")
    )
    return runner


def measure(options: argparse.Namespace, inputs: Inputs, runner: Runner) -> dict[Subject, Runs]:
    """All repetitions of all subjects, interleaved."""
    all_runs = {OURS: Runs(inputs.full), UNHASHED: Runs(inputs.full), ONCE: Runs(inputs.tiny)}
    for subject in PEERS:
        is_sliced = subject.is_sliced or (options.short and subject.aim > PEERS[-1].aim)
        all_runs[subject] = Runs(inputs.part if is_sliced else inputs.full)
    for repetition in range(options.repetitions):
        for subject, runs in all_runs.items():
            print(f"repetition {repetition + 1}: {subject.label}", file=sys.stderr)
            runner.run(subject, runs)
    if all_runs[OURS].problem:
        raise SystemExit(f"ours: {all_runs[OURS].problem}")
    return all_runs


def measure_large(options: argparse.Namespace, runner: Runner) -> Runs | None:
    """Ours on the large corpus, for its memory."""
    if not options.large_mb:
        return None
    runs = Runs(build_corpus(options.cache, options.large_mb))
    print(f"large: ours on {runs.corpus.mb:,.0f} MB", file=sys.stderr)
    runner.run(OURS, runs)
    if not runs.results:
        raise SystemExit(f"ours: {runs.problem}")
    return runs


def find_ratios(
    full: Corpus, all_runs: dict[Subject, Runs], large: Runs | None
) -> dict[str, tuple[float, float]]:
    """Each ratio and its aim; higher is better."""
    ours = all_runs[OURS]
    our_rate = statistics.median(ours.rates(full))
    ratios = {
        subject.label: (our_rate / statistics.median(runs.rates(full)), subject.aim)
        for subject, runs in all_runs.items()
        if subject.aim and runs.results
    }
    peak = ours.median("peak_mb")
    if large is not None:
        growth = large.median("peak_mb") / peak
        ratios[f"memory growth: {_MAX_GROWTH} / ours"] = (_MAX_GROWTH / growth, 1.0)
        peak = max(peak, large.median("peak_mb"))
    ratios[f"memory: {_MAX_PEAK_MB} MB / ours"] = (_MAX_PEAK_MB / peak, 1.0)
    hashing = ours.median("hash_seconds") / ours.median("seconds")
    ratios[f"hashing: {_MAX_HASHING:.0%} / ours"] = (_MAX_HASHING / hashing, 1.0)
    unhashed = all_runs[UNHASHED]
    if len(unhashed.results) >= _MIN_REPETITIONS:
        # Hashing overlaps with other work. Below a thousandth the difference is noise.
        cost = max(1 - unhashed.median("seconds") / ours.median("seconds"), 0.001)
        ratios[f"hashing, wall time: {_MAX_HASHING:.0%} / ours"] = (_MAX_HASHING / cost, 1.0)
    return ratios


def print_machine(inputs: Inputs, runner: Runner, load: float) -> None:
    """Machine, versions, commit and corpus."""
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = " and uncommitted changes" if _git("status", "--porcelain") else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {version}" for name, version in sorted(runner.versions.items()))
    print(f"machine     {processor_name()}, {cores} cores, load {load:.1f} at the start")
    print(f"versions    Python {platform.python_version()}, {versions}")
    print(f"commit      {commit}{changed}")
    print(
        f"corpus      {inputs.full.mb:,.1f} MB in {inputs.full.num_documents:,} documents, "
        f"{inputs.full.unique_mb:,.1f} MB of them unique; slice {inputs.part.mb:,.1f} MB"
    )
    is_shared = inputs.tokenizer_path == SHARED_VOCABULARY
    print(f"vocabulary  {'GPT-2' if is_shared else 'byte-level BPE trained on the slice'}\n")


def print_table(full: Corpus, all_runs: dict[Subject, Runs], large: Runs | None) -> None:
    """A line per subject."""
    our_rate = statistics.median(all_runs[OURS].rates(full))
    head = ("subject", "text MB", "n", "seconds", "MB/s", "spread", "peak MB", "ours is", "aim")
    print("{:30}{:>8}{:>3}{:>9}{:>8}{:>7}{:>8}{:>8}{:>6}  output".format(*head))
    for subject, runs in (*all_runs.items(), *([(OURS, large)] if large else [])):
        if not runs.results:
            print(f"{subject.label:30}{runs.problem}")
            continue
        is_slice = bool(subject.aim) and runs.corpus != full
        rates = runs.rates(full if is_slice else runs.corpus)
        rate = statistics.median(rates)
        output = runs.problem or ("reference" if subject in (OURS, ONCE) else "same bytes")
        print(
            f"{subject.label:30}{runs.corpus.mb:8,.1f}{len(rates):3}{runs.median('seconds'):9.2f}{rate:8.1f}"
            f"{(max(rates) - min(rates)) / rate:7.0%}{runs.median('peak_mb'):8,.0f}"
            + (f"{our_rate / rate:7.1f}x{subject.aim:5g}x" if subject.aim else " " * 14)
            + f"  {output}{f', MB/s for {full.mb:,.0f} MB' if is_slice else ''}"
        )
    print(f"backend of ours: {all_runs[OURS].results[0]['backend']}")
    if large is not None:
        print(f"the large corpus holds {large.corpus.unique_mb:,.0f} MB of unique documents")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--short", action="store_true", help="under a minute: little text, one run")
    parser.add_argument("--mb", type=float, help="megabytes of text (100, short 16)")
    parser.add_argument("--slice_mb", type=float, help="for slow subjects (20, short 4)")
    parser.add_argument("--large_mb", type=float, help="for the growth of memory (2000, short 0)")
    parser.add_argument("--repetitions", type=int, help="runs of each subject (3, short 1)")
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter that has peers")
    cache = Path(tempfile.gettempdir(), "full-stack-transformer-benchmarks")
    parser.add_argument("--cache", type=Path, default=cache, help="directory for the corpus")
    options = parser.parse_args()
    defaults = {
        "mb": (100, 16),
        "slice_mb": (20, 4),
        "large_mb": (2000, 0),
        "repetitions": (3, 1),
    }
    for name, (long, short) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, short if options.short else long)
    return options


def main() -> int:
    options = parse_options()
    inputs = make_inputs(options)
    with tempfile.TemporaryDirectory(dir=options.cache) as scratch:
        load = os.getloadavg()[0]
        runner = make_runner(inputs, Path(scratch), options.peer_python)
        all_runs = measure(options, inputs, runner)
        large = measure_large(options, runner)
    print_machine(inputs, runner, load)
    print_table(inputs.full, all_runs, large)
    ratios = find_ratios(inputs.full, all_runs, large)
    print()
    for name, (ratio, aim) in ratios.items():
        print(f"{name:40} {ratio:6.2f}  (aim {aim:g})")
    problems = {subject.label: runs.problem for subject, runs in all_runs.items() if runs.problem}
    summary = {
        "benchmark": "prepare",
        "ratios": {name: round(ratio, 3) for name, (ratio, _) in ratios.items()},
        "aims": {name: aim for name, (_, aim) in ratios.items()},
        "problems": problems,
    }
    print(json.dumps(summary), flush=True)
    return int(any(not problem.startswith("skipped") for problem in problems.values()))


if __name__ == "__main__":
    sys.exit(main())
