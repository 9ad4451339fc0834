"""Who has which blocks, and which are found again."""

import random
from collections import Counter

import numpy as np

from full_stack_transformer.generation.blocks import BlockPool, first_key, next_key


def _keys(salt: str, *tokens: int) -> list[bytes]:
    """Keys of blocks of one token each."""
    keys, key = [], first_key(salt)
    for token in tokens:
        key = next_key(key, np.array([token]))
        keys.append(key)
    return keys


def test_a_key_follows_from_all_tokens_before_and_from_who_may_share() -> None:
    keys = [
        *(_keys("a", 1, 2)[1], _keys("b", 1, 2)[1], _keys("", 1, 2)[1], _keys("a", 3, 2)[1]),
        *(_keys("a", 2)[0], _keys("a", 1, 2, 2)[2], _keys("a", 258)[0]),
    ]
    assert len(set(keys)) == len(keys)
    assert _keys("a", 1, 2, 3)[:2] == _keys("a", 1, 2)


def test_what_was_used_longest_ago_is_given_out_last_before_what_is_new() -> None:
    pool = BlockPool(6, 1)
    first, second = pool.take(2), pool.take(2)
    for block, key in zip([*first, *second], _keys("", 1, 2, 3, 4), strict=True):
        pool.keep(block, key)
    pool.give_back(first)
    pool.give_back(second)
    # Never used, then the end of the first sequence, then its beginning.
    assert pool.take(4) == [4, 5, first[1], first[0]]
    assert pool.find(_keys("", 1)) == []
    assert pool.num_unused == pool.num_kept == 2


def test_a_beginning_is_found_without_a_gap() -> None:
    pool = BlockPool(4, 1)
    blocks, keys = pool.take(3), _keys("", 1, 2, 3)
    for block, key in zip(blocks, keys, strict=True):
        pool.keep(block, key)
    pool.give_back(blocks)
    assert pool.find(keys) == blocks
    assert pool.find(_keys("", 1, 2, 9)) == blocks[:2]
    pool.forget([blocks[1]])
    assert pool.find(keys) == blocks[:1]
    assert pool.num_unused == 4
    assert pool.take(1) == [blocks[1]]  # what holds nothing of use comes first


def test_no_block_is_lost_or_has_two_owners_whatever_happens() -> None:
    numbers = random.Random(0)
    pool = BlockPool(20, 1)
    tables: list[list[int]] = []
    for _ in range(5000):
        keys = _keys("", *(numbers.randrange(2) for _ in range(numbers.randint(1, 5))))
        found = pool.find(keys)
        num_missing = len(keys) - len(found)
        if num_missing + pool.num_unused_among(found) <= pool.num_unused:
            pool.share(found)
            taken = pool.take(num_missing)
            used = {block for table in tables for block in table}
            assert not used & set(taken)
            tables.append([*found, *taken])
            for block, key in zip(tables[-1], keys, strict=True):
                if numbers.random() < 0.8:
                    pool.keep(block, key)
        if tables and numbers.random() < 0.5:
            table = tables.pop(numbers.randrange(len(tables)))
            if numbers.random() < 0.1:
                pool.forget(table)
            pool.give_back(table)
        users = Counter(block for table in tables for block in table)
        assert pool.num_unused == 20 - len(users)
