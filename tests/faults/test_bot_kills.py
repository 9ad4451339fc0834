"""Two of the random lives; the long loop is `python -m tests.faults.bot_kills --schedules 200`."""

import os
from pathlib import Path

import pytest

from tests.fake_bot_api.process import running_fake_bot_api
from tests.faults.bot_kills import run_schedules
from tests.faults.bot_schedules import LongTexts, Schedule, SlowService
from tests.telegram.bot_forks import bot_forks
from tests.telegram.stand_in_service import serving


def test_a_random_life_keeps_every_promise(tmp_path: Path) -> None:
    with running_fake_bot_api() as telegram, bot_forks() as forks, serving(LongTexts()) as slow:
        slow.seconds_between_pieces = 0.01
        counts = Schedule(2, telegram, forks, SlowService(slow), tmp_path).run()
    assert counts["texts"] > 0


@pytest.mark.slow
@pytest.mark.skipif("FST_LONG" not in os.environ, reason="LONG: set FST_LONG=1")
def test_two_hundred_random_lives_keep_every_promise() -> None:
    assert run_schedules(200, first_seed=0)["texts"] > 400
