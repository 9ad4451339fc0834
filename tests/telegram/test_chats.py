"""Turns of chats, without Telegram."""

import asyncio
import logging

import pytest

from full_stack_transformer.telegram.chats import Chats


def test_a_failing_answer_does_not_take_the_next_with_it_nor_its_words_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given: list[int] = []
    words = ["said", "by", "a", "user"]

    async def fail() -> None:
        raise ValueError(" ".join(words))

    async def succeed() -> None:
        given.append(1)

    async def scenario() -> None:
        chats = Chats()
        chats.submit(1, fail)
        chats.submit(1, succeed)
        chats.submit_aside(1, fail)
        await chats.finish(max_seconds=10)
        assert chats.num_owed() == 0

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    assert given == [1]
    assert caplog.text.count("failed: ValueError") == 2
    assert "test_chats.py" in caplog.text
    assert "said by a user" not in caplog.text


def test_what_takes_too_long_at_the_end_is_abandoned() -> None:
    async def scenario() -> None:
        chats = Chats()
        chats.submit(1, asyncio.Event().wait)
        chats.submit(1, asyncio.Event().wait)
        await asyncio.sleep(0)  # the first one begins
        assert (chats.num_owed(), chats.num_waiting(1)) == (2, 1)
        await chats.finish(max_seconds=0.01)
        assert (chats.num_owed(), chats.num_waiting(1)) == (0, 0)

    asyncio.run(scenario())
