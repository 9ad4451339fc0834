"""What is replayed: the exact share, each sample in turn, whatever the number of processes."""

from pathlib import Path

import numpy as np
import pytest

from full_stack_transformer.datasets.corpus import Corpus, open_dataset
from full_stack_transformer.datasets.replay import (
    Replay,
    ReplaySource,
    num_targets_of,
    replayed_part,
)


@pytest.fixture
def corpus(dataset_dir: Path) -> Corpus:
    return open_dataset(dataset_dir).train


def _replay(
    corpus: Corpus, *shares: float, rank: int = 0, world_size: int = 1, **more: int
) -> Replay:
    sources = [ReplaySource("documents", corpus, share) for share in shares]
    return Replay(
        sources,
        targets_per_batch=200.0,
        pad_id=1,
        rank=rank,
        world_size=world_size,
        **{"seed": 3, **more},
    )


def _samples(replay: Replay, number: int) -> list[list[int]]:
    """The token ids that are replayed beside a batch, by the labels and ids of its rows."""
    found = []
    part = replayed_part(replay.batch(number)[0])
    if part is None:
        return []
    for row, labels in zip(part["input_ids"].tolist(), part["labels"].tolist(), strict=True):
        starts = [place for place in range(len(row) - 1) if labels[place] < 0 <= labels[place + 1]]
        for start in starts:
            end = start + 1
            while end < len(row) and labels[end] >= 0:
                assert labels[end] == row[end]
                end += 1
            found.append(row[start:end])
    return found


def test_the_share_of_the_targets_is_exact_over_an_epoch(corpus: Corpus) -> None:
    for shares in ((0.1,), (0.02, 0.3)):
        replay = _replay(corpus, *shares)
        num_batches = 20 * round(len(corpus) / min(replay.rates))
        total = sum(map(replay.num_targets, range(num_batches)))
        share = total / (total + 200.0 * num_batches)
        assert share == pytest.approx(sum(shares), rel=1e-3)


def test_every_sample_comes_once_in_each_pass_in_another_order(corpus: Corpus) -> None:
    replay = _replay(corpus, 0.3)
    num_batches = int(2 * len(corpus) / replay.rates[0])
    found = [tuple(one) for number in range(num_batches) for one in _samples(replay, number)]
    all_samples = sorted(tuple(corpus[index].tolist()) for index in range(len(corpus)))
    first, second = found[: len(corpus)], found[len(corpus) : 2 * len(corpus)]
    assert sorted(first) == all_samples
    assert first[: len(second)] != second
    assert set(second) <= set(all_samples)


@pytest.mark.parametrize("row_length", [None, 64])
def test_processes_share_what_one_reads(corpus: Corpus, row_length: int | None) -> None:
    more = {} if row_length is None else {"row_length": row_length}
    alone = _replay(corpus, 0.2, 0.05, **more)
    ranks = [_replay(corpus, 0.2, 0.05, rank=rank, world_size=2, **more) for rank in range(2)]
    for number in (0, 1, 2, 50, 10**9):
        shared = [one for rank in ranks for one in _samples(rank, number)]
        assert sorted(shared) == sorted(_samples(alone, number))
        assert {rank.num_targets(number) for rank in ranks} == {alone.num_targets(number)}
        assert sum(rank.batch(number)[1] for rank in ranks) == alone.batch(number)[1]
        assert alone.num_targets(number) == sum(len(one) - 1 for one in _samples(alone, number))


def test_all_processes_have_a_row_or_none_has(corpus: Corpus) -> None:
    ranks = [_replay(corpus, 0.05, rank=rank, world_size=4) for rank in range(4)]
    kinds = set()
    for number in range(20):
        parts = [replayed_part(rank.batch(number)[0]) for rank in ranks]
        kinds.add(tuple(part is not None for part in parts))
    assert kinds == {(True,) * 4, (False,) * 4}


def test_packed_samples_do_not_see_each_other(corpus: Corpus) -> None:
    part = replayed_part(_replay(corpus, 0.5, row_length=64).batch(0)[0])
    assert part is not None
    documents, positions = part["document_ids"].numpy(), part["position_ids"].numpy()
    changes = np.diff(documents, axis=1) > 0
    assert changes.any()
    assert (positions[:, 1:][changes] == 0).all()
    assert (np.diff(positions, axis=1)[~changes] == 1).all()
    assert (part["labels"].numpy()[positions == 0] == -100).all()


def test_another_seed_gives_another_order(corpus: Corpus) -> None:
    assert _samples(_replay(corpus, 0.3), 5) == _samples(_replay(corpus, 0.3), 5)
    assert _samples(_replay(corpus, 0.3), 5) != _samples(_replay(corpus, 0.3, seed=4), 5)


def test_targets_are_counted(corpus: Corpus) -> None:
    assert num_targets_of(corpus) == corpus.num_tokens - len(corpus)
