"""How probable texts are after others: one forward pass each, windows, and any batch."""

from pathlib import Path

import pytest
import torch

from full_stack_transformer.evaluation.log_likelihoods import (
    TokenSpan,
    continuation_span,
    log_likelihoods,
    rolling_spans,
)
from full_stack_transformer.generation.runners.torch import TorchRunner
from full_stack_transformer.modelling.model_directory import OpenedModel, open_model

PAIRS = [
    ("The reader learns", " from the documents"),
    ("A small model ", "is written to the corpus."),
    ("", "Every sample"),
    ("The corpus looks for\n", "the next token, " * 9),
]


@pytest.fixture(scope="module")
def model(model_dir: Path) -> OpenedModel:
    """The smallest model."""
    return open_model(model_dir, device="cpu")


def _slow(model: OpenedModel, span: TokenSpan) -> tuple[float, bool]:
    with torch.inference_mode():
        logits = model.backbone(torch.tensor([span.token_ids[:-1]])).logits[0].log_softmax(-1)
    total, is_greedy = 0.0, True
    for position in range(len(span.token_ids) - span.num_targets, len(span.token_ids)):
        total += float(logits[position - 1, span.token_ids[position]])
        is_greedy &= int(logits[position - 1].argmax()) == span.token_ids[position]
    return total, is_greedy


@pytest.mark.parametrize("num_blocks", [4, 12])
def test_they_equal_one_span_at_a_time(model: OpenedModel, num_blocks: int) -> None:
    spans = [continuation_span(*pair, model.tokenizer, max_length=128) for pair in PAIRS]
    with torch.inference_mode():
        first = [model.tokenizer.begin_id]
        likeliest = int(model.backbone(torch.tensor([first])).logits[0, -1].argmax())
    spans += [TokenSpan([*first, likeliest], 1), TokenSpan(first, 0)]
    found = log_likelihoods(spans, TorchRunner(model.backbone, num_blocks=num_blocks))
    for span, one in zip(spans[:-1], found, strict=False):
        value, is_greedy = _slow(model, span)
        assert one.value == pytest.approx(value, rel=1e-4)
        assert one.is_greedy == is_greedy
    assert found[-2].is_greedy
    assert found[-1].value == 0


def test_context_and_continuation_are_encoded_as_one_text(model: OpenedModel) -> None:
    tokenizer = model.tokenizer
    for context, continuation in PAIRS:
        span = continuation_span(context, continuation, tokenizer, max_length=128)
        assert list(span.token_ids) == tokenizer.encode_prompt(context + continuation)
        targets = tokenizer.decode(span.token_ids[-span.num_targets :])
        spaces = context[len(context.rstrip()) :]
        assert targets == spaces + continuation


def test_a_context_that_is_too_long_loses_its_beginning(model: OpenedModel) -> None:
    span = continuation_span("word " * 200, "end", model.tokenizer, max_length=20)
    assert len(span.token_ids) == 21
    assert model.tokenizer.decode(span.token_ids).endswith("word end")


@pytest.mark.parametrize("max_length", [3, 5, 100])
def test_windows_predict_each_token_once(model: OpenedModel, max_length: int) -> None:
    text = "The reader learns from the documents and the corpus."
    whole = model.tokenizer.encode_prompt(text)
    spans = list(rolling_spans(text, model.tokenizer, max_length=max_length))
    targets = [one for span in spans for one in span.token_ids[-span.num_targets :]]
    assert targets == whole[1:]
    assert all(len(span.token_ids) <= max_length + 1 for span in spans)
    # The last window is full, too.
    assert len(spans[-1].token_ids) == min(len(whole), max_length + 1)
    assert list(rolling_spans("", model.tokenizer, max_length=max_length)) == []
