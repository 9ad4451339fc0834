"""The losses are the plain formulas over real targets, and so are their gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from full_stack_transformer.modelling import losses
from full_stack_transformer.modelling.losses import (
    LossOptions,
    language_model_loss,
    next_token_loss,
)
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL

VOCAB_SIZE = 23
OPTIONS = {
    "cross entropy": LossOptions(),
    "unlikelihood": LossOptions(unlikelihood_alpha=0.7),
    "label smoothing": LossOptions(label_smoothing=0.1),
    "z-loss": LossOptions(z_loss=0.01),
    "all": LossOptions(unlikelihood_alpha=1.5, label_smoothing=0.2, z_loss=0.003),
}


@dataclass(frozen=True)
class Case:
    """A batch of random tokens, many of them repeated, with random logits."""

    logits: Tensor
    labels: Tensor
    input_ids: Tensor
    document_ids: Tensor | None


def _padded() -> Case:
    """Rows of 12, 9 and 1 tokens; the first token of a row is never a target."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(6, (3, 12), generator=generator)
    labels = input_ids.clone()
    labels[:, 0] = IGNORED_LABEL
    for row, length in enumerate((12, 9, 1)):
        input_ids[row, length:] = VOCAB_SIZE - 1
        labels[row, length:] = IGNORED_LABEL
    return Case(_logits(3, 12, generator), labels, input_ids, None)


def _packed() -> Case:
    """Rows of documents of 5, 4 and 3 tokens, and of 7 with padding."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(6, (2, 12), generator=generator)
    document_ids = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 7 + [1] * 5])
    labels = input_ids.clone()
    labels[0, [0, 5, 9]] = IGNORED_LABEL
    labels[1, 0] = IGNORED_LABEL
    labels[1, 7:] = IGNORED_LABEL
    input_ids[1, 7:] = VOCAB_SIZE - 1
    return Case(_logits(2, 12, generator), labels, input_ids, document_ids)


def _logits(num_rows: int, num_tokens: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.randn(num_rows, num_tokens, VOCAB_SIZE, generator=generator)


CASES = {"padded": _padded, "packed": _packed}


def _obvious_loss(case: Case, logits: Tensor, options: LossOptions) -> Tensor:
    """Position after position, as the formulas are written."""
    total = torch.zeros((), dtype=logits.dtype)
    num_rows, num_tokens = case.labels.shape
    for row in range(num_rows):
        for position in range(num_tokens - 1):
            target = int(case.labels[row, position + 1])
            if target == IGNORED_LABEL:
                continue
            log_p = logits[row, position].log_softmax(0)
            total = total - (1 - options.label_smoothing) * log_p[target]
            total = total - options.label_smoothing * log_p.mean()
            total = total + options.z_loss * logits[row, position].logsumexp(0) ** 2
            context = {
                int(case.input_ids[row, before])
                for before in range(position + 1)
                if case.document_ids is None
                or case.document_ids[row, before] == case.document_ids[row, position]
            }
            for candidate in sorted(context - {target}):
                penalty = -torch.log1p(-log_p[candidate].exp())
                total = total + options.unlikelihood_alpha * penalty
    return total


def _value_and_gradient(
    case: Case, loss: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    logits = case.logits.to(dtype).requires_grad_()
    value = loss(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


@pytest.fixture(params=[1, 50, 1 << 20], ids=["rows", "pairs", "one chunk"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one row, of two rows, of all of them."""
    monkeypatch.setattr(losses, "_CPU_CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("make_case", CASES.values(), ids=CASES.keys())
def test_the_loss_and_its_gradient_are_the_obvious_ones(
    make_case: Callable[[], Case], options: LossOptions
) -> None:
    case = make_case()
    expected, expected_gradient = _value_and_gradient(
        case, lambda logits: _obvious_loss(case, logits, options)
    )
    found, gradient = _value_and_gradient(
        case,
        lambda logits: language_model_loss(
            logits, case.labels, case.input_ids, options, case.document_ids
        )[0],
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make_case", CASES.values(), ids=CASES.keys())
def test_the_gradient_is_exact_in_double_precision(make_case: Callable[[], Case]) -> None:
    case, options = make_case(), OPTIONS["all"]
    expected, expected_gradient = _value_and_gradient(
        case, lambda logits: _obvious_loss(case, logits, options), torch.float64
    )
    found, gradient = _value_and_gradient(
        case,
        lambda logits: language_model_loss(
            logits, case.labels, case.input_ids, options, case.document_ids
        )[0],
        torch.float64,
    )
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-14)


def test_the_cross_entropy_and_the_targets_are_told_apart() -> None:
    case = _padded()
    _, cross_entropy, num_targets = language_model_loss(
        case.logits, case.labels, case.input_ids, OPTIONS["all"]
    )
    expected = _obvious_loss(case, case.logits, LossOptions())
    torch.testing.assert_close(cross_entropy, expected, rtol=1e-6, atol=0)
    assert num_targets == 11 + 8
    loss_sum, count = next_token_loss(case.logits, case.labels)
    assert torch.equal(loss_sum, cross_entropy)
    assert count == num_targets


def test_label_smoothing_is_that_of_torch() -> None:
    case = _padded()
    options = LossOptions(label_smoothing=0.3)
    found = language_model_loss(case.logits, case.labels, case.input_ids, options)[0]
    expected = functional.cross_entropy(
        case.logits[:, :-1].flatten(0, 1),
        case.labels[:, 1:].flatten(),
        label_smoothing=0.3,
        reduction="sum",
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_weight_of_the_loss_scales_its_gradient() -> None:
    case = _padded()
    _, once = _value_and_gradient(case, lambda logits: next_token_loss(logits, case.labels)[0])
    _, scaled = _value_and_gradient(
        case, lambda logits: 0.3 * next_token_loss(logits, case.labels)[0]
    )
    torch.testing.assert_close(scaled, 0.3 * once)


def test_bf16_logits_give_a_loss_of_fp32() -> None:
    """As exact as if the logits had been cast; the gradient is rounded to their type at the end."""
    case, options = _packed(), OPTIONS["all"]
    rounded = case.logits.bfloat16()
    expected, expected_gradient = _value_and_gradient(
        case, lambda logits: _obvious_loss(case, logits.bfloat16().float(), options)
    )
    logits = rounded.requires_grad_()
    loss, _, _ = language_model_loss(
        logits, case.labels, case.input_ids, options, case.document_ids
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=0.01, atol=1e-6)


def test_mixed_precision_changes_nothing_inside() -> None:
    case, options = _packed(), OPTIONS["all"]
    arguments = (case.logits, case.labels, case.input_ids, options, case.document_ids)
    plain = language_model_loss(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = language_model_loss(*arguments)
    assert all(torch.equal(*pair) for pair in zip(plain, mixed, strict=True))


def test_a_repeated_token_without_doubt_has_a_finite_gradient() -> None:
    """1 - p is rounded to zero there, and its logarithm would be infinite."""
    logits = torch.tensor([[[60.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    labels = input_ids = torch.tensor([[0, 1]])
    options = LossOptions(unlikelihood_alpha=1.0)
    loss, cross_entropy, _ = language_model_loss(logits, labels, input_ids, options)
    torch.testing.assert_close(cross_entropy, torch.tensor(60.0))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert loss > cross_entropy
    assert gradient[0, 0, 0] > 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)],
    ids=["fp32", "bf16", "fp16"],
)
def test_losses_that_cancel_each_other_leave_their_targets(
    dtype: torch.dtype, tolerance: float
) -> None:
    """Cross entropy and unlikelihood add up to no probability at all in this gradient."""
    logits = torch.zeros(1, 2, 2, dtype=dtype, requires_grad=True)
    input_ids = torch.tensor([[0, 1]])
    options = LossOptions(unlikelihood_alpha=1.0)
    loss, _, _ = language_model_loss(logits, input_ids, input_ids, options)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]], dtype=dtype)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance)


