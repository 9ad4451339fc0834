"""`python -m tests.behaviour.transcript take DIRECTORY`, and later `compare DIRECTORY`.

`take` writes down what the program does: DIRECTORY/transcript.json, key -> hash or small value, and
values.json with the long ones in full; and it leaves there what the program wrote: datasets, trainings,
one of them interrupted, models, the bot's database.

`compare` takes another transcript with the present code and compares key by key. It also goes on from a
copy of DIRECTORY's files: resumes the training, opens the models and the database of the earlier code;
these keys begin with `earlier/`. It prints `key  same|DIFFERS` and fails when anything differs.

Only the command line, HTTP and files: modules may move. `--only PREFIX` takes the keys that begin so.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tests.behaviour.bot import bot_steps
from tests.behaviour.data import data_steps
from tests.behaviour.facts import Facts, differences, short
from tests.behaviour.http_answers import http_steps
from tests.behaviour.steps import AT_ONCE, Outcome, Step, chosen, run_steps
from tests.behaviour.trainings import training_steps
from tests.behaviour.uses import using_steps

TRANSCRIPT, VALUES = "transcript.json", "values.json"
_EARLIER = "earlier/"
_MAX_SHOWN = 6


def all_steps() -> list[Step]:
    """Everything; of the steps that can be taken the first ones are taken first."""
    return [*data_steps(), *training_steps(), *http_steps(), *bot_steps(), *using_steps()]


def take(directory: Path, only: str = "", at_once: int = AT_ONCE) -> Outcome:
    """Write the transcript of the present code into `directory`, which must be empty or new."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise SystemExit(f"{directory} is not empty")
    outcome = run_steps(chosen(all_steps(), only), directory.resolve(), at_once)
    facts = _with_prefix(outcome.facts, only)
    content = {"machine": _machine(), "facts": {key: short(facts[key]) for key in sorted(facts)}}
    if not outcome.failures:
        _write(directory / TRANSCRIPT, content)
        _write(directory / VALUES, facts)
    return outcome


def compare(directory: Path, only: str = "", at_once: int = AT_ONCE) -> bool:
    """Print what the present code does otherwise than the transcript in `directory` says."""
    content = _read(directory / TRANSCRIPT)
    if content["machine"] != _machine():
        print(f"another machine, expect other numbers: {content['machine']} -> {_machine()}")
    before = _with_prefix(content["facts"], only.removeprefix(_EARLIER))
    details = _read(directory / VALUES)
    temporary = Path(tempfile.mkdtemp(prefix="fst-transcript-"))
    rows: list[tuple[str, str]] = []
    failures: dict[str, str] = {}
    if not only.startswith(_EARLIER):
        now = take(temporary / "now", only, at_once)
        failures |= now.failures
        rows += _rows(before, details, _with_prefix(now.facts, only))
    earlier = _going_on(directory, temporary / "earlier", only.removeprefix(_EARLIER), at_once)
    failures |= {f"{_EARLIER}{name}": failure for name, failure in earlier.failures.items()}
    names = tuple(f"{name}/" for name in earlier.seconds)
    expected = {key: value for key, value in before.items() if key.startswith(names)}
    rows += [(f"{_EARLIER}{key}", found) for key, found in _rows(expected, details, earlier.facts)]
    is_same = not failures and not any(found for _, found in rows)
    _print(rows, failures)
    if is_same:
        shutil.rmtree(temporary)
    else:
        print(f"what the present code wrote is in {temporary}")
    return is_same


def _going_on(directory: Path, work: Path, only: str, at_once: int) -> Outcome:
    """What the present code does with the files of the earlier one; of these a copy is used."""
    shutil.copytree(directory, work, ignore=shutil.ignore_patterns("cache"))
    made = {step.name for step in chosen(all_steps(), only)}
    steps = [step for step in all_steps() if step.goes_on and step.name in made]
    outcome = run_steps(steps, work.resolve(), at_once)
    return Outcome(_with_prefix(outcome.facts, only), outcome.failures, outcome.seconds)


def _rows(before: Facts, details: Facts, now: Facts) -> list[tuple[str, str]]:
    """Each key, with what differs or nothing."""
    # As JSON has it: tuples are lists there.
    now = json.loads(json.dumps(now))
    rows = []
    for key in sorted({*before, *now}):
        if key not in before or key not in now:
            rows.append((key, f"only {'before' if key in before else 'now'}"))
        elif short(now[key]) == before[key]:
            rows.append((key, ""))
        else:
            found = [*islice(differences(details.get(key), now[key]), _MAX_SHOWN)]
            rows.append((key, "\n".join(found) or "another hash"))
    return rows


def _print(rows: list[tuple[str, str]], failures: dict[str, str]) -> None:
    width = max((len(key) for key, _ in rows), default=0)
    for key, found in rows:
        print(f"{key:<{width}}  {'DIFFERS' if found else 'same'}")
        for line in found.splitlines():
            print(f"    {line}")
    for name, failure in failures.items():
        print(f"{name}  FAILED: {failure}")
    num_different = sum(bool(found) for _, found in rows)
    print(f"{len(rows)} keys, {num_different} differ, {len(failures)} steps failed")


def _with_prefix(facts: Facts, prefix: str) -> Facts:
    return {key: value for key, value in facts.items() if key.startswith(prefix)}


def _machine() -> dict[str, str]:
    """What numbers may depend on beside the code."""
    processor = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8").splitlines()
        processor = next((line for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor.partition(":")[2].strip() or processor,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """Read the options, take or compare."""
    parser = argparse.ArgumentParser(description="Prove that behaviour stays")
    parser.add_argument("verb", choices=("take", "compare"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", metavar="PREFIX", help="keys that begin so")
    parser.add_argument("--at_once", type=int, default=AT_ONCE, help="commands that run together")
    options = parser.parse_args()
    started = time.perf_counter()
    if options.verb == "compare":
        is_good = compare(options.directory, options.only, options.at_once)
    else:
        outcome = take(options.directory, options.only, options.at_once)
        _print([], outcome.failures)
        is_good = not outcome.failures
        for name, seconds in sorted(outcome.seconds.items(), key=lambda item: -item[1]):
            print(f"{seconds:6.1f} s  {name}")
    print(f"{options.verb}: {time.perf_counter() - started:.0f} s")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
