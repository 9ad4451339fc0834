"""Batches hold every sample once, in an order that only seed, epoch and position decide."""

import time
from collections.abc import Callable

import numpy as np
import pytest

from full_stack_transformer.datasets import batches as batches_module
from full_stack_transformer.datasets.batches import (
    BatchPlan,
    BatchSpans,
    ConcatenatedSamples,
    LengthBatches,
    PackedBatches,
    Samples,
    SortedBatches,
    limited,
)
from full_stack_transformer.datasets.order import pack
from tests.datasets.corpora import ManySamples, SamplesWithoutTokens, short_lengths

ROW_LENGTH = 256
# Several windows of each kind, and a last batch of 4 samples or rows where 8 are a batch.
MANY = SamplesWithoutTokens(short_lengths(60_012))
FEW = SamplesWithoutTokens(short_lengths(1003))

MakePlan = Callable[..., BatchPlan]


def _by_length(samples: Samples, **options: int) -> BatchPlan:
    return LengthBatches(samples, **{"batch_size": 8, "seed": 1, **options})


def _packed(samples: Samples, **options: int) -> BatchPlan:
    return PackedBatches(
        samples, **{"batch_size": 8, "seed": 1, "row_length": ROW_LENGTH, **options}
    )


def _concatenated(samples: Samples, **options: int) -> BatchPlan:
    return _by_length(ConcatenatedSamples(samples.num_tokens, ROW_LENGTH), **options)


all_plans = pytest.mark.parametrize("make_plan", [_by_length, _packed, _concatenated])


def _epoch(plan: BatchPlan, epoch: int = 0) -> list[BatchSpans]:
    return [plan.batch(epoch, position) for position in range(plan.num_batches_per_epoch)]


def _starts(batches: list[BatchSpans]) -> list[int]:
    starts: list[int] = np.concatenate([batch.starts for batch in batches]).tolist()
    return starts


def _content(batch: BatchSpans) -> list[list[int]]:
    return [batch.starts.tolist(), batch.lengths.tolist(), batch.rows.tolist(), [batch.num_rows]]


