"""Continuations of validation texts by a causal language model, compared with the true ones.

    validation sample ──> prompt | expected tokens
                            └──model──> as many tokens ──> BLEU, chrF, ROUGE, distinct-n, repetition

Overlap with the one true continuation is low for any model of free text; the metrics compare models on the
same texts, and show whether a model repeats itself. The expected texts are measured too.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.arguments.sampling import SamplingParameters, as_keywords
from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.evaluation.bootstrap import Interval, bootstrap_intervals
from full_stack_transformer.evaluation.interleaving import interleaved
from full_stack_transformer.generation.open_engine import open_engine
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.metrics.texts import (
    Overlap,
    distinct,
    repetition,
    repetition_of_texts,
    words,
)
from full_stack_transformer.modelling.model_directory import OpenedModel

_TEXTS_AT_ONCE = 8
# A shorter prompt gives too little context.
_MIN_TOKENS = 16
# Four consecutive words: the order that shows repetition best.
_REPETITION_ORDER = 4


@dataclass(frozen=True)
class ContinuedTexts:
    """Metrics of generated continuations."""

    num_texts: int
    max_new_tokens: int
    temperature: float
    figures: dict[str, float]
    """By name; `expected_…` are those of the true continuations."""
    intervals: dict[str, Interval]
    """95 % bootstrap intervals. distinct-n has none, as a text that is drawn twice is never distinct."""

    def as_json(self) -> dict[str, object]:
        """What `fst evaluate` prints."""
        return asdict(self)


def evaluate_generation(
    model: OpenedModel,
    corpus: Corpus,
    *,
    num_texts: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    num_resamples: int = 1000,
) -> ContinuedTexts:
    """Continue the first half of samples and compare with the second.

    Args:
        model: what generates.
        corpus: samples of its tokens; those shorter than 16 are passed over.
        num_texts: samples at most, spread evenly over the corpus.
        max_new_tokens: of a continuation, at most.
        temperature: 0 for the likeliest tokens.
        seed: of the sampling, and of the bootstrap.
        num_resamples: of the bootstrap.

    Raises:
        DatasetError: no sample is long enough.
    """
    prompts, expected = _halves(model, corpus, num_texts, max_new_tokens)
    sampling = SamplingParameters(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    engine = open_engine(model.backbone, num_slots=_TEXTS_AT_ONCE, weights_dtype="float32")
    generator = TextGenerator(model, engine=engine)
    texts = continue_texts(generator, prompts, sampling)
    metrics, intervals = _measure(texts, expected, seed=seed, num_resamples=num_resamples)
    return ContinuedTexts(len(texts), max_new_tokens, temperature, metrics, intervals)


def continue_texts(
    generator: TextGenerator, prompts: Sequence[Sequence[int]], sampling: SamplingParameters
) -> list[str]:
    """The continuation of each prompt, several at once; each one as it would be alone."""
    texts = [""] * len(prompts)
    keywords = as_keywords(sampling)
    starts = [partial(generator.stream, prompt, clips=True, **keywords) for prompt in prompts]
    for index, piece in interleaved(starts, at_once=_TEXTS_AT_ONCE):
        texts[index] += piece
    return [generator.model.tokenizer.after_decoding(text) for text in texts]


def _halves(
    model: OpenedModel, corpus: Corpus, num_texts: int, max_new_tokens: int
) -> tuple[list[list[int]], list[str]]:
    """Prompts as token ids, and how they go on as text."""
    lengths = corpus.lengths()
    long_enough = np.flatnonzero(lengths >= _MIN_TOKENS)
    if not len(long_enough):
        raise DatasetError(
            f"--generation needs samples of {_MIN_TOKENS} tokens and more, half of which are the prompt; the "
            f"longest one has {int(lengths.max(initial=0))}"
        )
    places = np.linspace(0, len(long_enough) - 1, min(num_texts, len(long_enough))).astype(int)
    prompts, expected = [], []
    for index in long_enough[places]:
        ids: list[int] = corpus[int(index)].tolist()
        half = len(ids) // 2
        prompts.append(ids[:half])
        text = model.tokenizer.decode(ids[half : half + max_new_tokens])
        expected.append(model.tokenizer.after_decoding(text))
    return prompts, expected


def _measure(
    texts: list[str], expected: list[str], *, seed: int, num_resamples: int
) -> tuple[dict[str, float], dict[str, Interval]]:
    overlap = Overlap(texts, [[text] for text in expected])
    our_words, their_words = [words(text) for text in texts], [words(text) for text in expected]
    repeats = np.array(repetition_of_texts(our_words, _REPETITION_ORDER) or [0.0])

    def repeated(indices: NDArray[np.int64] | slice) -> dict[str, float]:
        return {"repetition_4": float(repeats[indices].mean())}

    metrics = {
        **overlap.metrics(),
        **repeated(slice(None)),
        "expected_repetition_4": repetition(their_words, _REPETITION_ORDER),
    }
    for order in (1, 2):
        metrics[f"distinct_{order}"] = distinct(our_words, order)
        metrics[f"expected_distinct_{order}"] = distinct(their_words, order)
    intervals = {
        **bootstrap_intervals(overlap.metrics, len(texts), num_resamples=num_resamples, seed=seed),
        **bootstrap_intervals(repeated, len(repeats), num_resamples=num_resamples, seed=seed),
    }
    return metrics, intervals
