"""Batches hold every sample once, in an order that only seed and epoch decide."""

import numpy as np
import pytest
import torch

from full_stack_transformer.datasets.batches import LengthBatchSampler
from full_stack_transformer.datasets.collators import CausalCollator

LENGTHS = np.random.default_rng(0).integers(2, 100, 1003)


def _batches(epoch: int = 0, **options: int) -> list[list[int]]:
    defaults = {"batch_size": 8, "seed": 1}
    sampler = LengthBatchSampler(LENGTHS, **{**defaults, **options}, shuffle=True)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def test_every_sample_occurs_once_an_epoch() -> None:
    for epoch in range(3):
        assert sorted(index for batch in _batches(epoch) for index in batch) == list(
            range(len(LENGTHS))
        )


def test_seed_and_epoch_decide_the_order() -> None:
    assert _batches(0) == _batches(0)
    assert _batches(0) != _batches(1)
    assert _batches(0, seed=1) != _batches(0, seed=2)


def test_little_of_a_batch_is_padding() -> None:
    slots = sum(len(batch) * int(LENGTHS[batch].max()) for batch in _batches())
    assert 1 - LENGTHS.sum() / slots < 0.03
    random_slots = sum(
        len(batch) * int(LENGTHS[batch].max())
        for batch in np.array_split(np.random.default_rng(0).permutation(len(LENGTHS)), 125)
    )
    assert 1 - LENGTHS.sum() / random_slots > 0.3  # what it would be without grouping


def test_ranks_share_an_epoch_evenly() -> None:
    shares = [_batches(rank=rank, world_size=4) for rank in range(4)]
    assert len({len(share) for share in shares}) == 1
    seen = [index for share in shares for batch in share for index in batch]
    assert len(seen) == len(set(seen))
    assert len(seen) > len(LENGTHS) - 4 * 8


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_sees_every_sample_in_one_order(world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        sampler = LengthBatchSampler(
            LENGTHS, batch_size=8, seed=0, shuffle=False, rank=rank, world_size=world_size
        )
        batches = list(sampler)
        assert len(batches) == len(sampler)
        seen += [index for batch in batches for index in batch]
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_padding_is_never_a_target() -> None:
    samples = [np.array([5, 6, 7]), np.array([8])]
    batch = CausalCollator(pad_id=0)(samples)
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 7], [8, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[5, 6, 7], [8, -100, -100]]))
