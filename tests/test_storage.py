"""Versions and files are complete or absent."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from full_stack_transformer import storage
from full_stack_transformer.errors import InputError, MachineError, UsageError


def test_versions_count_up_from_zero(tmp_path: Path) -> None:
    for expected in ("0", "1", "2"):
        with storage.new_version(tmp_path, "name") as version:
            (version.directory / "file").write_text("content")
        assert version.directory == tmp_path / "name" / expected
        assert (version.directory / "file").read_text() == "content"


def test_versions_are_ordered_by_number(tmp_path: Path) -> None:
    for number in (10, 9, 2):
        (tmp_path / "name" / str(number)).mkdir(parents=True)
    assert [path.name for path in storage.versions(tmp_path, "name")] == ["2", "9", "10"]


def test_a_failing_body_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), storage.new_version(tmp_path, "name") as version:
        (version.directory / "file").write_text("half")
        raise KeyError
    assert list((tmp_path / "name").iterdir()) == []


def test_a_full_disk_is_a_machine_error(tmp_path: Path) -> None:
    with (
        pytest.raises(MachineError, match="the disk is full"),
        storage.new_version(tmp_path, "name"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert list((tmp_path / "name").iterdir()) == []


def _write_version(root: Path) -> None:
    with storage.new_version(root, "name") as version:
        (version.directory / "file").write_text("content")


def test_writers_at_once_get_a_version_each(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_version, args=(tmp_path,)) for _ in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 6
    found = storage.versions(tmp_path, "name")
    assert [path.name for path in found] == [str(number) for number in range(6)]
    assert all((path / "file").is_file() for path in found)


def test_claimed_versions_differ(tmp_path: Path) -> None:
    assert storage.claim_version(tmp_path, "x") != storage.claim_version(tmp_path, "x")


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", ".hidden", "-x", "x" * 101, "a\0b", "a b"]
)
def test_names_cannot_leave_their_root(name: str) -> None:
    with pytest.raises(UsageError, match="--dataset_name"):
        storage.check_name(name, "--dataset_name")


def test_replacing_a_directory_keeps_it_complete(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        partial = tmp_path / "partial"
        partial.mkdir()
        (partial / "file").write_text(content)
        storage.replace_directory(partial, target)
        assert (target / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


_REPLACE_FOR_EVER = """
import sys
from pathlib import Path
from full_stack_transformer.storage import replace_directory
root = Path(sys.argv[1])
for number in range(10**9):
    partial = root / "partial"
    partial.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (partial / name).write_text(str(number))
    replace_directory(partial, root / "model")
    if number == 0:
        print("started", flush=True)
"""


def test_a_directory_survives_kill_9_while_it_is_replaced(tmp_path: Path) -> None:
    """Ten kills at random moments: the directory is always there and never mixed from two versions."""
    for trial in range(10):
        root = tmp_path / str(trial)
        root.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", _REPLACE_FOR_EVER, root], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(trial * 20):
            (root / "model" / "a").exists()
        process.kill()
        process.wait()
        process.stdout.close()
        contents = {(root / "model" / name).read_text() for name in ("a", "b")}
        assert len(contents) == 1


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    storage.write_json(path, {"a": "é"})
    assert storage.read_json(path) == {"a": "é"}
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "content", ["", "[1]", "{", "\udcff"], ids=["empty", "list", "half", "bytes"]
)
def test_bad_json_is_an_input_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=r"x\.json"):
        storage.read_json(path)
    with pytest.raises(InputError, match="does not exist"):
        storage.read_json(tmp_path / "none.json")
