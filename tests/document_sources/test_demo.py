"""What the demo trains on machines of different speed."""

import pytest

from full_stack_transformer.document_sources.demo import Choice


@pytest.mark.parametrize(
    ("tokens_per_second", "minutes", "expected"),
    [
        (300, 5.0, "micro"),
        (3_500, 5.0, "micro"),
        (7_000, 5.0, "mini"),
        (3_500, 20.0, "mini"),
        (14_000, 5.0, "mini"),
        (300_000, 5.0, "small"),
    ],
)
def test_the_model_fits_the_tokens_that_it_can_see(
    tokens_per_second: float, minutes: float, expected: str
) -> None:
    rates = {"micro": 2.5, "mini": 1.0, "small": 0.22}
    rates = {name: tokens_per_second * factor for name, factor in rates.items()}
    choice = Choice.of(rates, minutes)
    assert choice.model_config == expected
    options = dict(zip(choice.options()[::2], choice.options()[1::2], strict=True))
    assert options["--model_config"] == expected
    assert int(options["--num_warmup_steps"]) < choice.num_steps
    # Two validations before the last one.
    assert int(options["--val_check_interval"]) <= choice.num_steps // 3 + 1


def test_a_moment_of_training_is_one_step() -> None:
    choice = Choice.of({"micro": 1.0, "mini": 0.4, "small": 0.1}, 0.05)
    assert choice.num_steps == 1
    assert "--num_warmup_steps" in choice.options()
