"""The transcript itself: two of the same code are the same, and a difference is shown."""

import json
import tempfile
from pathlib import Path

import pytest

from tests.behaviour.facts import differences, key_paths, plain, short
from tests.behaviour.transcript import TRANSCRIPT, all_steps, compare, take

_PART = "dataset/odd"


def test_the_same_code_has_the_same_transcript_and_a_difference_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    directory = tmp_path / "before"
    assert not take(directory, _PART).failures
    assert compare(directory, _PART)
    assert "DIFFERS" not in capsys.readouterr().out

    content = json.loads((directory / TRANSCRIPT).read_text(encoding="utf-8"))
    content["facts"]["dataset/odd/files"]["train/corpus.npy"] = "another hash"
    (directory / TRANSCRIPT).write_text(json.dumps(content), encoding="utf-8")
    assert not compare(directory, _PART)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("DIFFERS")] == ["dataset/odd/files"]


def test_a_directory_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit, match="not empty"):
        take(tmp_path, _PART)


def test_each_step_has_a_name_of_its_own_and_needs_others_that_exist() -> None:
    names = [step.name for step in all_steps()]
    assert len(names) == len({*names})
    assert {name for step in all_steps() for name in step.needs} <= {*names}


def test_values_lose_what_is_volatile_and_their_last_digits() -> None:
    value = {"id": "cmpl-1", "scores": [0.12345678, {"seconds": 3, "text": "é"}]}
    assert plain(value) == {"scores": [0.123457, {"text": "é"}]}
    assert key_paths(value) == ["/id", "/scores", "/scores[]/seconds", "/scores[]/text"]


def test_long_values_become_hashes() -> None:
    assert short({"text": "é"}) == {"text": "é"}
    assert short("x" * 5000).keys() == {"sha256"}
    assert short("x" * 5000) != short("y" * 5000)


def test_differences_say_where() -> None:
    before, after = {"a": [1, 2], "b": 0}, {"a": [1, 3], "c": 0}
    assert [*differences(before, after)] == [
        "/a[1]: '2' -> '3'",
        "/b: only before",
        "/c: only now",
    ]