def test_a_target_that_is_all_but_impossible_has_its_cross_entropy() -> None:
    logits = torch.tensor([[[300.0, -20.0, 5.0], [0.0, 0.0, 0.0]]])
    loss, _ = next_token_loss(logits, torch.tensor([[0, 1]]))
    torch.testing.assert_close(loss, torch.tensor(320.0))


def test_a_loss_that_is_not_a_number_is_not_hidden() -> None:
    case = _padded()
    logits = case.logits.clone()
    logits[0, 3, 4] = torch.nan
    assert next_token_loss(logits, case.labels)[0].isnan()


def test_what_is_not_predicted_has_neither_loss_nor_gradient() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    labels = torch.full((1, 3), IGNORED_LABEL)
    options = LossOptions(unlikelihood_alpha=1.0, label_smoothing=0.1, z_loss=1.0)
    loss, _, num_targets = language_model_loss(logits, labels, labels.clamp(min=0), options)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 == num_targets.item()
    assert not gradient.any()


def test_the_gradient_is_taken_once() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss, _ = next_token_loss(logits, torch.tensor([[1, 2, 3]]))
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        torch.autograd.grad(loss, logits)


def test_logits_need_not_lie_in_order() -> None:
    case, options = _padded(), OPTIONS["all"]
    arguments = (case.labels, case.input_ids, options)
    expected, expected_gradient = _value_and_gradient(
        case, lambda logits: language_model_loss(logits, *arguments)[0]
    )
    scattered = case.logits.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    loss = language_model_loss(scattered, *arguments)[0]
    (gradient,) = torch.autograd.grad(loss, scattered)
    assert not scattered.is_contiguous()
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(gradient, expected_gradient)
