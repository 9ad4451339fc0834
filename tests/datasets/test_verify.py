"""Whatever is damaged in a dataset directory is named, all of it, and a whole one passes."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from full_stack_transformer.arguments.data import VerifyDatasetArguments
from full_stack_transformer.datasets import verify
from full_stack_transformer.datasets.verify import main as verify_dataset
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.storage import file_facts
from tests.conftest import RunFst

TOKENS = "train/corpus.npy"
POSITIONS = "train/sample_start_positions.npy"

Damage = Callable[[Path], object]
Description = dict[str, Any]


@pytest.fixture
def damaged(dataset_dir: Path, tmp_path: Path) -> Path:
    """A copy of a whole dataset directory, to be damaged."""
    return Path(shutil.copytree(dataset_dir, tmp_path / "tiny" / "0"))


def _problems(directory: Path) -> list[str]:
    try:
        verify_dataset(VerifyDatasetArguments(directory))
    except DatasetError as error:
        lines = str(error).splitlines()
        assert lines[0].startswith(f"{directory} differs from its description ({len(lines) - 2}")
        assert lines[-1].startswith("prepare the dataset again")
        assert all(line.startswith("  ") for line in lines[1:-1])
        return [line.strip() for line in lines[1:-1]]
    return []


def _describe(directory: Path, **changes: object) -> None:
    """Change the description; None takes an entry away."""
    path = directory / "description.json"
    description = {**json.loads(path.read_text("utf-8")), **changes}
    kept = {name: value for name, value in description.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def _replace_array(directory: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change an array and describe its new size and hash, so that only its values are wrong."""
    np.save(directory / name, change(np.load(directory / name)))
    _describe_file(directory, name)


def _describe_file(directory: Path, name: str) -> None:
    files = json.loads((directory / "description.json").read_text("utf-8"))["output_files"]
    _describe(directory, output_files={**files, name: file_facts(directory / name)})


def _set(index: int, value: int) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[index] = value
        return values

    return change


@pytest.mark.parametrize("by", ["version", "name"])
def test_a_whole_dataset_passes(
    by: str, dataset_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = dataset_dir if by == "version" else dataset_dir.parent
    verify_dataset(VerifyDatasetArguments(path))
    num_bytes = sum(
        file.stat().st_size
        for file in dataset_dir.rglob("*")
        if file.is_file() and file.name != "description.json"
    )
    assert f"{dataset_dir} is intact: 6 files, {num_bytes:,} bytes" in caplog.text
    assert "MB/s" in caplog.text


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _flip_and_append(path: Path) -> None:
    _flip(path)
    _append(path)


def _swap(directory: Path) -> None:
    (directory / TOKENS).rename(directory / "other")
    (directory / "valid/corpus.npy").rename(directory / TOKENS)
    (directory / "other").rename(directory / "valid/corpus.npy")


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: (d / TOKENS).unlink(), rf"{TOKENS}: is missing: expected [\d,]+ bytes"),
        (lambda d: _cut(d / TOKENS), rf"{TOKENS}: truncated: expected [\d,]+ bytes, found [\d,]+"),
        (lambda d: (d / POSITIONS).write_bytes(b""), rf"{POSITIONS}: truncated: .* found 0"),
        (lambda d: _append(d / TOKENS), rf"{TOKENS}: trailing bytes: .* are as described"),
        (
            lambda d: _flip_and_append(d / POSITIONS),
            rf"{POSITIONS}: trailing bytes: .* differ too",
        ),
        (
            lambda d: _flip(d / TOKENS),
            rf"{TOKENS}: other content in the same [\d,]+ bytes: SHA-256",
        ),
        (
            lambda d: _flip(d / "tokenizer/tokenizer.json"),
            "tokenizer/tokenizer.json: other content",
        ),
        (_swap, f"{TOKENS}: holds the content of valid/corpus.npy: swapped?"),
        (lambda d: (d / "train/.x").touch(), r"train/\.x: unexpected file"),
        (lambda d: (d / "x").symlink_to("nowhere"), "x: unexpected file"),
        (lambda d: _make_directory(d / TOKENS), f"{TOKENS}: is not a regular file"),
    ],
    ids=[
        *("missing", "truncated", "empty", "trailing", "trailing and flipped", "flipped"),
        *("tokenizer flipped", "swapped", "foreign file", "foreign link", "directory"),
    ],
)
def test_a_damaged_file_is_named(damage: Damage, expected: str, damaged: Path) -> None:
    damage(damaged)
    with pytest.raises(DatasetError, match=expected):
        verify_dataset(VerifyDatasetArguments(damaged))


