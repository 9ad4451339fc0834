"""One random schedule; many of them are run by `python -m tests.faults.bot_kills --schedules 200`."""

from pathlib import Path

from tests.fake_bot_api.process import running_fake_bot_api
from tests.faults.bot_schedules import LongTexts, Schedule, SlowService
from tests.telegram.bot_forks import BotForks
from tests.telegram.stand_in_service import serving


def test_a_random_schedule_keeps_every_guarantee(forks: BotForks, quick_path: Path) -> None:
    with running_fake_bot_api() as telegram, serving(LongTexts()) as slow:
        slow.seconds_between_pieces = 0.01
        counts = Schedule(2, telegram, forks, SlowService(slow), quick_path).run()
    assert counts["texts"] > 0
