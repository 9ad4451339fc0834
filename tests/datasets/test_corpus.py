"""The corpus files hold exactly the samples, and damage is noticed when they are opened."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from full_stack_transformer.datasets.corpus import (
    CORPUS_FILE_NAME,
    POSITIONS_FILE_NAME,
    ArrayFile,
    Corpus,
    CorpusWriter,
    token_dtype,
)
from full_stack_transformer.errors import DatasetError

Samples = list[list[int]]

SAMPLES: Samples = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]


def _write(directory: Path, blocks: list[Samples], vocab_size: int = 1000) -> None:
    with CorpusWriter(directory, vocab_size) as writer:
        for block in blocks:
            token_ids = np.array([token_id for sample in block for token_id in sample])
            writer.append(token_ids, np.array([len(sample) for sample in block], dtype=np.int64))


def _open(directory: Path) -> Corpus:
    return Corpus(
        directory, num_samples=len(SAMPLES), num_tokens=sum(len(sample) for sample in SAMPLES)
    )


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=9), min_size=1, max_size=5),
        min_size=1,
        max_size=5,
    )
)
def test_samples_come_back_however_they_were_appended(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[Samples]
) -> None:
    directory = tmp_path_factory.mktemp("corpus")
    _write(directory, blocks)
    samples = [sample for block in blocks for sample in block]
    corpus = Corpus(
        directory, num_samples=len(samples), num_tokens=sum(len(sample) for sample in samples)
    )
    assert [corpus[index].tolist() for index in range(len(corpus))] == samples
    assert corpus.lengths().tolist() == [len(sample) for sample in samples]
    backwards = list(range(len(samples)))[::-1]
    assert [row.tolist() for row in corpus.gather(backwards)] == samples[::-1]


def test_the_files_are_plain_numpy(tmp_path: Path) -> None:
    _write(tmp_path, [SAMPLES[:2], [], SAMPLES[2:]])
    tokens = np.load(tmp_path / CORPUS_FILE_NAME)
    starts = np.load(tmp_path / POSITIONS_FILE_NAME)
    assert tokens.dtype.str == "<u2"
    assert tokens.tolist() == list(range(1, 11))
    assert starts.dtype.str == "<i8"
    assert starts.tolist() == [0, 3, 4, 6]


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [(65536, "<u2"), (65537, "<u4")],
)
def test_the_type_holds_the_largest_id(vocab_size: int, expected: str, tmp_path: Path) -> None:
    assert token_dtype(vocab_size).str == expected
    _write(tmp_path, [[[vocab_size - 1]]], vocab_size)
    corpus = Corpus(tmp_path, num_samples=1, num_tokens=1)
    assert corpus[0].tolist() == [vocab_size - 1]


def test_a_header_has_room_for_any_length(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    file = ArrayFile(path, np.dtype("<u2"))
    file.length = 10**15
    with pytest.raises(ValueError, match="mmap"):
        file.close()
        np.load(path, mmap_mode="r")  # the header is whole, the data is not there


@pytest.mark.parametrize("name", [CORPUS_FILE_NAME, POSITIONS_FILE_NAME])
@pytest.mark.parametrize("damage", ["missing", "short", "long", "empty", "other type", "pickle"])
def test_damage_is_noticed(name: str, damage: str, tmp_path: Path) -> None:
    _write(tmp_path, [SAMPLES])
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content[:-1])
    elif damage == "long":
        path.write_bytes(content + b"\0")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other type":
        np.save(path, np.load(path).astype(">u2"))
    else:
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DatasetError, match=name):
        _open(tmp_path)


def test_a_description_of_something_else_is_noticed(tmp_path: Path) -> None:
    _write(tmp_path, [SAMPLES])
    with pytest.raises(DatasetError, match="11 values as described, found 10"):
        Corpus(tmp_path, num_samples=4, num_tokens=11)


def test_an_id_beyond_the_vocabulary_is_named_wherever_it_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "train", [SAMPLES])
    corpus = _open(tmp_path / "train")
    corpus.limit_ids(10)
    assert corpus[2].tolist() == [5, 6]
    said = r"train/corpus.npy holds the token id 10, but the tokenizer has 10 tokens"
    with pytest.raises(DatasetError, match=said):
        corpus.gather([0, 3])
    with pytest.raises(DatasetError, match=said):
        corpus.windows(np.array([6]), 4)
    with pytest.raises(DatasetError, match=said):
        corpus.windows(np.array([9]), 4)
