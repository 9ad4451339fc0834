"""Weights as small integers: what they stand for, and which ones a calibration chooses."""

import pytest
import torch
from torch import Tensor

from full_stack_transformer.quantization.codes import GROUP_SIZE, joined, nearest, rotated
from full_stack_transformer.quantization.gptq import rounded_with_errors_passed_on


def _weights(num_outputs: int, num_inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_inputs)
    return torch.randn(num_outputs, num_inputs, generator=generator)


def test_four_bits_are_half_a_step_off_at_most() -> None:
    weights = _weights(7, 96)
    codes = nearest(weights, "int4")
    assert codes.shape == (7, 96)
    assert codes.codes.shape == (7, 48)
    assert codes.group_scales is not None
    steps = (codes.scales[:, None] * codes.group_scales).repeat_interleave(GROUP_SIZE, 1)
    # And a sixteenth for the zero, and what a scale of 8 bits is off at the end of a group.
    assert bool(((codes.weights() - weights).abs() <= 0.6 * steps).all())


def test_what_has_a_scale_and_a_minimum_is_represented() -> None:
    """As GGUF's Q4_1, whose groups have the codes 0 and 15."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (64, 4, GROUP_SIZE), generator=generator).float()
    codes[..., 0], codes[..., 1] = 0, 15
    scales = torch.rand(64, 4, 1, generator=generator) * 0.5 + 0.5
    weights = ((codes - 7 * torch.rand(64, 4, 1, generator=generator) - 4) * scales).view(64, 128)
    distance = (nearest(weights, "int4").weights() - weights).norm() / weights.norm()
    assert distance < 0.01


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-35])
def test_weights_that_are_all_alike_are_kept(value: float) -> None:
    weights = torch.full((3, 64), value)
    for dtype in ("int8", "int4"):
        assert nearest(weights, dtype).weights() == pytest.approx(weights.numpy(), abs=1e-2)


@pytest.mark.parametrize("num_inputs", [16, 48, 64, 576])
def test_a_rotation_changes_no_product_and_spreads_what_is_large(num_inputs: int) -> None:
    weights, inputs = _weights(5, num_inputs), _weights(3, num_inputs)
    inputs[:, 7] = 100
    exact = inputs @ weights.T
    assert rotated(inputs) @ rotated(weights).T == pytest.approx(exact.numpy(), rel=1e-3, abs=1e-2)
    assert rotated(rotated(weights)) == pytest.approx(weights.numpy(), abs=1e-5)
    assert bool((rotated(inputs).abs().amax(1) < 40).all())


def test_what_makes_no_groups_stays_int8() -> None:
    codes = nearest(_weights(5, 48), "int4")
    assert codes.group_scales is None
    assert codes.codes.dtype == torch.int8
    assert torch.equal(codes.codes, nearest(_weights(5, 48), "int8").codes)


def test_parts_are_joined_and_taken_apart() -> None:
    weights = _weights(12, 64)
    whole = nearest(weights, "int4")
    parts = joined([nearest(weights[:5], "int4"), nearest(weights[5:], "int4")])
    assert torch.equal(parts.weights(), whole.weights())
    order = torch.tensor([3, 11, 0])
    assert torch.equal(whole.rows(order).weights(), whole.weights()[order])


def test_a_calibration_changes_outputs_less_than_rounding_to_the_nearest() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = _weights(48, 128)
    # Inputs of few directions, as of real models.
    inputs = torch.randn(400, 20, generator=generator) @ torch.randn(20, 128, generator=generator)
    inputs += 0.1 * torch.randn(400, 128, generator=generator)
    inputs[:, 5] = 0
    exact = inputs @ weights.T
    changes = [
        float((inputs @ codes.weights().T - exact).norm() / exact.norm())
        for codes in (
            nearest(weights, "int4"),
            rounded_with_errors_passed_on(weights, inputs.T @ inputs),
        )
    ]
    assert changes[1] < 0.6 * changes[0]