def test_a_foreign_folder_needs_few_lines(damaged: Path) -> None:
    (damaged / "more").mkdir()
    for number in range(30):
        (damaged / "more" / f"{number:02}").touch()
    problems = _problems(damaged)
    assert len(problems) == 21
    assert problems[-1] == "10 further unexpected files"


@pytest.mark.parametrize("seed", range(10))
def test_any_flipped_bit_is_found(seed: int, damaged: Path) -> None:
    chosen = random.Random(seed)
    described = json.loads((damaged / "description.json").read_text("utf-8"))["output_files"]
    name = chosen.choice(sorted(described))
    content = bytearray((damaged / name).read_bytes())
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    (damaged / name).write_bytes(content)
    assert any(problem.startswith(f"{name}: other content") for problem in _problems(damaged))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format_version": 0}, "format_version is 0, expected 1"),
        ({"format_version": None}, "format_version is None"),
        ({"number_of_train_tokens": 5}, r"number_of_train_tokens is 5, but counts has \d+"),
        (
            {"number_of_train_tokens": 5},
            rf"{TOKENS}: has the shape .* but the description has 5 values",
        ),
        ({"number_of_train_tokens": 5}, f"{POSITIONS}: .* positions are beyond the 5 tokens"),
        (
            {"number_of_valid_samples": 0},
            "number_of_valid_samples should be a positive integer, found 0",
        ),
        (
            {"number_of_valid_samples": 2},
            "valid/sample_start_positions.npy: has the shape .* but the description has 2",
        ),
        ({"number_of_train_tokens": "12"}, "number_of_train_tokens should be a positive integer"),
        ({"number_of_train_tokens": 10**30}, "number_of_train_tokens should be a positive integer"),
        ({"number_of_train_tokens": True}, "number_of_train_tokens should be a positive integer"),
        ({"vocab_size": None}, "vocab_size should be a positive integer, found None"),
        ({"vocab_size": 100}, f"{TOKENS}: .* token ids are not below the vocab_size 100"),
        ({"vocab_size": 2}, "special_token_ids: pad is 2, not below the vocab_size 2"),
        ({"vocab_size": 70000}, "dtype is '<u2', but a vocab_size of 70,000 needs '<u4'"),
        ({"dtype": "<u4"}, f"{TOKENS}: holds <u2, expected <u4"),
        ({"max_sample_length": 9}, f"{POSITIONS}: .* samples are not of 8 to 9 tokens"),
        ({"min_sample_length": 40}, f"{POSITIONS}: .* samples are not of 40 to 64 tokens"),
        ({"min_sample_length": 80}, "min_sample_length 80 is above max_sample_length 64"),
        ({"output_files": None}, "output_files should name every file, found NoneType"),
        ({"output_files": {}}, f"output_files lacks {TOKENS}"),
        ({"output_files": {}}, f"{TOKENS}: unexpected file"),
        ({"output_files": {"../x": {}}}, r"output_files names '\.\./x', which is outside"),
        (
            {"output_files": {TOKENS: {"size_bytes": 1}}},
            f"should have size and SHA-256 of {TOKENS}",
        ),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_an_edited_description_is_noticed(
    changes: Description, expected: str, damaged: Path
) -> None:
    _describe(damaged, **changes)
    with pytest.raises(DatasetError, match=expected):
        verify_dataset(VerifyDatasetArguments(damaged))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (
            TOKENS,
            lambda ids: ids.astype(">u2"),
            "holds >u2, expected <u2: the byte order is swapped",
        ),
        (POSITIONS, lambda starts: starts.astype(">i8"), "holds >i8, expected <i8: the byte order"),
        (TOKENS, lambda ids: ids.astype("<u4"), "holds <u4, expected <u2"),
        (TOKENS, lambda ids: ids.astype("<f4"), "holds <f4, expected <u2"),
        (TOKENS, lambda ids: ids.byteswap(), "token ids are not below the vocab_size 300"),
        (
            TOKENS,
            _set(3, 300),
            "1 token ids are not below the vocab_size 300, the first is 300 at 3",
        ),
        (TOKENS, lambda ids: ids.reshape(1, -1), r"has the shape \(1, \d+\) in its header"),
        (
            POSITIONS,
            lambda starts: starts[:-1],
            r"has the shape \(303,\) in its header, but the description has 304 values",
        ),
        (POSITIONS, _set(0, 1), "the first position is 1, expected 0"),
        (POSITIONS, _set(1, -7), "1 positions do not increase, the first after 0 by -7"),
        (POSITIONS, _set(5, 10**9), r"1 positions are beyond .* the first is 1,000,000,000 at 5"),
        (POSITIONS, _set(7, 0), "1 positions do not increase, the first after 6 by"),
        (POSITIONS, lambda starts: starts + 1, "the first position is 1, expected 0"),
    ],
    ids=[
        *("swapped tokens", "swapped positions", "wider", "floats", "swapped bytes", "too large"),
        *("two dimensions", "fewer", "first", "negative", "beyond", "falling", "shifted"),
    ],
)
@pytest.mark.parametrize("block_bytes", [4 << 20, 64])
def test_values_that_make_no_sense_are_found_although_the_hash_is_right(
    name: str,
    change: Callable[[Any], Any],
    expected: str,
    block_bytes: int,
    damaged: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "_BLOCK_BYTES", block_bytes)
    _replace_array(damaged, name, change)
    with pytest.raises(DatasetError, match=f"{name}: .*{expected}"):
        verify_dataset(VerifyDatasetArguments(damaged))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: b"PK" + content, "has no valid NumPy header"),
        (lambda content: content[:64], "has no valid NumPy header"),
        (lambda content: content.replace(b"shape", b"sh'pe"), "has no valid NumPy header"),
        (lambda content: content.replace(b"'<u2'", b",'<u2"), "has no valid NumPy header"),
        (lambda content: content[:-2], r"should have [\d,]+ bytes of values by its header, found"),
        (
            lambda content: content + b"\0",
            r"should have [\d,]+ bytes of values by its header, found",
        ),
    ],
    ids=["foreign", "half a header", "broken name", "broken type", "short", "long"],
)
def test_a_file_that_is_no_array_is_noticed_although_the_hash_is_right(
    change: Callable[[bytes], bytes], expected: str, damaged: Path
) -> None:
    (damaged / TOKENS).write_bytes(change((damaged / TOKENS).read_bytes()))
    _describe_file(damaged, TOKENS)
    with pytest.raises(DatasetError, match=f"{TOKENS}: {expected}"):
        verify_dataset(VerifyDatasetArguments(damaged))


