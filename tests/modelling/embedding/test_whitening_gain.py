"""What whitening is for: cosines of a masked model say more of which sentences belong together."""

from full_stack_transformer.document_sources.python_sources import library_docstrings
from full_stack_transformer.document_sources.task_rows import sentence_rows
from tests.benchmarks.whitening import measure, new_model, train

_NUM_STEPS = 40


def test_whitening_raises_the_correlation_of_a_masked_model() -> None:
    docstrings = library_docstrings()
    backbone, tokenizer, texts = new_model(docstrings)
    train(backbone, tokenizer, texts, num_steps=_NUM_STEPS)
    found = measure(backbone, tokenizer, list(sentence_rows(docstrings)), "mean")
    assert found[None] > found["plain"] + 0.05
    assert found[None] > 0.3
