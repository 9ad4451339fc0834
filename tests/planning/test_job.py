"""A plan against the job that it plans: ten minutes, for a quiet machine.

python -m pytest -m slow -s tests/planning
"""

from pathlib import Path

import pytest

from tests.benchmarks.plan import TOLERANCE, compare


@pytest.mark.slow
def test_a_job_of_ten_minutes_takes_what_was_planned(tmp_path: Path) -> None:
    assert compare(tmp_path, minutes=10, model_config="mini") == pytest.approx(1, abs=TOLERANCE)
