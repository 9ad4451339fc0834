"""Disturbs a small preparation at each of its file system calls and looks at what is left.

    python -m tests.faults.prepare_faults [--every 5] [--kinds kill,resumed,errno,full] [--point kill:57]

After each disturbance whatever the dataset root shows must be whole; exit code 0 must mean that the
dataset is there; a failure must be one sentence; and running again, plainly and with --resume, must
give the bytes of an undisturbed run.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.disturbances import KINDS, Disturbance, Kind, Point, points_of
from tests.faults.durability import unflushed
from tests.faults.gate import Call
from tests.faults.laboratory import Laboratory, laboratory
from tests.faults.runner import Finished


@dataclass(frozen=True)
class Outcome:
    """What one disturbance led to."""

    wrong: list[str]
    """Violations: in what was left, in what was said, and in later runs."""
    happened: bool
    """Whether the run came to the point: threads may make one run a few calls shorter than another."""
    num_left: int
    """Hidden names that the disturbed run left behind."""
    num_left_for_good: int
    """Hidden names that are still there after running again."""


class UndisturbedError(Exception):
    """A run failed that nobody disturbed."""


class FaultLoop:
    """Disturbs the preparation of a laboratory; `calls` are those of an undisturbed run.

    `unflushed` is what already an undisturbed run relies on before it is on the disk.
    """

    def __init__(self, place: Laboratory) -> None:
        self._place = place
        place.clear()
        self.calls = self._trace()
        self.unflushed = self._unflushed(self.calls)

    def points(self, kind: Kind) -> list[Point]:
        """Every disturbance of this kind."""
        calls = self.calls
        if kind == "resumed":
            self.interrupt()
            calls = self._trace("--resume")
        return points_of(calls, kind)

    def interrupt(self) -> None:
        """Leave what a preparation leaves that is killed half-way."""
        self._place.clear()
        kills = points_of(self.calls, "kill")
        half_way = Disturbance(self._place.concerns, kills[len(kills) // 2])
        done = self._place.prepare(decide=half_way)
        assert done.exit_code == -signal.SIGKILL, done.stderr

    def try_point(self, point: Point) -> Outcome:
        """Disturb one run, look at what it left, then run again."""
        place = self._place
        place.clear()
        if point.kind == "resumed":
            self.interrupt()
        disturbance = Disturbance(place.concerns, point)
        words = ["--resume"] if point.kind == "resumed" else []
        done = place.prepare(*words, decide=disturbance)
        wrong = [*_wrong_ending(done, point), *place.wrong_versions()]
        if done.exit_code == 0:
            wrong += place.wrong_result(done)
            found = self._unflushed(disturbance.performed)
            wrong += [one for one in found if one not in self.unflushed]
        num_left = len(place.left_behind())
        if num_left and "no incomplete file was left" in done.stderr:
            wrong.append(f"says that no incomplete file was left: {place.left_behind()}")
        wrong_reruns, num_left_for_good = place.once_for_this_state(_run_again)
        wrong = [place.tell(one) for one in [*wrong, *wrong_reruns]]
        return Outcome(wrong, disturbance.happened, num_left, num_left_for_good)

    def tell(self, point: Point) -> str:
        """How to call the point in a message."""
        return self._place.tell(str(point))

    def _unflushed(self, calls: Sequence[Call]) -> list[str]:
        return [self._place.tell(one) for one in unflushed(calls, self._place.versions_of)]

    def _trace(self, *words: str) -> list[Call]:
        disturbance = Disturbance(self._place.concerns)
        done = self._place.prepare(*words, decide=disturbance)
        if done.exit_code != 0:
            raise UndisturbedError(f"{' '.join(words)} exit code {done.exit_code}: {done.stderr}")
        return disturbance.calls


def _run_again(place: Laboratory) -> tuple[list[str], int]:
    """What is wrong when running again with and without --resume, and how many hidden names stay."""
    with place.kept():
        wrong = _wrong_rerun(place, "--resume")
    wrong += _wrong_rerun(place)
    return wrong, len(place.left_behind())


def _wrong_rerun(place: Laboratory, *words: str) -> list[str]:
    done = place.prepare(*words)
    wrong = [*place.wrong_versions(), *place.wrong_result(done)]
    return [f"run again{''.join(f' with {word}' for word in words)}: {one}" for one in wrong]


def _wrong_ending(done: Finished, point: Point) -> Iterator[str]:
    if done.hung:
        yield "hung"
    if not point.error and done.exit_code == -signal.SIGKILL:
        return
    if done.exit_code not in (0, 1):
        yield f"exit code {done.exit_code}"
    lines = done.stderr.splitlines()
    sentences = [line for line in lines if line.startswith("fst: ")]
    if len(sentences) != done.exit_code:
        yield f"expected {done.exit_code} line with 'fst: ', found {len(sentences)}"
    for noise in ("Traceback", "Exception ignored", "Warning:"):
        if noise in done.stderr:
            yield f"{noise} on standard error, which ends with {lines[-1]!r}"


def main() -> int:
    """Run the loop; exit code 1 when something was wrong."""
    given = _parse()
    with (
        tempfile.TemporaryDirectory(dir=given.work_dir) as work_dir,
        laboratory(Path(work_dir), given.option) as place,
    ):
        loop = FaultLoop(place)
        print(f"{len(loop.calls)} calls concern the preparation")
        print("".join(f"undisturbed: {one}\n" for one in loop.unflushed), end="")
        num_wrong = len(loop.unflushed)
        for kind in given.kinds.split(","):
            num_wrong += _try_kind(loop, kind, given.every, given.point)
    return 1 if num_wrong else 0


def _try_kind(loop: FaultLoop, kind: Kind, every: int, only: str | None) -> int:
    try:
        points = loop.points(kind)[::every]
    except UndisturbedError as error:
        print(f"{kind}: undisturbed: {error}", flush=True)
        return 1
    if only is not None:
        points = [point for point in points if str(point).split()[0] == only]
    return _try_all(loop, kind, points)


def _try_all(loop: FaultLoop, kind: Kind, points: Sequence[Point]) -> int:
    started = time.perf_counter()
    outcomes = []
    for point in points:
        outcomes.append(outcome := loop.try_point(point))
        for one in outcome.wrong:
            print(f"{loop.tell(point)}: {one}", flush=True)
    num_wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    print(
        f"{kind}: {len(points)} points, {num_wrong} with a violation, "
        f"{sum(not outcome.happened for outcome in outcomes)} not reached, "
        f"{sum(bool(outcome.num_left) for outcome in outcomes)} left hidden names, "
        f"{sum(bool(outcome.num_left_for_good) for outcome in outcomes)} of them for good; "
        f"{time.perf_counter() - started:.1f} s",
        flush=True,
    )
    return num_wrong


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="try one point in so many")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of them, with commas")
    parser.add_argument("--point", help="only this one, as printed: kill:57")
    parser.add_argument("--work_dir", type=Path, help="directory on the disk to use")
    parser.add_argument(
        "--option", action="append", default=[], help="another word for prepare_dataset"
    )
    given = parser.parse_args()
    if unknown := set(given.kinds.split(",")) - set(KINDS):
        parser.error(f"--kinds must be among {', '.join(KINDS)}; found {', '.join(unknown)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
