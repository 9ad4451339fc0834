"""`python -m tests.faults.bot_kills --schedules 200`: random users, faults and kills, all guarantees checked.

The real bot process, the fake Bot API, and in turns the real service with a tiny model and a slow
stand-in that can be stopped in the middle of a text; users who write, repeat,
stop and change settings; 429, 5xx, resets before and after Telegram took a message; SIGTERM and
kill -9. Afterwards every prompt has exactly one final answer, equal to the service's byte for byte.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from tests.fake_bot_api.process import running_fake_bot_api
from tests.faults.bot_schedules import (
    BrokenGuaranteeError,
    LongTexts,
    RealService,
    Schedule,
    Service,
    SlowService,
)
from tests.logged_process import running_service
from tests.telegram.bot_forks import bot_forks
from tests.telegram.stand_in_service import serving
from tests.tiny_model import make_tiny_model


def run_schedules(
    num_schedules: int, first_seed: int, *, with_stand_by: bool = False
) -> Counter[str]:
    """Run schedules one after the other; counts of what happened.

    With a second bot that stands by, it takes over instead of a new start.

    Raises:
        BrokenGuaranteeError: the first broken guarantee, with its schedule's seed and log.
    """
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fst-kills-")))
        telegram = stack.enter_context(running_fake_bot_api())
        forks = stack.enter_context(bot_forks())
        stand_in = stack.enter_context(serving(LongTexts()))
        stand_in.seconds_between_pieces = 0.02
        slow = SlowService(stand_in)
        url, _ = stack.enter_context(running_service(make_tiny_model(directory)))
        for seed in range(first_seed, first_seed + num_schedules):
            service: Service = RealService(url) if seed % 2 else slow
            counts += Schedule(
                *(seed, telegram, forks, service, directory), with_stand_by=with_stand_by
            ).run()
            print(f"schedule {seed}: all guarantees kept", file=sys.stderr)
        counts["429 of a chat's limit"] = telegram.state()["num_limited"]
    return counts


def main() -> int:
    """Run, and print what happened."""
    parser = argparse.ArgumentParser(description="Random schedules for the bot")
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--stand_by", action="store_true", help="a second bot takes over")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        counts = run_schedules(options.schedules, options.seed, with_stand_by=options.stand_by)
    except BrokenGuaranteeError as error:
        print(error)
        return 1
    print(
        f"{options.schedules} schedules in {time.monotonic() - started:.0f} s, all guarantees kept"
    )
    for name, count in sorted(counts.items()):
        print(f"  {name:<28}{count:>7,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