def test_all_that_is_wrong_is_told_at_once(damaged: Path) -> None:
    (damaged / "valid/corpus.npy").unlink()
    _cut(damaged / POSITIONS)
    _flip(damaged / "tokenizer/tokenizer.json")
    (damaged / "more").touch()
    _describe(damaged, seed=1, format_version=7)
    assert [problem.split(":")[0] for problem in _problems(damaged)] == [
        "description.json",
        "tokenizer/tokenizer.json",
        POSITIONS,
        "valid/corpus.npy",
        "more",
    ]


@pytest.mark.parametrize("content", [None, "[]", "{"], ids=["missing", "no object", "half"])
def test_what_is_no_dataset_directory_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "description.json").write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match="is not a dataset directory"):
        verify_dataset(VerifyDatasetArguments(tmp_path))


def test_the_command_says_what_is_wrong_in_few_lines(run_fst: RunFst, damaged: Path) -> None:
    whole = run_fst("verify_dataset", damaged)
    assert (whole.returncode, whole.stdout) == (0, "")
    assert "is intact: 6 files" in whole.stderr
    _cut(damaged / TOKENS)
    broken = run_fst("verify_dataset", damaged)
    assert broken.returncode == 1
    assert broken.stderr.startswith(f"fst: {damaged} differs from its description (1 problems):\n")
    assert f"  {TOKENS}: truncated: " in broken.stderr
