"""Conversations are cut after an answer that fits, and batches of them learn the answers alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from full_stack_transformer.datasets.batches import LengthBatches, PackedBatches, SortedBatches
from full_stack_transformer.datasets.collators import PackedCollator, PaddedCollator
from full_stack_transformer.datasets.conversations import (
    Conversations,
    PairCollator,
    PreferencePairs,
)
from full_stack_transformer.datasets.corpus import Corpus, CorpusWriter, open_dataset
from full_stack_transformer.datasets.cuts import LeftOut
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL
from tests.datasets.corpora import PAD_ID, VOCAB_SIZE

MAX_LENGTH = 40
# Tokens of a question and of its answer, of each conversation.
TURNS = [[(3, 5)], [(4, 6), (30, 8), (2, 2)], [(2, 50), (1, 3)], [(38, 2)], [(5, 40), (9, 9)]]


def _write(directory: Path, conversations: list[list[tuple[int, int]]]) -> Corpus:
    """Conversations whose tokens are random, and whose last token is a line end that is not learned."""
    marks = [
        np.concatenate([*(np.repeat([0, 1], turn) for turn in turns), [0]])
        for turns in conversations
    ]
    lengths = np.array([len(one) for one in marks])
    learned = np.concatenate(marks)
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, len(learned))
    with CorpusWriter(directory, VOCAB_SIZE, has_answers=True) as writer:
        half = int(lengths[:2].sum())
        writer.append(ids[:half], lengths[:2], learned[:half])
        writer.append(ids[half:], lengths[2:], learned[half:])
    return Corpus(directory, num_samples=len(lengths), num_tokens=len(ids), has_answers=True)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return _write(tmp_path, TURNS)


def _many(directory: Path) -> Corpus:
    numbers = np.random.default_rng(1)
    return _write(
        directory,
        [
            [(int(a), int(b)) for a, b in numbers.integers(1, 20, (numbers.integers(1, 5), 2))]
            for _ in range(300)
        ],
    )


def test_a_conversation_ends_after_the_last_answer_that_fits(corpus: Corpus) -> None:
    samples = Conversations(corpus, MAX_LENGTH)
    starts, lengths = samples.spans(np.arange(len(samples)))
    firsts = corpus.start_positions
    assert starts.tolist() == [firsts[0], firsts[1], firsts[3]]
    # The last one has a token more than fits, which is not learned.
    assert lengths.tolist() == [9, 10, 40]
    assert samples.num_targets(starts, lengths).tolist() == [5, 6, 2]
    assert samples.left_out == LeftOut(
        num_samples=2, num_cut_samples=2, num_answers=6, num_learned_tokens=8 + 2 + 53 + 49
    )
    assert "6 answers (112 tokens) do not fit" in str(samples.left_out)
    assert not str(Conversations(corpus, 64).left_out)


def test_without_an_answer_that_fits_there_is_nothing_to_learn(corpus: Corpus) -> None:
    with pytest.raises(DatasetError, match=r"ends within 4 tokens; train with a longer context"):
        Conversations(corpus, 4)


@pytest.mark.parametrize("at_once", [1 << 24, 16])
def test_the_cuts_equal_those_found_token_by_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("full_stack_transformer.datasets.cuts._TOKENS_AT_ONCE", at_once)
    corpus = _many(tmp_path)
    assert corpus.learned is not None
    samples = Conversations(corpus, MAX_LENGTH)
    expected: list[tuple[int, int, int]] = []
    num_answers = 0
    for start, length in zip(corpus.start_positions, corpus.lengths(), strict=True):
        learned = [0, *corpus.learned[start + 1 : start + length].tolist(), 0]
        ends = [at + 1 for at in range(length) if learned[at] and not learned[at + 1]]
        fitting = [end for end in ends if end <= MAX_LENGTH]
        num_answers += len(ends) - len(fitting)
        if fitting:
            cut = int(length) if length <= MAX_LENGTH else fitting[-1]
            expected.append((int(start), cut, sum(learned[:cut])))
    starts, lengths = samples.spans(np.arange(len(samples)))
    targets = samples.num_targets(starts, lengths)
    assert list(zip(starts.tolist(), lengths.tolist(), targets.tolist(), strict=True)) == expected
    assert samples.left_out.num_answers == num_answers > 0
    assert samples.num_tokens == sum(length for _, length, _ in expected)


def _expected_labels(corpus: Corpus, start: int, length: int) -> list[int]:
    assert corpus.learned is not None
    span = slice(start, start + length)
    pairs = zip(corpus.tokens[span].tolist(), corpus.learned[span].tolist(), strict=True)
    labels = [token if is_learned else IGNORED_LABEL for token, is_learned in pairs]
    return [IGNORED_LABEL, *labels[1:]]


def test_packed_rows_learn_the_answers_and_keep_conversations_apart(tmp_path: Path) -> None:
    corpus = _many(tmp_path)
    samples = Conversations(corpus, MAX_LENGTH)
    plan = PackedBatches(samples, batch_size=4, row_length=MAX_LENGTH, seed=3)
    collate = PackedCollator(corpus, pad_id=PAD_ID, row_length=MAX_LENGTH)
    seen: list[int] = []
    for position in range(plan.num_batches_per_epoch):
        spans = plan.batch(0, position)
        batch = collate(spans)
        assert int((batch["labels"] != IGNORED_LABEL).sum()) == plan.num_targets(0, position)
        place = dict.fromkeys(range(spans.num_rows), 0)
        for start, length, row in zip(
            *(part.tolist() for part in (spans.starts, spans.lengths, spans.rows)), strict=True
        ):
            here = slice(place[row], place[row] + length)
            assert batch["labels"][row, here].tolist() == _expected_labels(corpus, start, length)
            assert batch["position_ids"][row, here].tolist() == list(range(length))
            assert len(set(batch["document_ids"][row, here].tolist())) == 1
            place[row] += length
            seen.append(start)
        for row, used in place.items():
            assert (batch["labels"][row, used:] == IGNORED_LABEL).all()
    assert sorted(seen) == samples.spans(np.arange(len(samples)))[0].tolist()
    again = PackedBatches(samples, batch_size=4, row_length=MAX_LENGTH, seed=3).batch(0, 5)
    assert np.array_equal(again.starts, plan.batch(0, 5).starts)


def test_padded_rows_learn_the_answers(tmp_path: Path) -> None:
    corpus = _many(tmp_path)
    samples = Conversations(corpus, MAX_LENGTH)
    for chosen in (corpus, corpus.learning_all()):
        spans = LengthBatches(samples, batch_size=8, seed=0).batch(0, 1)
        labels = PaddedCollator(chosen, pad_id=PAD_ID)(spans)["labels"]
        for row, (start, length) in enumerate(
            zip(spans.starts.tolist(), spans.lengths.tolist(), strict=True)
        ):
            expected = _expected_labels(corpus, start, length)
            if chosen is not corpus:
                expected = [IGNORED_LABEL, *corpus.tokens[start + 1 : start + length].tolist()]
            assert labels[row, :length].tolist() == expected
            assert (labels[row, length:] == IGNORED_LABEL).all()


def test_both_answers_of_a_pair_are_in_one_batch(tmp_path: Path) -> None:
    # The same question, two answers; the second pair does not fit.
    corpus = _write(
        tmp_path,
        [[(3, 5)], [(3, 2)], [(3, 50)], [(3, 1)], [(4, 9)], [(4, 4)], [(1, 1)], [(1, 2)]],
    )
    pairs = PreferencePairs(corpus, MAX_LENGTH)
    assert (len(pairs), pairs.num_left_out) == (3, 1)
    plan = LengthBatches(pairs, batch_size=3, seed=0)
    batch = PairCollator(corpus, pad_id=PAD_ID)(plan.batch(0, 0))
    order = np.searchsorted(corpus.start_positions, plan.batch(0, 0).starts)
    assert sorted(order.tolist()) == [0, 4, 6]
    for row, sample in enumerate([*order.tolist(), *(order + 1).tolist()]):
        start, length = int(corpus.start_positions[sample]), int(corpus.lengths()[sample])
        labels = batch["labels"][row].tolist()
        assert labels[:length] == _expected_labels(corpus, start, length)
        assert set(labels[length:]) <= {IGNORED_LABEL}
        assert batch["input_ids"][row, :length].tolist() == corpus.tokens[start:][:length].tolist()
    assert plan.num_targets(0, 0) == 3
    filler = SortedBatches(pairs, batch_size=1, rank=1, world_size=2).batch(0, 1)
    assert filler.is_filler
    assert (PairCollator(corpus, pad_id=PAD_ID)(filler)["labels"] == IGNORED_LABEL).all()
    with pytest.raises(DatasetError, match="no pair"):
        PreferencePairs(corpus, 2)


def _dataset(directory: Path, kind: str, learned: NDArray[np.uint8] | None = None) -> Path:
    description = {"format_version": 1, "kind": kind}
    for split in ("train", "valid"):
        corpus = _write(directory / split, TURNS)
        description |= {
            f"number_of_{split}_samples": len(corpus),
            f"number_of_{split}_tokens": corpus.num_tokens,
        }
        if learned is not None:
            np.save(directory / split / "learned.npy", learned)
    (directory / "description.json").write_text(json.dumps(description))
    return directory


def test_a_dataset_directory_says_what_it_holds(tmp_path: Path) -> None:
    dataset = open_dataset(_dataset(tmp_path / "a", "conversations"))
    assert dataset.kind == "conversations"
    assert dataset.train.learned is not None
    with pytest.raises(DatasetError, match="holds 'songs', which this release does not know"):
        open_dataset(_dataset(tmp_path / "b", "songs"))
    with pytest.raises(DatasetError, match=r"learned.npy should hold"):
        open_dataset(_dataset(tmp_path / "c", "conversations", np.zeros(3, dtype=np.uint8)))
