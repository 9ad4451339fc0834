"""When a training validates and when it ends."""

from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.training.optimization import Plan

_PER_EPOCH = 10


def _plan(**options: Any) -> Plan:
    arguments = TrainArguments(dataset_dir=Path("none"), **options)
    return Plan.of(arguments, num_batches_per_epoch=_PER_EPOCH)


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        ({"max_epochs": 3}, 30),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": 3, "max_steps": 70}, 30),
        ({"max_epochs": -1, "max_steps": 70}, 70),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 8),
        ({"max_epochs": -1, "max_minutes": 1.0}, None),
    ],
)
def test_the_first_limit_ends_the_training(options: dict[str, Any], num_steps: int | None) -> None:
    plan = _plan(**options)
    assert plan.num_steps == num_steps
    if num_steps is not None:
        assert plan.progress(num_steps - 1, 0.0) < 1.0
        assert plan.progress(num_steps, 0.0) == 1.0


def test_steps_and_minutes_count_whichever_is_further() -> None:
    plan = _plan(max_epochs=-1, max_steps=100, max_minutes=2.0)
    assert plan.progress(50, 12.0) == 0.5
    assert plan.progress(50, 90.0) == 0.75
    assert plan.progress(50, 1000.0) == 1.0


def test_no_steps_at_all_are_over_at_once() -> None:
    assert _plan(max_steps=0).progress(0, 0.0) == 1.0


@pytest.mark.parametrize(
    ("interval", "accumulate", "expected"),
    [
        (1.0, 1, [10, 20, 30]),
        (0.5, 1, [5, 10, 15, 20, 25, 30]),
        (0.01, 1, list(range(1, 31))),
        (12.0, 1, [12, 24]),
        # Of a step of four batches that passes the tenth, the end: checkpoints are written there.
        (1.0, 4, [12, 20]),
        (2.0, 4, [4, 8, 12, 16, 20, 24, 28]),
    ],
)
def test_validations_come_at_the_same_batches_whatever_was_resumed(
    interval: float, accumulate: int, expected: list[int]
) -> None:
    plan = _plan(max_epochs=3, val_check_interval=interval, accumulate_grad_batches=accumulate)
    ends_of_steps = range(accumulate, 31, accumulate)
    assert [batch for batch in ends_of_steps if plan.validates_after(batch)] == expected
