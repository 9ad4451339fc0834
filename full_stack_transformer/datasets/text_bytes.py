"""Bytes of text per target of a corpus, for metrics that compare models with different tokenizers."""

import math
from collections.abc import Iterable, Sequence

from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

# Decoded in 0.4 s. A larger corpus is measured on evenly spread samples.
_MAX_MEASURED_TOKENS = 2_000_000
_SAMPLES_AT_ONCE = 1024


def num_target_bytes(samples: Iterable[Sequence[int]], tokenizer: DocumentTokenizer) -> int:
    """UTF-8 bytes of the decoded targets of `samples`: all tokens but the first of each."""
    return sum(len(tokenizer.decode(sample[1:]).encode()) for sample in samples)


def bytes_per_target(
    corpus: Corpus, tokenizer: DocumentTokenizer, *, max_tokens: int = _MAX_MEASURED_TOKENS
) -> float:
    """Mean bytes of a target, over all samples, or over some of a corpus of more than `max_tokens`."""
    stride = max(1, math.ceil(len(corpus.tokens) / max_tokens))
    chosen = range(0, len(corpus), stride)
    num_bytes = num_targets = 0
    for first in range(0, len(chosen), _SAMPLES_AT_ONCE):
        samples = corpus.gather(chosen[first : first + _SAMPLES_AT_ONCE])
        num_bytes += num_target_bytes((sample.tolist() for sample in samples), tokenizer)
        num_targets += sum(len(sample) - 1 for sample in samples)
    return num_bytes / max(1, num_targets)


def bits_per_byte(loss: float, bytes_of_target: float) -> float:
    """Bits per byte of text, from the mean loss per target in nats."""
    return loss / math.log(2) / max(bytes_of_target, 1e-9)
