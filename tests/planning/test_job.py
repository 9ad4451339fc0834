"""What a job has; and a plan against the job that it plans, ten minutes for a quiet machine.

python -m pytest -m slow -s tests/planning
"""

from pathlib import Path

import pytest

from full_stack_transformer.arguments.planning import PlanArguments
from full_stack_transformer.planning.job import job_of
from tests.benchmarks.plan import TOLERANCE, compare, documentation


@pytest.mark.slow
def test_a_job_of_ten_minutes_takes_what_was_planned(tmp_path: Path) -> None:
    ratios = compare(tmp_path, 10, "mini", documentation(tmp_path))
    assert ratios["wall clock"] == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("num_steps", "num_validations"), [(16.4, 16), (25.0, 12), (99.0, 11), (1000.0, 10), (0.5, 0)]
)
def test_validations_are_those_of_the_printed_interval(
    num_steps: float, num_validations: int
) -> None:
    job = job_of(PlanArguments(tokens=1e6, parameters=1e6))
    assert job.num_validations_in(num_steps) == num_validations
    epochs = job_of(PlanArguments(tokens=1e6, parameters=1e6, max_epochs=3))
    assert epochs.num_validations_in(num_steps) == 3
