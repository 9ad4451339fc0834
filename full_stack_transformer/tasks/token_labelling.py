"""A label for each word of a text, such as names of persons and places.

Rows: `words` and `labels`, one for each; or, to predict, `text`, which is cut into words and marks.
Predictions: [{"word": str, "label": name, "start": character, "end": character}] of the text, or of the words
with a space between them.

A word is represented by its first token. Texts longer than the model are read in overlapping windows, and a
word is labelled by the window that shows most around it.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from full_stack_transformer.errors import RowError
from full_stack_transformer.metrics.classification import OUTSIDE, label_metrics
from full_stack_transformer.modelling.model_card import TaskWords
from full_stack_transformer.rows.fields import (
    WORD_LABELS,
    WORDS,
    Columns,
    Row,
    field,
    missing_field,
    only,
    place,
    texts_of,
    with_origin,
)
from full_stack_transformer.tasks.routes import Form, Route
from full_stack_transformer.tasks.task import (
    Feature,
    Metrics,
    Prediction,
    RowTask,
    WindowTaskOptions,
)
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL

_WORD = re.compile(r"\w+|[^\w\s]")


class TokenLabelling(RowTask):
    """See the module."""

    name = "token_labelling"
    model_class = AutoModelForTokenClassification
    heads = ("ForTokenClassification",)
    options_class = WindowTaskOptions
    measured_by = "any words"
    columns = Columns(("words",), "labels")
    reads_words = True
    card = TaskWords("token-classification", "labels words", fields="text or words")
    routes = (Route("/label", "A label for each word of each text."),)
    form = Form("/label", "Label", "One text a line …", show="labels")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        options: WindowTaskOptions,
        *,
        labels: Sequence[str],
    ) -> None:
        super().__init__(tokenizer, options)
        self.labels = list(labels)
        self._id_of_label = {label: index for index, label in enumerate(labels)}

    @classmethod
    def named(cls, row: Row) -> Row:
        """Words and labels of CoNLL-2003 as the hub has it, and others."""
        words = next((row[name] for name in WORDS if name in row), None)
        if words is None:
            raise missing_field(row, WORDS, "words", "--text_column")
        labels = next((row[name] for name in WORD_LABELS if name in row), None)
        found: dict[str, Any] = {"words": _list(words)}
        if labels is not None:
            if None in _list(labels):
                raise TypeError("a label is null")
            found["labels"] = [str(label) for label in labels]
        return with_origin(found, row)

    @classmethod
    def texts(cls, row: Row) -> Mapping[str, Any]:
        """The words."""
        return only(row, [name for name in WORDS if name in row][:1])

    @classmethod
    def learn(
        cls, rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, options: WindowTaskOptions
    ) -> Self:
        """The labels' names; `O`, which marks nothing, comes first."""
        names = {label for row in rows for label in field(row, "labels", list, cls.name)}
        if not names:
            raise RowError(
                "rows to learn from should have labels; each row's list of them is empty"
            )
        if len(names) < 2:
            raise RowError(
                f"rows to learn from should have two labels at least; found only {min(names)!r} in "
                f"{len(rows):,} rows; name the right column with --label_column, or add rows with others"
            )
        labels = sorted(map(str, names), key=lambda name: (name != OUTSIDE, name))
        return cls(tokenizer, options, labels=labels)

    @classmethod
    def open(
        cls,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerFast,
        options: WindowTaskOptions,
    ) -> Self:
        """Labels out of the config."""
        labels = [config.id2label[index] for index in range(config.num_labels)]
        return cls(tokenizer, options, labels=labels)

    def config_fields(self) -> dict[str, Any]:
        """The labels."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": self._id_of_label,
        }

    def saved_options(self) -> dict[str, Any]:
        """How windows overlap."""
        return {"doc_stride": self.options.doc_stride}

    def label_counts(self, rows: Sequence[Row]) -> Counter[str]:
        """Of words."""
        return Counter(str(label) for row in rows for label in row.get("labels") or ())

    def unknown_labels(self, rows: Sequence[Row]) -> Counter[str]:
        """Those without an output of the model."""
        counts = self.label_counts(rows)
        return Counter({name: n for name, n in counts.items() if name not in self._id_of_label})

    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """One for each window, with `word_tokens`: the token of each word that begins in it."""
        features: list[Feature] = []
        room = self.options.max_length - self.tokenizer.num_special_tokens_to_add()
        for index, row in enumerate(rows):
            text, spans = _text_and_words(row)
            labels = self._label_ids(row, len(spans)) if row.get("labels") is not None else None
            encoding = self.tokenizer(
                text,
                truncation=True,
                max_length=self.options.max_length,
                stride=min(self.options.stride, room - 1),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            for window, offsets in enumerate(encoding["offset_mapping"]):
                feature: Feature = {name: encoding[name][window] for name in self.input_names}
                feature["word_tokens"] = _tokens_of_words(text, spans, offsets)
                if labels is not None:
                    targets = [IGNORED_LABEL] * len(offsets)
                    for word, token in reversed(feature["word_tokens"].items()):
                        targets[token] = labels[word]
                    feature["labels"] = targets
                features.append({**feature, "row": index})
        return features

    def num_targets(self, feature: Feature) -> int:
        """The words that begin in the window, and whose label was learned."""
        return sum(label != IGNORED_LABEL for label in feature.get("labels", ()))

    def loss_sum(self, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy of the words' labels."""
        return cross_entropy(
            scores.flatten(0, 1).float(),
            batch["labels"].flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )

    def predictions(
        self, rows: Sequence[Row], features: Sequence[Feature], scores: Sequence[Tensor]
    ) -> list[Prediction]:
        """A list for each row, with an object for each word."""
        best: list[dict[int, tuple[int, int]]] = [{} for _ in rows]
        for feature, logits in zip(features, scores, strict=True):
            found = logits.argmax(-1).tolist()
            for word, token in feature["word_tokens"].items():
                around = min(token, len(feature["input_ids"]) - 1 - token)
                best_of_row = best[feature["row"]]
                if word not in best_of_row or around > best_of_row[word][0]:
                    best_of_row[word] = (around, found[token])
        return [self._prediction(row, words) for row, words in zip(rows, best, strict=True)]

    def metrics(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Metrics:
        """F1 of spans where the labels mark spans, and accuracy of words; none where there are no words."""
        if not any(predictions):
            return Metrics({})
        found = label_metrics(
            [list(map(str, row["labels"])) for row in rows],
            [[word["label"] for word in one] for one in predictions],
        )
        labels = tuple(row.label for row in found.tokens.per_class)
        return Metrics(
            found.scalars(),
            found.per_type or found.tokens.per_class,
            labels,
            found.tokens.confusion,
        )

    def is_right(self, row: Row, prediction: Prediction) -> float:
        """1 where all labels are right, else half of the part that is."""
        pairs = list(zip(row["labels"], prediction, strict=True))
        share = sum(str(label) == word["label"] for label, word in pairs) / max(1, len(pairs))
        return 1.0 if share == 1.0 else share * 0.499

    def baselines(
        self, train_rows: Sequence[Row], rows: Sequence[Row]
    ) -> dict[str, list[Prediction]]:
        """The most frequent label of all, and the one of each word; of an unknown word that of all."""
        overall = Counter(label for row in train_rows for label in row["labels"])
        by_word: dict[str, Counter[str]] = {}
        for row in train_rows:
            for word, label in zip(row["words"], row["labels"], strict=True):
                by_word.setdefault(word, Counter())[label] += 1
        majority = overall.most_common(1)[0][0]
        best = {word: counts.most_common(1)[0][0] for word, counts in by_word.items()}
        return {
            "majority": [[{"word": w, "label": majority} for w in row["words"]] for row in rows],
            "words": [
                [{"word": w, "label": best.get(w, majority)} for w in row["words"]] for row in rows
            ],
        }

    def _prediction(self, row: Row, words: dict[int, tuple[int, int]]) -> Prediction:
        text, spans = _text_and_words(row)
        return [
            {
                "word": text[start:end],
                "label": self.labels[words[index][1] if index in words else 0],
                "start": start,
                "end": end,
            }
            for index, (start, end) in enumerate(spans)
        ]

    def _label_ids(self, row: Row, num_words: int) -> list[int]:
        names = list(map(str, field(row, "labels", list, self.name)))
        if len(names) != num_words:
            raise RowError(
                f"{place(row)}a row should have a label for each word; found {len(names)} labels and "
                f"{num_words} words"
            )
        return [self._id_of_label.get(name, IGNORED_LABEL) for name in names]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{value!r} should be a list")
    return list(value)


def _text_and_words(row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The text of a row, and where each word stands in it."""
    if "words" not in row:
        text = field(row, "text", str, TokenLabelling.name)
        return text, _spans_of_words(text)
    words = texts_of(row, "words", TokenLabelling.name)
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), spans


def _spans_of_words(text: str) -> list[tuple[int, int]]:
    """Where words and marks stand; an accent or vowel sign that is a character of its own parts no word."""
    spans: list[tuple[int, int]] = []
    for match in _WORD.finditer(text):
        start, end = match.span()
        goes_on = _combines(text[start]) or (_combines(text[start - 1]) and text[start].isalnum())
        if spans and spans[-1][1] == start and goes_on:
            start = spans.pop()[0]
        spans.append((start, end))
    return spans


def _combines(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _tokens_of_words(
    text: str, spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]
) -> dict[int, int]:
    """The first token that has a part of each word; words outside the window are left out."""
    found: dict[int, int] = {}
    word = 0
    for token, (token_start, end) in enumerate(offsets):
        start = token_start
        # A token of byte-level BPE begins with the space before its word.
        while start < end and text[start].isspace():
            start += 1
        if start >= end:  # a mark around the text, or a space
            continue
        while word < len(spans) and spans[word][1] <= start:
            word += 1
        reached = word
        while reached < len(spans) and spans[reached][0] < end:
            # The first window token of a word that began in the window before is not its beginning.
            if reached not in found and spans[reached][0] >= token_start:
                found[reached] = token
            reached += 1
    return found
