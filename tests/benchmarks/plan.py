"""Compares `fst plan` with what its own commands then take: prepare, train, generate.

    python -m tests.benchmarks.plan --minutes 10

Plans one pass over Python's documentation, then as many passes as fill the minutes, and runs the commands
that this plan prints; --short takes a tenth of the documentation once and a small model. Prints both times of
each stage, and as its last line the smaller of both sums divided by the larger, by the wall clock and by
the processor's. Exits with 1 if the sums differ by more than a quarter. For a quiet machine: where other work
runs, --by_processor compares processor time.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from full_stack_transformer.machine import processor_name
from tests.benchmarks.machine import commit

_END = "\n[END_OF_DOCUMENT]\n"
_FST = (sys.executable, "-m", "full_stack_transformer")
TOLERANCE = 0.25


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model_config", default="mini")
    parser.add_argument("--documents", type=Path, help="a file of documents instead of Python's")
    parser.add_argument("--by_processor", action="store_true", help="compare processor time")
    parser.add_argument("--short", action="store_true", help="under a minute")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fst-plan-job-") as name:
        documents = given.documents or documentation(Path(name), is_short=given.short)
        ratios = compare(
            Path(name),
            0 if given.short else given.minutes,
            "tiny" if given.short else given.model_config,
            documents,
            seconds=4 if given.short else None,
        )
    _say(f"{processor_name()}, torch {version('torch')}, commit {commit()}")
    closeness = {name: round(min(ratio, 1 / ratio), 3) for name, ratio in ratios.items()}
    aims = dict.fromkeys(closeness, 1 / (1 + TOLERANCE))
    _say(json.dumps({"benchmark": "plan", "ratios": closeness, "aims": aims}))
    clock = "processor time" if given.by_processor else "wall clock"
    return int(abs(ratios[clock] - 1) > TOLERANCE)


def documentation(root: Path, *, is_short: bool = False) -> Path:
    """A file of Python's documentation, below the root."""
    _fst(root, "collect_documents", "python_docs")
    documents = root / "data/documents/python_docs/train.txt"
    if is_short:
        text = documents.read_text(encoding="utf-8")
        documents.write_text(text[: len(text) // 10].rpartition(_END)[0] + _END, encoding="utf-8")
    return documents


def compare(
    root: Path, minutes: float, model_config: str, documents: Path, *, seconds: float | None = None
) -> dict[str, float]:
    """Taken / planned seconds of a job of about so many minutes, by each clock.

    Args:
        root: the commands run there.
        minutes: of the job, in whole passes; at least one.
        model_config: the model.
        documents: a file of them.
        seconds: of the training steps that the plan measures.
    """
    words = ["--documents_train_file", str(documents), "--model_config", model_config]
    if seconds is not None:
        words += ["--seconds", str(seconds)]
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
    clocks = {"wall clock": "seconds", "processor time": "processor_seconds"}
    ratios = {
        clock: sum(spent[place] for spent in taken.values()) / sum(row[name] for row in rows)
        for place, (clock, name) in enumerate(clocks.items())
    }
    told = ", ".join(f"{ratio:.2f} of the {clock}" for clock, ratio in ratios.items())
    _say(f"in all {told}; load {_load()}")
    return ratios


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
