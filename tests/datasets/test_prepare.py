"""Preparing gives exactly the samples of the obvious algorithm, whole or not at all."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from full_stack_transformer.arguments import PrepareDatasetArguments
from full_stack_transformer.datasets import prepare
from full_stack_transformer.datasets.description import DatasetDirectory, open_dataset
from full_stack_transformer.datasets.prepare import prepare_dataset
from full_stack_transformer.errors import DatasetError, DocumentsError, UsageError
from full_stack_transformer.tokenization import open_saved_tokenizer
from tests.conftest import SHARED_DATA, RunFst

REPOSITORY = Path(__file__).resolve().parents[2]


def _arguments(documents_dir: Path, root: Path, **options: object) -> PrepareDatasetArguments:
    return PrepareDatasetArguments(
        **{
            "documents_train_file": documents_dir / "train.txt",
            "documents_valid_file": documents_dir / "valid.txt",
            "datasets_root": root,
            "dataset_name": "tiny",
            "vocab_size": 300,
            **options,
        }  # type: ignore[arg-type]
    )


def test_nietzsche_gives_the_four_figures(run_fst: RunFst, tmp_path: Path) -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip("the reference text is not here: expected ../shared/data")
    import subprocess
    import sys

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
    documents_dir: Path, dataset: DatasetDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
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

    # Blocks of any size give the same bytes.
    monkeypatch.setattr(prepare, "_BLOCK_CHARACTERS", 50)
    again = prepare_dataset(_arguments(documents_dir, tmp_path, max_sample_length=64))
    for name in ("train/corpus.npy", "train/sample_start_positions.npy", "valid/corpus.npy"):
        assert (again / name).read_bytes() == (dataset.directory / name).read_bytes()


def test_the_description_tells_what_was_done(dataset: DatasetDirectory) -> None:
    description = dataset.description
    assert description["max_sample_length"] == 64
    assert description["number_of_train_samples"] == len(dataset.train)
    assert description["number_of_valid_tokens"] == len(dataset.valid.tokens)
    for name, facts in description["output_files"].items():
        content = (dataset.directory / name).read_bytes()
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert facts["size_bytes"] == len(content)
    assert "/" not in json.dumps(description["input_files"])
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
        ("[]", "no dataset directory"),
        (None, "no dataset directory"),
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
