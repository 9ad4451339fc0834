"""Batches of tensors equal those that are put together sample by sample."""

import numpy as np
import pytest
import torch

from full_stack_transformer.datasets.batches import (
    BatchSpans,
    ConcatenatedSamples,
    LengthBatches,
    PackedBatches,
    SortedBatches,
)
from full_stack_transformer.datasets.collators import PackedCollator, PaddedCollator
from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL
from tests.datasets.corpora import PAD_ID, write_corpus

ROW_LENGTH = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """301 samples of 1 to 24 tokens."""
    lengths = np.random.default_rng(0).integers(1, ROW_LENGTH + 1, 301)
    return write_corpus(tmp_path_factory.mktemp("corpus"), lengths)


def _samples(corpus: Corpus, spans: BatchSpans) -> list[list[int]]:
    ends = (spans.starts + spans.lengths).tolist()
    return [
        corpus.tokens[start:end].tolist()
        for start, end in zip(spans.starts.tolist(), ends, strict=True)
    ]


def _labels_of(sample: list[int]) -> list[int]:
    return [IGNORED_LABEL, *sample[1:]]


def _pad(row: list[int], width: int, value: int) -> list[int]:
    return row + [value] * (width - len(row))


@pytest.mark.parametrize("batch_size", [1, 7, 301])
def test_padded_rows_are_the_samples(corpus: Corpus, batch_size: int) -> None:
    plan = LengthBatches(corpus, batch_size=batch_size, seed=0)
    collate = PaddedCollator(corpus, pad_id=PAD_ID)
    for position in range(plan.num_batches_per_epoch):
        spans = plan.batch(0, position)
        batch = collate(spans)
        samples = _samples(corpus, spans)
        width = max(map(len, samples))
        assert batch["input_ids"].tolist() == [_pad(row, width, PAD_ID) for row in samples]
        assert batch["labels"].tolist() == [
            _pad(_labels_of(row), width, IGNORED_LABEL) for row in samples
        ]
        assert int((batch["labels"] != IGNORED_LABEL).sum()) == plan.num_targets(0, position)


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (5, 1), (3, 2), (40, 1)])
def test_packed_rows_are_samples_one_after_the_other(
    corpus: Corpus, batch_size: int, world_size: int
) -> None:
    collate = PackedCollator(corpus, pad_id=PAD_ID, row_length=ROW_LENGTH)
    for rank in range(world_size):
        plan = PackedBatches(
            corpus,
            batch_size=batch_size,
            row_length=ROW_LENGTH,
            seed=0,
            rank=rank,
            world_size=world_size,
        )
        for position in range(plan.num_batches_per_epoch):
            spans = plan.batch(0, position)
            batch = collate(spans)
            expected = _packed_sample_by_sample(_samples(corpus, spans), spans)
            assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
            assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def _packed_sample_by_sample(
    samples: list[list[int]], spans: BatchSpans
) -> dict[str, list[list[int]]]:
    names = ("input_ids", "labels", "position_ids", "document_ids")
    batch: dict[str, list[list[int]]] = {
        name: [[] for _ in range(spans.num_rows)] for name in names
    }
    num_documents = [0] * spans.num_rows
    for sample, row in zip(samples, spans.rows.tolist(), strict=True):
        batch["input_ids"][row] += sample
        batch["labels"][row] += _labels_of(sample)
        batch["position_ids"][row] += range(len(sample))
        batch["document_ids"][row] += [num_documents[row]] * len(sample)
        num_documents[row] += 1
    for row, num in enumerate(num_documents):
        num_free = ROW_LENGTH - len(batch["input_ids"][row])
        batch["input_ids"][row] += [PAD_ID] * num_free
        batch["labels"][row] += [IGNORED_LABEL] * num_free
        batch["position_ids"][row] += range(num_free)
        batch["document_ids"][row] += [num] * num_free
    return batch


def test_a_batch_may_have_rows_without_a_sample(corpus: Corpus) -> None:
    none = np.zeros(0, dtype=np.int64)
    collate = PackedCollator(corpus, pad_id=PAD_ID, row_length=ROW_LENGTH)
    batch = collate(BatchSpans(none, none, none, num_rows=2))
    assert (batch["input_ids"] == PAD_ID).all()
    assert (batch["labels"] == IGNORED_LABEL).all()
    assert batch["position_ids"].tolist() == [list(range(ROW_LENGTH))] * 2


def test_concatenated_rows_are_pieces_of_the_corpus(corpus: Corpus) -> None:
    plan = LengthBatches(ConcatenatedSamples(corpus.num_tokens, ROW_LENGTH), batch_size=4, seed=0)
    collate = PaddedCollator(corpus, pad_id=PAD_ID)
    for position in range(plan.num_batches_per_epoch):
        spans = plan.batch(0, position)
        batch = collate(spans)
        rows = _samples(corpus, spans)
        assert batch["input_ids"].tolist() == rows
        assert batch["labels"].tolist() == [_labels_of(row) for row in rows]


def test_a_rank_without_a_sample_has_nothing_to_predict(corpus: Corpus) -> None:
    collate = PaddedCollator(corpus, pad_id=PAD_ID)
    plan = SortedBatches(corpus, batch_size=100, rank=2, world_size=3)
    last = collate(plan.batch(0, plan.num_batches_per_epoch - 1))
    assert plan.num_batches_per_epoch == 2
    assert last["labels"].tolist() == [[IGNORED_LABEL]]


def test_windows_end_where_the_corpus_ends(corpus: Corpus) -> None:
    last, width = corpus.num_tokens - 1, 5
    starts = np.array([0, last, last - 2])
    expected = [
        [int(corpus.tokens[min(start + column, last)]) for column in range(width)]
        for start in starts.tolist()
    ]
    assert corpus.windows(starts, width).tolist() == expected
    assert corpus.windows(starts[:1], corpus.num_tokens).tolist() == [corpus.tokens.tolist()]
