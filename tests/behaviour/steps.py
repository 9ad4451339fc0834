"""Parts of a transcript that need each other, run some at a time."""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tests.behaviour.facts import Facts

AT_ONCE = 2


@dataclass(frozen=True)
class Step:
    """A part of the transcript, whose keys begin with its name."""

    name: str
    run: Callable[[Path], Facts]
    """Takes the directory in which everything lies."""
    needs: tuple[str, ...] = ()
    """Steps whose files it reads."""
    goes_on: bool = False
    """Whether it uses what others made and can be repeated on the files of an earlier transcript."""


@dataclass(frozen=True)
class Outcome:
    """What came of the steps."""

    facts: Facts
    failures: dict[str, str]
    """Step -> what went wrong."""
    seconds: dict[str, float]


def chosen(steps: Sequence[Step], prefix: str) -> list[Step]:
    """The steps that keys with this prefix come from, with all that they need."""
    by_name = {step.name: step for step in steps}
    wanted: dict[str, Step] = {}

    def add(step: Step) -> None:
        for name in step.needs:
            add(by_name[name])
        wanted[step.name] = step

    for step in steps:
        if step.name.startswith(prefix) or prefix.startswith(f"{step.name}/"):
            add(step)
    return list(wanted.values())


def run_steps(steps: Iterable[Step], work: Path, at_once: int = AT_ONCE) -> Outcome:
    """Run steps in `work`, each after what it needs; a step that is not among them counts as done."""
    waiting = list(steps)
    running: dict[Future[tuple[Facts, str, float]], Step] = {}
    outcome = Outcome({}, {}, {})
    with ThreadPoolExecutor(at_once) as pool:
        while waiting or running:
            open_names = {step.name for step in [*waiting, *running.values()]}
            for step in [step for step in waiting if not open_names & {*step.needs}]:
                waiting.remove(step)
                running[pool.submit(_timed, step, work)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                _note(outcome, running.pop(future), *future.result())
    return outcome


def _timed(step: Step, work: Path) -> tuple[Facts, str, float]:
    started = time.perf_counter()
    try:
        facts, failure = step.run(work), ""
    except Exception as error:  # whatever it is: the other parts are still worth having
        facts, failure = {}, f"{type(error).__name__}: {error}"
    return facts, failure, time.perf_counter() - started


def _note(outcome: Outcome, step: Step, facts: Facts, failure: str, seconds: float) -> None:
    outcome.facts.update({f"{step.name}/{key}": value for key, value in facts.items()})
    outcome.seconds[step.name] = round(seconds, 1)
    if failure:
        outcome.failures[step.name] = failure
