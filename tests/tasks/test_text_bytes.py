"""Bytes of text are those that the targets of the samples spell."""

import math

import pytest

from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.tasks.causal_lm import bits_per_byte, bytes_per_target
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer


def test_a_target_has_the_bytes_of_its_text(dataset: DatasetDirectory) -> None:
    tokenizer = open_saved_tokenizer(dataset.tokenizer_directory)
    num_bytes = num_targets = 0
    for index in range(len(dataset.valid)):
        targets = dataset.valid[index][1:].tolist()
        num_bytes += len(tokenizer.decode(targets).encode())
        num_targets += len(targets)
    assert bytes_per_target(dataset.valid, tokenizer) == num_bytes / num_targets


def test_a_large_corpus_is_measured_on_samples_from_all_over_it(dataset: DatasetDirectory) -> None:
    tokenizer = open_saved_tokenizer(dataset.tokenizer_directory)
    part = bytes_per_target(dataset.train, tokenizer, max_tokens=3000)
    whole = bytes_per_target(dataset.train, tokenizer)
    assert part != whole
    assert part == pytest.approx(whole, rel=0.05)


def test_bits_are_counted_per_byte() -> None:
    """A model that leaves two of four choices open needs a bit a target."""
    assert bits_per_byte(math.log(2), 4.0) == pytest.approx(0.25)
