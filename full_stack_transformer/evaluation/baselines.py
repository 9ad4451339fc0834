"""What can be had without a model: the commonest answer, and counting words.

A figure says little without them: a classifier of ten classes of which one has half of the rows is right half
of the time without reading. Each baseline predicts in the form of its task, and is measured by the same
metrics. Knows nothing of models.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.evaluation.bag_of_words import class_probabilities, cosines, words
from full_stack_transformer.tasks.sequence_classification import (
    SequenceClassification,
    label_name,
)
from full_stack_transformer.tasks.task import Prediction, Row, Task

_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")


def baseline_predictions(
    task: Task, train_rows: Sequence[Row], rows: Sequence[Row]
) -> dict[str, list[Prediction]]:
    """Predictions by the name of the baseline.

    Args:
        task: says what kind of answer there is.
        train_rows: what the baselines learn from.
        rows: what they predict.

    Raises:
        RowError: a row to learn from has no label, or one that the model never saw.
    """
    task.labelled_features(train_rows)
    makers = _MAKERS.get(task.name, {})
    found = {name: make(task, train_rows, rows) for name, make in makers.items()}
    return {name: predictions for name, predictions in found.items() if predictions}


def _majority_class(task: Task, train_rows: Sequence[Row], rows: Sequence[Row]) -> list[Prediction]:
    assert isinstance(task, SequenceClassification)
    if task.problem_type == "regression":
        return []
    if task.problem_type == "multi_label":
        sets = Counter(tuple(sorted(map(label_name, row["label"]))) for row in train_rows)
        labels = list(sets.most_common(1)[0][0])
        return [{"labels": labels, "scores": dict.fromkeys(labels, 1.0)} for _ in rows]
    counts = Counter(label_name(row["label"]) for row in train_rows)
    scores = {name: counts[name] / len(train_rows) for name in task.labels}
    return [{"label": counts.most_common(1)[0][0], "scores": scores} for _ in rows]


def _words_of_class(task: Task, train_rows: Sequence[Row], rows: Sequence[Row]) -> list[Prediction]:
    assert isinstance(task, SequenceClassification)
    if task.problem_type == "multi_label":
        return []
    if task.problem_type == "regression":
        return [{"score": score} for score in _similarities(train_rows, rows)]
    probabilities = class_probabilities(
        [_marked_words(row) for row in train_rows],
        [task.labels.index(label_name(row["label"])) for row in train_rows],
        [_marked_words(row) for row in rows],
        num_classes=len(task.labels),
    )
    return [
        {
            "label": task.labels[int(row.argmax())],
            "scores": dict(zip(task.labels, row.tolist(), strict=True)),
        }
        for row in probabilities
    ]


def _marked_words(row: Row) -> list[str]:
    """Words; of a pair also which text each is from, and which are in both."""
    first = words(row["text"])
    if row.get("text_pair") is None:
        return first
    second = words(row["text_pair"])
    both = set(first) & set(second)
    marked = [f"1:{word}" for word in first] + [f"2:{word}" for word in second]
    return marked + [f"both:{word}" for word in sorted(both)] + ["both"] * len(both)


def _similarity(task: Task, train_rows: Sequence[Row], rows: Sequence[Row]) -> list[Prediction]:
    return [{"score": score} for score in _similarities(train_rows, rows)]


def _similarities(train_rows: Sequence[Row], rows: Sequence[Row]) -> list[float]:
    """Cosine of the TF-IDF vectors of both texts; 0 for one alone."""
    known = [
        words(row[name]) for row in train_rows for name in ("text", "text_pair") if name in row
    ]
    firsts = [words(row["text"]) for row in rows]
    seconds = [words(row.get("text_pair") or "") for row in rows]
    return [float(cosine) for cosine in cosines(known, firsts, seconds)]


def _majority_label(task: Task, train_rows: Sequence[Row], rows: Sequence[Row]) -> list[Prediction]:
    counts = Counter(label for row in train_rows for label in row["labels"])
    label = counts.most_common(1)[0][0]
    return [[{"word": word, "label": label} for word in row["words"]] for row in rows]


def _label_of_word(task: Task, train_rows: Sequence[Row], rows: Sequence[Row]) -> list[Prediction]:
    """The commonest label of each word; of an unknown one the commonest of all."""
    by_word: dict[str, Counter[str]] = {}
    overall: Counter[str] = Counter()
    for row in train_rows:
        for word, label in zip(row["words"], row["labels"], strict=True):
            by_word.setdefault(word, Counter())[label] += 1
            overall[label] += 1
    default = overall.most_common(1)[0][0]
    best = {word: counts.most_common(1)[0][0] for word, counts in by_word.items()}
    return [
        [{"word": word, "label": best.get(word, default)} for word in row["words"]] for row in rows
    ]


def _majority_choice(
    task: Task, train_rows: Sequence[Row], rows: Sequence[Row]
) -> list[Prediction]:
    place = Counter(int(row["label"]) for row in train_rows).most_common(1)[0][0]
    return [
        _choice(np.eye(len(row["choices"]))[min(place, len(row["choices"]) - 1)]) for row in rows
    ]


def _choice_by_words(
    task: Task, train_rows: Sequence[Row], rows: Sequence[Row]
) -> list[Prediction]:
    """The choice whose words are most like the text's."""
    known = [words(row["text"]) + words(choice) for row in train_rows for choice in row["choices"]]
    texts = [words(row["text"]) for row in rows for _ in row["choices"]]
    choices = [words(choice) for row in rows for choice in row["choices"]]
    ends = np.cumsum([len(row["choices"]) for row in rows])[:-1]
    return [_choice(scores) for scores in np.split(cosines(known, texts, choices), ends)]


def _choice(scores: NDArray[np.float64]) -> Prediction:
    return {"choice": int(scores.argmax()), "scores": scores.tolist()}


def _answer_by_words(
    task: Task, train_rows: Sequence[Row], rows: Sequence[Row]
) -> list[Prediction]:
    """The sentence of the text that has most words in common with the question."""
    found = []
    for row in rows:
        wanted = set(words(row["question"]))
        best = max(
            _SENTENCE.finditer(row["context"]),
            key=lambda match: len(wanted & set(words(match.group()))),
            default=None,
        )
        text, start = ("", 0) if best is None else (best.group().strip(), best.start())
        found.append({"answer": text, "start": start, "end": start + len(text), "score": 1.0})
    return found


def _first_answer(task: Task, train_rows: Sequence[Row], rows: Sequence[Row]) -> list[Prediction]:
    """The first sentence of the text."""
    return [
        {"answer": text, "start": 0, "end": len(text), "score": 1.0}
        for text in ((_SENTENCE.match(row["context"]) or [""])[0].strip() for row in rows)
    ]


_Maker = Callable[[Task, Sequence[Row], Sequence[Row]], list[Any]]
_MAKERS: dict[str, dict[str, _Maker]] = {
    "sequence_classification": {"majority": _majority_class, "words": _words_of_class},
    "sentence_embedding": {"words": _similarity},
    "token_labelling": {"majority": _majority_label, "words": _label_of_word},
    "multiple_choice": {"majority": _majority_choice, "words": _choice_by_words},
    "span_selection": {"majority": _first_answer, "words": _answer_by_words},
}
