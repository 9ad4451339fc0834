"""For tests of any bot: `pytest_plugins = ["tests.fake_bot_api.fixtures"]`, and ask for `fake_bot_api`.

def test_it_greets(fake_bot_api: FakeBotApi) -> None:
    ...  # start the bot with fake_bot_api.url and fake_bot_api.token
    fake_bot_api.write(chat_id=1, text="/start")
    (greeting,) = fake_bot_api.bot_messages(chat_id=1, at_least=1)
"""

from collections.abc import Iterator

import pytest

from tests.fake_bot_api.process import FakeBotApi, running_fake_bot_api


@pytest.fixture
def fake_bot_api() -> Iterator[FakeBotApi]:
    """A server of one test, with Telegram's limits."""
    with running_fake_bot_api() as fake:
        yield fake
