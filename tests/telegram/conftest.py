"""One fake Bot API, one stand-in service and one bot for all tests of a module."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_bot_api.process import FakeBotApi, running_fake_bot_api
from tests.telegram.bot_forks import QUICK, BotForks, ForkedBot, bot_forks, running_bot
from tests.telegram.bot_process import bot_command, quick_directory
from tests.telegram.stand_in_service import StandInService, serving

_chat_ids = itertools.count(1000)


@pytest.fixture(scope="session")
def forks() -> Iterator[BotForks]:
    """The server that starts bots."""
    with bot_forks() as server:
        yield server


@pytest.fixture
def quick_path() -> Iterator[Path]:
    """A directory of one test, in memory if possible."""
    with tempfile.TemporaryDirectory(prefix="fst-test-", dir=quick_directory()) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def telegram(request: pytest.FixtureRequest) -> Iterator[FakeBotApi]:
    """The fake Bot API; without rate limits for a module with WITH_LIMITS = False."""
    with_limits = getattr(request.module, "WITH_LIMITS", True)
    with running_fake_bot_api(with_limits=with_limits) as fake:
        yield fake


@pytest.fixture(scope="module")
def service() -> Iterator[StandInService]:
    """The stand-in for the generation service."""
    with serving(StandInService()) as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def bot(
    request: pytest.FixtureRequest, telegram: FakeBotApi, service: StandInService, forks: BotForks
) -> Iterator[ForkedBot]:
    """The bot, polling; user 99 is its admin."""
    more = {} if getattr(request.module, "WITH_LIMITS", True) else QUICK
    command = bot_command(service.url, telegram.url, "--admin_ids", "99")
    forked = forks.bot(command, telegram.token, more)
    with running_bot(forked) as running:
        yield running


@pytest.fixture
def chat_id() -> int:
    """A private chat that no other test uses."""
    return next(_chat_ids)