@pytest.mark.parametrize("samples", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("make_plan", [_by_length, _packed])
def test_every_sample_occurs_once_an_epoch(
    make_plan: MakePlan, samples: SamplesWithoutTokens
) -> None:
    for epoch in range(2):
        batches = _epoch(make_plan(samples), epoch)
        lengths = np.concatenate([batch.lengths for batch in batches])
        pairs = zip(_starts(batches), lengths.tolist(), strict=True)
        assert sorted(pairs) == list(
            zip(samples.starts.tolist(), samples.lengths.tolist(), strict=True)
        )


def test_concatenated_rows_are_the_corpus_without_its_rest() -> None:
    batches = _epoch(_concatenated(MANY))
    assert sorted(_starts(batches)) == list(
        range(0, MANY.num_tokens // ROW_LENGTH * ROW_LENGTH, ROW_LENGTH)
    )
    assert all((batch.lengths == ROW_LENGTH).all() for batch in batches)


@all_plans
def test_seed_and_epoch_decide_the_order(make_plan: MakePlan) -> None:
    first = _starts(_epoch(make_plan(FEW)))
    assert first == _starts(_epoch(make_plan(FEW)))
    assert first != _starts(_epoch(make_plan(FEW), 1))
    assert first != _starts(_epoch(make_plan(FEW, seed=2)))


@all_plans
def test_a_batch_depends_on_its_position_alone(make_plan: MakePlan) -> None:
    """What was asked for before makes no difference."""
    plan, random = make_plan(MANY), np.random.default_rng(0)
    in_order = [_content(batch) for epoch in range(2) for batch in _epoch(plan, epoch)]
    for number in random.integers(0, len(in_order), 30).tolist():
        epoch, position = divmod(number, plan.num_batches_per_epoch)
        assert _content(make_plan(MANY).batch(epoch, position)) == in_order[number]
        assert _content(plan.batch(epoch, position)) == in_order[number]


@all_plans
@pytest.mark.parametrize("world_size", [2, 4])
def test_batches_over_all_ranks_are_those_of_one_process(
    make_plan: MakePlan, world_size: int
) -> None:
    alone = make_plan(MANY, batch_size=8)
    plans = [
        make_plan(MANY, batch_size=8 // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {plan.num_batches_per_epoch for plan in plans} == {alone.num_batches_per_epoch}
    for position in range(0, alone.num_batches_per_epoch, 7):
        whole = alone.batch(0, position)
        parts = [plan.batch(0, position) for plan in plans]
        assert sorted(_starts(parts)) == sorted(whole.starts.tolist())
        assert sum(part.num_rows for part in parts) == whole.num_rows
        assert {plan.num_targets(0, position) for plan in plans} == {alone.num_targets(0, position)}


@all_plans
def test_targets_are_all_tokens_but_the_first(make_plan: MakePlan) -> None:
    plan = make_plan(MANY)
    for position in range(0, plan.num_batches_per_epoch, 11):
        assert plan.num_targets(0, position) == (plan.batch(0, position).lengths - 1).sum()


def test_little_of_a_batch_by_length_is_padding() -> None:
    assert 40 < MANY.lengths.mean() < 42
    batches = _epoch(_by_length(MANY, batch_size=16))
    slots = sum(len(batch.lengths) * int(batch.lengths.max()) for batch in batches)
    assert 1 - MANY.num_tokens / slots < 0.02
    random_order = np.array_split(np.random.default_rng(0).permutation(len(MANY)), 3751)
    random_slots = sum(len(batch) * int(MANY.lengths[batch].max()) for batch in random_order)
    assert 1 - MANY.num_tokens / random_slots > 0.5  # what it would be without grouping


@pytest.mark.parametrize("batch_size", [1, 16, 100])
def test_packed_batches_are_full_and_of_one_shape(batch_size: int) -> None:
    batches = _epoch(_packed(MANY, batch_size=batch_size))
    assert {batch.num_rows for batch in batches} == {batch_size}
    assert MANY.num_tokens / (len(batches) * batch_size * ROW_LENGTH) > 0.95
    for batch in batches:
        assert (np.diff(batch.rows) >= 0).all()
        used = np.bincount(batch.rows, weights=batch.lengths)
        assert used.max(initial=0) <= ROW_LENGTH


def test_an_epoch_of_one_window_has_as_many_packed_batches_as_it_needs() -> None:
    num_rows = pack(FEW.lengths, ROW_LENGTH).num_rows
    assert _packed(FEW).num_batches_per_epoch == -(-num_rows // 8)


def test_rows_beyond_what_was_expected_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_ROOM", -5.0)
    batches = _epoch(_packed(MANY))
    assert {batch.num_rows for batch in batches} == {8, 9}
    assert sorted(_starts(batches)) == MANY.starts.tolist()


@pytest.mark.parametrize(
    ("num_samples", "num_batches", "num_fillers"), [(16, 2, 0), (17, 3, 1), (19, 3, 0), (3, 1, 0)]
)
def test_a_rank_without_a_sample_in_the_last_batch_gets_a_filler(
    num_samples: int, num_batches: int, num_fillers: int
) -> None:
    samples = SamplesWithoutTokens(short_lengths(num_samples))
    batches: list[BatchSpans] = []
    for rank in range(2):
        plan = _by_length(samples, batch_size=4, rank=rank, world_size=2)
        assert plan.num_batches_per_epoch == num_batches
        batches += _epoch(plan)
    real = [batch for batch in batches if not batch.is_filler]
    assert len(batches) - len(real) == num_fillers
    assert sorted(_starts(real)) == samples.starts.tolist()


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("num_samples", [1003, 1009, 2])
def test_validation_sees_every_sample_once(num_samples: int, world_size: int) -> None:
    samples = SamplesWithoutTokens(short_lengths(num_samples))
    plans = [
        SortedBatches(samples, batch_size=8, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = [batch for plan in plans for batch in _epoch(plan)]
    assert len(batches) == world_size * plans[0].num_batches_per_epoch
    assert all(len(batch.starts) for batch in batches)
    # A rank that nothing is left for gets a token that nothing is predicted for.
    real = [batch for batch in batches if batch.lengths.max() > 1]
    assert sorted(_starts(real)) == samples.starts.tolist()
    num_targets = sum(plans[0].num_targets(0, n) for n in range(plans[0].num_batches_per_epoch))
    assert num_targets == samples.num_tokens - num_samples


def test_validation_has_one_order() -> None:
    plan = SortedBatches(FEW, batch_size=8)
    assert _starts(_epoch(plan, 0)) == _starts(_epoch(plan, 5))
    lengths = np.concatenate([batch.lengths for batch in _epoch(plan)])
    assert (np.diff(lengths) >= 0).all()


def test_a_part_of_the_validation_has_samples_of_all_lengths() -> None:
    batches = _epoch(SortedBatches(MANY, batch_size=8, limit=0.01))
    assert len(batches) == 75
    lengths = np.concatenate([batch.lengths for batch in batches])
    assert lengths.mean() == pytest.approx(MANY.lengths.mean(), rel=0.02)
    assert len(set(_starts(batches))) == 75 * 8


@pytest.mark.parametrize(
    ("num_batches", "limit", "expected"),
    [(100, 1.0, 100), (100, 0.29, 29), (100, 0.001, 1), (100, 7, 7), (100, 500, 100), (0, 1.0, 0)],
)
def test_a_limit_is_a_part_or_a_number(num_batches: int, limit: float, expected: int) -> None:
    assert limited(num_batches, limit) == expected


@all_plans
def test_any_batch_of_a_billion_samples_is_there_at_once(make_plan: MakePlan) -> None:
    started = time.perf_counter()
    plan = make_plan(ManySamples(10**9))
    position = plan.num_batches_per_epoch * 2 // 3
    assert len(plan.batch(17, position).starts) >= 8
    assert plan.num_targets(17, position + 1) > 0
    assert time.perf_counter() - started < 1
