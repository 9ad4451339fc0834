"""Compares `fst plan` with what its own commands then take: prepare, train, generate.

    python -m tests.benchmarks.plan --minutes 10

Plans one pass over Python's documentation, then as many passes as fill the minutes, and runs the commands
that this plan prints. Prints both times of each stage, and exits with 1 if the sums differ by more than a
quarter. For a quiet machine: where other work runs, --by_processor compares processor time.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_FST = (sys.executable, "-m", "full_stack_transformer")
TOLERANCE = 0.25


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model_config", default="mini")
    parser.add_argument("--documents", type=Path, help="a file of documents instead of Python's")
    parser.add_argument("--by_processor", action="store_true", help="compare processor time")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fst-plan-job-") as name:
        ratio = compare(
            Path(name),
            given.minutes,
            given.model_config,
            given.documents,
            by_processor=given.by_processor,
        )
    return int(abs(ratio - 1) > TOLERANCE)


def compare(
    root: Path,
    minutes: float,
    model_config: str,
    documents: Path | None = None,
    *,
    by_processor: bool = False,
) -> float:
    """Taken / planned seconds of a job of about so many minutes."""
    if documents is None:
        _fst(root, "collect_documents", "python_docs")
        documents = root / "data/documents/python_docs/train.txt"
    words = ["--documents_train_file", str(documents), "--model_config", model_config]
    once = _plan(root, words)
    passes = max(1, round(60 * minutes / once["total"]["seconds"]))
    plan = _plan(root, [*words, "--max_epochs", str(passes)]) if passes > 1 else once
    _say(f"planned {passes} passes, {plan['job']['num_tokens']:,.0f} tokens; load {_load()}")
    taken = {}
    for command in plan["commands"]:
        stage = {"prepare_dataset": "prepare"}.get(command.split()[1], command.split()[1])
        if stage in plan["stages"]:
            taken[stage] = _timed(root, shlex.split(command)[1:])
    for stage, (wall, processor) in taken.items():
        row = plan["stages"][stage]
        planned, needed = row["seconds"], row["processor_seconds"]
        _say(
            f"{stage:<10} planned {planned:7.1f} s, took {wall:7.1f} s ({wall / planned:.2f} of it); "
            f"processor {needed:7.1f} s, took {processor:7.1f} s ({processor / needed:.2f} of it)"
        )
    rows = [plan["stages"][stage] for stage in taken]
    ratios = [
        sum(spent[clock] for spent in taken.values()) / sum(row[name] for row in rows)
        for clock, name in enumerate(("seconds", "processor_seconds"))
    ]
    _say(f"in all {ratios[0]:.2f} of the time, {ratios[1]:.2f} of the processor's; load {_load()}")
    return float(ratios[by_processor])


def _plan(root: Path, words: list[str]) -> Any:
    done = _fst(root, "plan", *words, "--json")
    return json.loads(done.stdout)


def _timed(root: Path, words: list[str]) -> tuple[float, float]:
    """Wall clock and processor time of a command."""
    before, started = _processor_seconds(), time.perf_counter()
    _fst(root, *words)
    return time.perf_counter() - started, _processor_seconds() - before


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _fst(root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([*_FST, *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"fst {shlex.join(words)} failed:\n{done.stderr}")
    return done


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
