"""A preparation that is killed or meets errors leaves whole versions or none; the short form.

All points: python -m tests.faults.prepare_faults
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RunFst
from tests.faults import gate
from tests.faults.disturbances import KINDS, Disturbance, Kind, spread
from tests.faults.durability import unflushed
from tests.faults.laboratory import Laboratory, laboratory
from tests.faults.prepare_faults import FaultLoop

_NUM_POINTS = 12

pytestmark = pytest.mark.skipif(
    gate.missing() is not None, reason=f"NO FAULTS WERE INJECTED: {gate.missing()}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """A small preparation, its undisturbed result known."""
    with laboratory(tmp_path_factory.mktemp("laboratory")) as made:
        yield made


@pytest.fixture(scope="module")
def loop(place: Laboratory) -> FaultLoop:
    """Its calls are known, too."""
    return FaultLoop(place)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_visible_is_whole_and_running_again_works(kind: Kind, loop: FaultLoop) -> None:
    points = spread(loop.points(kind), _NUM_POINTS)
    assert len(points) == _NUM_POINTS
    outcomes = {point: loop.try_point(point) for point in points}
    wrong = [
        f"{loop.tell(point)}: {one}" for point, outcome in outcomes.items() for one in outcome.wrong
    ]
    assert not wrong, "\n".join(wrong)
    assert sum(outcome.happened for outcome in outcomes.values()) >= _NUM_POINTS - 1


def test_everything_is_flushed_before_it_is_relied_on(loop: FaultLoop) -> None:
    assert loop.unflushed == []


def test_the_calls_that_can_lose_data_are_seen(loop: FaultLoop) -> None:
    names = {call.name for call in loop.calls}
    assert {"openat", "read", "write", "fsync", "mkdir", "rename", "close"} <= names


@pytest.mark.parametrize("name", ["corpus.npy", "sample_start_positions.npy"])
def test_a_journal_is_not_trusted_over_a_file_that_is_shorter(
    name: str, place: Laboratory, loop: FaultLoop
) -> None:
    loop.interrupt()
    files = [path for path in place.versions_of.rglob(name) if path.stat().st_size > 4096]
    assert files, "nothing was interrupted"
    for path in files:
        path.write_bytes(path.read_bytes()[:2048])
    done = place.prepare("--resume")  # may refuse, may begin anew
    assert place.wrong_versions() == []
    assert done.exit_code == 0 or done.stderr.splitlines()[-1].startswith("fst: ")
    assert place.wrong_result(place.prepare()) == []
    assert place.wrong_versions() == []


def _early_and_late(calls: list[gate.Call]) -> list[int]:
    """The calls before the first write, when a temporary directory is young, and the one that names it."""
    fresh = [at for at, call in enumerate(calls) if "/.partial-" in call.paths[0]]
    first_write = next(at for at, call in enumerate(calls) if call.name == "write")
    naming = max(at for at, call in enumerate(calls) if call.name.startswith("rename"))
    return [*(at for at in fresh if at <= first_write and calls[at].name != "lseek"), naming]


def test_a_second_preparation_gets_a_version_of_its_own(
    place: Laboratory, loop: FaultLoop, run_fst: RunFst
) -> None:
    for number in _early_and_late(loop.calls):
        place.clear()
        count = Disturbance(place.concerns)

        def run_second_at(call: gate.Call, count: Disturbance = count, number: int = number) -> int:
            count(call)
            if len(count.calls) == number + 1 and count.calls[-1] is call:
                second = run_fst(*place.words())
                assert second.returncode == 0, second.stderr
            return 0

        first = place.prepare(decide=run_second_at)
        found = [*place.wrong_result(first), *place.wrong_versions()]
        assert found == [], f"second started before {loop.calls[number]}"
        assert sorted(path.name for path in place.versions_of.glob("[0-9]*")) == ["0", "1"]


@pytest.mark.parametrize("damage", ["short", "missing", "added", "unnumbered"])
def test_a_half_version_would_be_noticed(damage: str, place: Laboratory) -> None:
    place.clear()
    version = Path(place.prepare().stdout.strip())
    corpus = version / "valid" / "corpus.npy"
    if damage == "short":
        corpus.write_bytes(corpus.read_bytes()[:-2])
    elif damage == "missing":
        (version / "tokenizer" / "tokenizer.json").unlink()
    elif damage == "added":
        (version / "more").touch()
    else:
        version.rename(version.with_name("new"))
    assert place.wrong_versions() != []


def test_a_silent_loss_would_be_noticed(place: Laboratory) -> None:
    place.clear()
    done = place.prepare()
    place.clear()
    assert place.wrong_result(done) != []


def _call(name: str, *paths: str, creates: bool = False) -> gate.Call:
    return gate.Call(name, paths, creates, thread_id=0)


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        (None, []),
        (
            "fsync /disk/root/x/.new/file",
            ["/disk/root/x/0/file came into sight before it was flushed"],
        ),
        ("fsync /disk/root/x/.new", ["/disk/root/x/0 came into sight before it was flushed"]),
        (
            "fsync /disk/root/x/.new/told",
            [
                "the journal was flushed before /disk/root/x/.new/told",
                "/disk/root/x/0/told came into sight before it was flushed",
            ],
        ),
        ("fsync /disk/root/x", ["/disk/root/x got a new name that was never flushed"]),
    ],
)
def test_a_forgotten_flush_would_be_noticed(left_out: str | None, expected: list[str]) -> None:
    calls = [
        _call("mkdir", "/disk/root/x/.new"),
        _call("write", "/disk/root/x/.new/told"),
        _call("fsync", "/disk/root/x/.new/told"),
        _call("write", "/disk/root/x/.new/journal.jsonl"),
        _call("fsync", "/disk/root/x/.new/journal.jsonl"),
        _call("openat", "/disk/root/x/.new/file.partial", creates=True),
        _call("write", "/disk/root/x/.new/file.partial"),
        _call("rename", "/disk/root/x/.new/file.partial", "/disk/root/x/.new/file"),
        _call("fsync", "/disk/root/x/.new/file"),
        _call("fsync", "/disk/root/x/.new"),
        _call("rename", "/disk/root/x/.new", "/disk/root/x/0"),
        _call("fsync", "/disk/root/x"),
    ]
    kept = [call for call in calls if f"{call.name} {call.paths[0]}" != left_out]
    assert unflushed(kept, Path("/disk/root/x")) == expected
