"""Preparing gives exactly the samples of the obvious algorithm, whole or not at all."""

import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.datasets.corpus import DatasetDirectory, open_dataset
from full_stack_transformer.documents import delimited
from full_stack_transformer.documents.blocks import ReadingOptions
from full_stack_transformer.errors import DatasetError, DocumentsError, UsageError
from full_stack_transformer.preparation import encoding, journal
from full_stack_transformer.preparation.encoding import EncodedBlock, Workers
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from full_stack_transformer.storage import versions
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer
from tests.conftest import SHARED_DATA

REPOSITORY = Path(__file__).resolve().parents[2]


def _arguments(documents_dir: Path, root: Path, **options: object) -> PrepareDatasetArguments:
    return PrepareDatasetArguments(
        **{
            "documents_train_file": (documents_dir / "train.txt",),
            "documents_valid_file": (documents_dir / "valid.txt",),
            "datasets_root": root,
            "dataset_name": "tiny",
            "vocab_size": 300,
            **options,
        }  # type: ignore[arg-type]
    )


def test_nietzsche_gives_the_four_figures(tmp_path: Path) -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip("the reference text is not here: expected ../shared/data")
    done = subprocess.run(
        [
            *(sys.executable, REPOSITORY / "full_stack_transformer/scripts/prepare_dataset.py"),
            *("--documents_train_file", SHARED_DATA / "nietzsche/train.txt"),
            *("--documents_valid_file", SHARED_DATA / "nietzsche/valid.txt"),
            *("--end_of_document", "[END_OF_DOCUMENT]"),
            *("--tokenizer_cls_name", "GPT2Tokenizer"),
            *("--tokenizer_path", SHARED_DATA / "gpt2"),
            *("--max_sample_length", "128", "--min_sample_length", "8"),
            *("--datasets_root", tmp_path, "--dataset_name", "nietzsche"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{tmp_path / 'nietzsche' / '0'}\n"
    description = json.loads((tmp_path / "nietzsche/0/description.json").read_text())
    figures = {key: value for key, value in description.items() if key.startswith("number_of")}
    assert figures == {
        "number_of_train_samples": 1347,
        "number_of_train_tokens": 135094,
        "number_of_valid_samples": 69,
        "number_of_valid_tokens": 7636,
    }


def test_samples_equal_the_obvious_algorithm(
    documents_dir: Path, dataset: DatasetDirectory
) -> None:
    tokenizer = open_saved_tokenizer(dataset.tokenizer_directory)
    expected = []
    for document in (documents_dir / "train.txt").read_text().split("[END_OF_DOCUMENT]\n"):
        if not document.strip():
            continue
        ids = tokenizer.backend.encode(document.rstrip("\n"), add_special_tokens=False).ids
        framed = [tokenizer.begin_id, *ids, tokenizer.end_id]
        pieces = [framed[start : start + 64] for start in range(0, len(framed), 64)]
        expected += [piece for piece in pieces if len(piece) >= 8]
    assert [dataset.train[index].tolist() for index in range(len(dataset.train))] == expected


@pytest.mark.parametrize("num_workers", [1, 2, 4, 5], ids="{} workers".format)
def test_any_number_of_workers_gives_the_same_bytes(
    num_workers: int, documents_dir: Path, dataset: DatasetDirectory, tmp_path: Path
) -> None:
    """Five are spawned processes, fewer are threads; blocks are small enough to keep all busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK_BYTES", 700)
        patch.setattr(encoding, "BLOCK_BYTES", 700)
        patch.setattr(delimited, "_MAX_DELIMITER_LINE_BYTES", 100)
        again = prepare_dataset(
            _arguments(
                documents_dir,
                tmp_path,
                max_sample_length=64,
                num_workers=num_workers,
                tokenizer_path=str(dataset.tokenizer_directory),
            )
        )
    _assert_equal_corpora(again, dataset.directory)


def _assert_equal_corpora(one: Path, other: Path) -> None:
    for split in ("train", "valid"):
        names = sorted(path.name for path in (one / split).iterdir())
        assert names == sorted(path.name for path in (other / split).iterdir())
        assert len(names) > 1
        for name in names:
            assert (one / split / name).read_bytes() == (other / split / name).read_bytes()


@pytest.mark.parametrize("backend", ["tokenizers", "gigatoken"])
def test_both_back_ends_give_the_same_bytes(
    backend: str, documents_dir: Path, dataset: DatasetDirectory, tmp_path: Path
) -> None:
    again = prepare_dataset(
        _arguments(
            documents_dir,
            tmp_path,
            max_sample_length=64,
            tokenizer_backend=backend,
            tokenizer_path=str(dataset.tokenizer_directory),
        )
    )
    _assert_equal_corpora(again, dataset.directory)
    assert open_dataset(again).description["tokenizer_backend"].startswith(f"{backend} ")


@pytest.mark.parametrize(
    ("num_blocks", "num_characters", "max_shard_bytes"),
    [
        *((number, size, None) for number in (0, 1, 2, 5, 9, 14, 30) for size in (700, 60_000)),
        (9, 20_000, "4096"),
    ],
)
def test_an_interrupted_preparation_is_gone_on_with(
    num_blocks: int,
    num_characters: int,
    max_shard_bytes: str | None,
    documents_dir: Path,
    tmp_path: Path,
) -> None:
    """Interrupted after any block, with a journal line after each: the same bytes in the end."""
    giant = " ".join(f"word{number}" for number in range(num_characters // 8))
    text = (documents_dir / "train.txt").read_text()
    (tmp_path / "train.txt").write_text(f"{text}{giant}\n[END_OF_DOCUMENT]\n{text}")
    options = {
        "documents_train_file": (documents_dir / "train.txt", tmp_path / "train.txt"),
        "tokenizer_path": None,
        "deduplicate": "exact",
        "num_workers": 1,
        "max_shard_bytes": max_shard_bytes,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK_BYTES", 2500)
        patch.setattr(encoding, "BLOCK_BYTES", 2500)
        patch.setattr(delimited, "_MAX_DELIMITER_LINE_BYTES", 100)
        patch.setattr(journal, "_SECONDS_BETWEEN_LINES", 0.0)
        whole = prepare_dataset(_arguments(documents_dir, tmp_path / "whole", **options))
        interrupted = _arguments(documents_dir, tmp_path / "resumed", **options)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Workers, "encode", _interrupting_after(num_blocks))
            with pytest.raises(KeyboardInterrupt):
                prepare_dataset(interrupted)
        assert versions(tmp_path / "resumed", "tiny") == []
        counted: list[int] = []
        patch.setattr(Workers, "encode", _counting(counted))
        resumed = prepare_dataset(dataclasses.replace(interrupted, resume=True))
        total = _number_of_blocks(tmp_path / "train.txt") + _number_of_blocks(
            documents_dir / "train.txt"
        )
    _assert_equal_corpora(whole, resumed)
    assert [path.name for path in (tmp_path / "resumed" / "tiny").iterdir()] == ["0"]
    counts = [open_dataset(one).description["counts"] for one in (whole, resumed)]
    assert counts[0] == counts[1]
    if num_blocks:
        assert len(counted) <= total + 2 - num_blocks + 2


def _number_of_blocks(path: Path) -> int:
    reading = ReadingOptions(end_of_document="[END_OF_DOCUMENT]", can_cut=True)
    return len(list(delimited.DelimitedText(reading).blocks(path, start=0, continues=False)))


def _interrupting_after(num_blocks: int) -> Callable[..., Generator[EncodedBlock, None, None]]:
    seen = 0
    original = Workers.encode

    def encode(*arguments: Any) -> Generator[EncodedBlock, None, None]:
        nonlocal seen
        for block in original(*arguments):
            if seen == num_blocks:
                raise KeyboardInterrupt
            seen += 1
            yield block

    return encode


def _counting(counted: list[int]) -> Callable[..., Generator[EncodedBlock, None, None]]:
    original = Workers.encode

    def encode(*arguments: Any) -> Generator[EncodedBlock, None, None]:
        for block in original(*arguments):
            counted.append(block.block_end)
            yield block

    return encode


def test_other_options_do_not_go_on_with_it(documents_dir: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "encode", _interrupting_after(0))
        with pytest.raises(KeyboardInterrupt):
            prepare_dataset(_arguments(documents_dir, tmp_path))
    [left] = (tmp_path / "tiny").iterdir()
    again = prepare_dataset(_arguments(documents_dir, tmp_path, max_sample_length=32, resume=True))
    assert not left.exists()
    assert open_dataset(again).description["max_sample_length"] == 32


@pytest.mark.parametrize("max_shard_bytes", [None, "4096"], ids=["single", "shards"])
def test_a_giant_document_gives_the_samples_of_the_obvious_algorithm(
    max_shard_bytes: str | None, documents_dir: Path, dataset: DatasetDirectory, tmp_path: Path
) -> None:
    """In one line and in many; also one that never ends, of which nothing may stay."""
    tokenizer = open_saved_tokenizer(dataset.tokenizer_directory)
    line = " ".join(f"word {number} é's" for number in range(3000))
    lines = "\n".join(f"  line {number}, the next" for number in range(3000))
    texts = ["small", line, "between", lines, "after"]
    content = "".join(f"{text}\n[END_OF_DOCUMENT]\n" for text in texts)
    (tmp_path / "train.txt").write_text(f"{content}{line}", encoding="utf-8")
    expected = []
    for text in texts:
        stripped = "\n".join(one.strip() for one in text.split("\n"))
        [ids] = tokenizer.encode_documents([stripped])
        expected += [ids[start : start + 50] for start in range(0, len(ids), 50)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK_BYTES", 5000)
        patch.setattr(encoding, "BLOCK_BYTES", 5000)
        patch.setattr(delimited, "_MAX_DELIMITER_LINE_BYTES", 100)
        directory = prepare_dataset(
            _arguments(
                documents_dir,
                tmp_path,
                documents_train_file=(tmp_path / "train.txt",),
                tokenizer_path=str(dataset.tokenizer_directory),
                max_sample_length=50,
                min_sample_length=4,
                max_shard_bytes=max_shard_bytes,
            )
        )
    opened = open_dataset(directory)
    samples = [opened.train[index].tolist() for index in range(len(opened.train))]
    assert samples == [sample for sample in expected if len(sample) >= 4]
    counts = opened.description["counts"]["train"]
    assert counts["num_documents"] == 5
    assert counts["num_unterminated_documents"] == 1


def test_duplicates_are_dropped_and_counted(documents_dir: Path, tmp_path: Path) -> None:
    train = documents_dir / "train.txt"
    once = open_dataset(prepare_dataset(_arguments(documents_dir, tmp_path / "once")))
    twice = open_dataset(
        prepare_dataset(
            _arguments(
                documents_dir,
                tmp_path / "twice",
                documents_train_file=(train, train),
                tokenizer_path=str(once.tokenizer_directory),
                deduplicate="exact",
            )
        )
    )
    _assert_equal_corpora(once.directory, twice.directory)
    assert twice.description["counts"]["train"]["num_duplicate_documents"] == 200


def test_a_fraction_is_kept_for_validation(documents_dir: Path, tmp_path: Path) -> None:
    options = {"documents_valid_file": (), "validation_fraction": 0.2}
    split = open_dataset(prepare_dataset(_arguments(documents_dir, tmp_path / "a", **options)))
    again = open_dataset(prepare_dataset(_arguments(documents_dir, tmp_path / "b", **options)))
    _assert_equal_corpora(split.directory, again.directory)
    assert 20 <= split.description["counts"]["valid"]["num_documents"] <= 60
    tokenizer = open_saved_tokenizer(split.tokenizer_directory)
    texts = {
        half: {tokenizer.decode(corpus[index].tolist()) for index in range(len(corpus))}
        for half, corpus in (("train", split.train), ("valid", split.valid))
    }
    assert not texts["train"] & texts["valid"]


def test_formats_may_be_mixed(
    documents_dir: Path, dataset: DatasetDirectory, tmp_path: Path
) -> None:
    """Half of the documents as delimited text, compressed, half as JSON Lines: the same bytes."""
    texts = (documents_dir / "train.txt").read_text(encoding="utf-8").split("\n[END_OF_DOCUMENT]\n")
    first = "".join(f"{text}\n[END_OF_DOCUMENT]\n" for text in texts[:100])
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "1.txt.gz").write_bytes(gzip.compress(first.encode()))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[100:200])
    (inputs / "2.jsonl").write_text(rows, encoding="utf-8")
    again = prepare_dataset(
        _arguments(
            documents_dir,
            tmp_path,
            documents_train_file=(inputs,),
            tokenizer_path=str(dataset.tokenizer_directory),
            max_sample_length=64,
        )
    )
    _assert_equal_corpora(again, dataset.directory)


def test_two_preparations_at_once_get_a_version_each(
    documents_dir: Path, dataset: DatasetDirectory, tmp_path: Path
) -> None:
    command: list[str | Path] = [
        *(sys.executable, "-m", "full_stack_transformer", "prepare_dataset"),
        *("--documents_train_file", documents_dir / "train.txt"),
        *("--documents_valid_file", documents_dir / "valid.txt"),
        *("--tokenizer_path", dataset.tokenizer_directory, "--max_sample_length", "64"),
        *("--datasets_root", tmp_path, "--dataset_name", "tiny"),
    ]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(3)
    ]
    outputs = [process.communicate()[0].decode().strip() for process in processes]
    assert sorted(outputs) == [str(tmp_path / "tiny" / str(number)) for number in range(3)]
    for output in outputs:
        _assert_equal_corpora(Path(output), dataset.directory)


def test_the_description_tells_what_was_done(dataset: DatasetDirectory) -> None:
    description = dataset.description
    assert description["max_sample_length"] == 64
    assert description["number_of_train_samples"] == len(dataset.train)
    assert description["number_of_valid_tokens"] == len(dataset.valid.tokens)
    for name, facts in description["output_files"].items():
        content = (dataset.directory / name).read_bytes()
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert facts["size_bytes"] == len(content)
    names = [file["name"] for files in description["input_files"].values() for file in files]
    assert names == ["train.txt", "valid.txt"]
    lengths = description["sample_lengths"]["train"]
    assert sum(lengths["counts"]) == len(dataset.train)
    assert (lengths["limits"][0], lengths["limits"][-1]) == (8, 64)
    assert str(dataset.directory.parent) not in json.dumps(description)


def test_dropped_samples_are_counted(documents_dir: Path, tmp_path: Path) -> None:
    kept = open_dataset(prepare_dataset(_arguments(documents_dir, tmp_path, min_sample_length=2)))
    fewer = open_dataset(prepare_dataset(_arguments(documents_dir, tmp_path, min_sample_length=40)))
    counts = fewer.description["counts"]["train"]
    assert counts["num_samples"] + counts["num_dropped_samples"] == len(kept.train)
    assert counts["num_tokens"] + counts["num_dropped_tokens"] == len(kept.train.tokens)
    assert min(fewer.train.lengths()) >= 40


def test_the_newest_version_is_opened_by_name(documents_dir: Path, tmp_path: Path) -> None:
    prepare_dataset(_arguments(documents_dir, tmp_path))
    newest = prepare_dataset(_arguments(documents_dir, tmp_path))
    assert open_dataset(tmp_path / "tiny").directory == newest == tmp_path / "tiny" / "1"


def test_every_id_is_below_the_vocabulary(dataset: DatasetDirectory) -> None:
    assert int(np.max(dataset.train.tokens)) < dataset.description["vocab_size"]


def test_no_sample_left_is_an_error_and_leaves_nothing(documents_dir: Path, tmp_path: Path) -> None:
    arguments = _arguments(documents_dir, tmp_path, min_sample_length=5000, max_sample_length=5000)
    with pytest.raises(DatasetError, match="--min_sample_length 5000"):
        prepare_dataset(arguments)
    assert list((tmp_path / "tiny").iterdir()) == []


def test_a_delimiter_that_never_occurs_is_an_error(documents_dir: Path, tmp_path: Path) -> None:
    arguments = _arguments(documents_dir, tmp_path, end_of_document="<never>", tokenizer_path=None)
    with pytest.raises(DocumentsError, match="--end_of_document"):
        prepare_dataset(arguments)


def test_contradicting_lengths_are_a_usage_error(documents_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max_sample_length must be at least 9"):
        _arguments(documents_dir, tmp_path, min_sample_length=9, max_sample_length=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "format version None"),
        ("[]", "not a dataset directory"),
        (None, "not a dataset directory"),
    ],
    ids=["foreign", "no object", "missing"],
)
def test_what_is_no_dataset_directory_is_named(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "description.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path)
