"""A training that is killed and resumed ends as one that was not; the short form.

Twenty kills of all kinds of training: python -m tests.faults.train_kills
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.train_kills import THREADS

_REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("kinds", "num_kills"),
    [("over epochs", 2), ("answers,an adapter,preferences", 5)],
    ids=["from scratch", "from a model"],
)
def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(
    kinds: str, num_kills: int
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.faults.train_kills",
            *("--kills", str(num_kills), "--kinds", kinds),
        ],
        cwd=_REPOSITORY,
        env={**os.environ, **dict.fromkeys(THREADS, "1")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 of them with a violation" in done.stdout
