"""Each metric against the library that defines it, on random cases."""

import random
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import sacrebleu
import scipy.stats
import seqeval.metrics
from rouge_score.rouge_scorer import RougeScorer
from sklearn import metrics as sklearn_metrics

from full_stack_transformer.metrics.classification import (
    classification_metrics,
    label_metrics,
    multi_label_metrics,
)
from full_stack_transformer.metrics.regression import pearson, regression_metrics, spearman
from full_stack_transformer.metrics.texts import Overlap, span_metrics

NUM_CASES = 300
_WORDS = ("the", "cat", "sat", "on", "a", "mat", "today,", "again.", "3.5", "well-known", "It's")


def _close(ours: float | None, theirs: float) -> bool:
    return ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def test_decisions_equal_scikit_learns() -> None:
    for seed in range(NUM_CASES):
        generator = np.random.default_rng(seed)
        num_classes = int(generator.integers(2, 7))
        expected = generator.integers(num_classes, size=int(generator.integers(5, 200)))
        is_kept = generator.random(len(expected)) < generator.random()
        predicted = np.where(is_kept, expected, generator.integers(num_classes, size=len(expected)))
        ours = classification_metrics(expected, predicted, [str(one) for one in range(num_classes)])
        assert _close(ours.accuracy, sklearn_metrics.accuracy_score(expected, predicted))
        assert _close(ours.matthews, sklearn_metrics.matthews_corrcoef(expected, predicted))
        assert np.array_equal(
            ours.confusion,
            sklearn_metrics.confusion_matrix(expected, predicted, labels=range(num_classes)),
        )
        for value, average in (
            (ours.f1_macro, "macro"),
            (ours.f1_weighted, "weighted"),
            (ours.f1_micro, "micro"),
            (ours.f1_binary if num_classes == 2 else None, "binary"),
        ):
            if value is not None:
                theirs = sklearn_metrics.f1_score(
                    expected, predicted, average=average, zero_division=0
                )
                assert _close(value, theirs)


def test_decisions_of_several_labels_equal_scikit_learns() -> None:
    for seed in range(100):
        generator = np.random.default_rng(seed)
        expected, predicted = generator.random((2, 40, 4)) < generator.random(4)
        ours = multi_label_metrics(expected.astype(int), predicted.astype(int), list("abcd"))
        assert _close(ours.accuracy, sklearn_metrics.accuracy_score(expected, predicted))
        for value, average in ((ours.f1_micro, "micro"), (ours.f1_weighted, "weighted")):
            theirs = sklearn_metrics.f1_score(expected, predicted, average=average, zero_division=0)
            assert _close(value, theirs)


def test_correlations_equal_scipys() -> None:
    for seed in range(NUM_CASES):
        generator = np.random.default_rng(seed)
        first = generator.normal(size=50).round(int(generator.integers(0, 4)))  # with equal numbers
        second = first * generator.normal() + generator.normal(size=50)
        assert _close(pearson(first, second), scipy.stats.pearsonr(first, second).statistic)
        assert _close(spearman(first, second), scipy.stats.spearmanr(first, second).statistic)
        errors = regression_metrics(first, second)
        assert sklearn_metrics.mean_squared_error(first, second) in map(
            pytest.approx, errors.values()
        )
        assert sklearn_metrics.mean_absolute_error(first, second) in map(
            pytest.approx, errors.values()
        )


def _labels(draw: random.Random) -> list[str]:
    return draw.choices(("O", "B-A", "I-A", "B-B", "I-B"), k=draw.randint(1, 30))


def test_spans_of_labels_equal_seqevals() -> None:
    for seed in range(NUM_CASES):
        draw = random.Random(seed)
        expected = [_labels(draw) for _ in range(8)]
        predicted = [
            [
                label if draw.random() < 0.7 else other
                for label, other in zip(one, others, strict=True)
            ]
            for one in expected
            for others in [draw.choices(("O", "B-A", "I-A", "B-B", "I-B"), k=len(one))]
        ]
        ours = label_metrics(expected, predicted).scalars()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metrics that are not defined
            assert _close(ours["span_f1"], seqeval.metrics.f1_score(expected, predicted))
            assert _close(
                ours["span_precision"], seqeval.metrics.precision_score(expected, predicted)
            )
            assert _close(ours["span_recall"], seqeval.metrics.recall_score(expected, predicted))


def _text(draw: random.Random) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randint(1, 25)))


def _texts(seed: int) -> tuple[list[str], list[list[str]]]:
    draw = random.Random(seed)
    expected = [[_text(draw) for _ in range(2)] for _ in range(5)]
    predicted = [
        " ".join(word if draw.random() < 0.7 else draw.choice(_WORDS) for word in one.split())
        for one, _ in expected
    ]
    return predicted, expected


def test_overlap_of_texts_equals_sacrebleus_and_rouge_scores() -> None:
    for seed in range(NUM_CASES):
        predicted, expected = _texts(seed)
        columns: Sequence[Sequence[str]] = list(zip(*expected, strict=True))
        ours = Overlap(predicted, expected).metrics()
        assert _close(ours["bleu"], sacrebleu.corpus_bleu(predicted, columns).score)
        assert _close(ours["chrf"], sacrebleu.corpus_chrf(predicted, columns).score)
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
        for name in scorer.rouge_types:
            theirs = [
                scorer.score_multi(several, text)[name].fmeasure
                for text, several in zip(predicted, expected, strict=True)
            ]
            assert _close(ours[name], sum(theirs) / len(theirs)), name


def test_answers_are_judged_by_the_rules_of_squad() -> None:
    # Worked out with the evaluation script of SQuAD 2.0: articles, punctuation and case do not count.
    expected = [["The cat."], ["a mat", "the mat today"], [], ["one two"]]
    metrics = span_metrics(expected, ["cat", "the mat", "", ""])
    assert metrics.exact_match == 3 / 4
    assert metrics.f1 == 3 / 4
