"""One fake Bot API, one stand-in service and one bot for all tests of a module."""

import itertools
from collections.abc import Iterator

import pytest

from tests.fake_bot_api.process import FakeBotApi, running_fake_bot_api
from tests.telegram.bot_process import BotProcess, bot_command
from tests.telegram.stand_in_service import StandInService, serving

_chat_ids = itertools.count(1000)


@pytest.fixture(scope="session")
def telegram() -> Iterator[FakeBotApi]:
    """The fake Bot API."""
    with running_fake_bot_api() as fake:
        yield fake


@pytest.fixture(scope="module")
def service() -> Iterator[StandInService]:
    """The stand-in for the generation service."""
    with serving(StandInService()) as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def bot(telegram: FakeBotApi, service: StandInService) -> Iterator[BotProcess]:
    """The bot, polling."""
    process = BotProcess(bot_command(service.url, telegram.url), telegram.token)
    try:
        process.start()
        yield process
        assert process.stop() == 0
    finally:
        process.kill()


@pytest.fixture
def chat_id() -> int:
    """A private chat that no other test uses."""
    return next(_chat_ids)
