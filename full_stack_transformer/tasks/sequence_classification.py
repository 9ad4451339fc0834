"""Which class a text, or a pair of texts, belongs to; several classes at once; or a number.

Rows: `text`, `text_pair` (optional), `label`: a name or number, a list of names, or a fraction.
Predictions: {"label": name, "scores": {name: probability}}, {"labels": [names], "scores": …} for several
classes at once, {"score": number} for regression.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from full_stack_transformer.arguments.training import SequenceClassificationOptions
from full_stack_transformer.errors import RowError
from full_stack_transformer.metrics.classification import (
    classification_metrics,
    multi_label_metrics,
)
from full_stack_transformer.metrics.regression import regression_metrics
from full_stack_transformer.modelling.model_card import TaskWords
from full_stack_transformer.rows.fields import (
    Row,
    as_number,
    counted,
    described_numbers,
    field,
    label_name,
    names_of,
    names_of_texts,
    only,
    place,
    texts_and_label,
)
from full_stack_transformer.tasks.bag_of_words import class_probabilities, similarities, words
from full_stack_transformer.tasks.routes import (
    MODEL_FIELD,
    Body,
    Form,
    Route,
    ShortText,
    Texts,
)
from full_stack_transformer.tasks.task import Feature, Metrics, Prediction, RowTask, TaskOptions
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL

ProblemType = Literal["single_label", "multi_label", "regression"]

# How a config of transformers calls them.
_PROBLEM_TYPES: dict[ProblemType, str] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_MIN_PROBABILITY = 0.5


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(SequenceClassificationOptions, TaskOptions):
    """What labels are."""


class ClassifyRequest(Body):
    """Body of `POST /classify`."""

    texts: Texts = Field(description="Each gets a class.")
    text_pairs: Texts | None = Field(
        default=None,
        description="The second text of each, for models that compare two.",
    )
    model: ShortText | None = MODEL_FIELD


def _rows(body: ClassifyRequest) -> list[dict[str, Any]]:
    pairs: Sequence[str | None] = body.text_pairs or [None] * len(body.texts)
    if len(pairs) != len(body.texts):
        raise ValueError("text_pairs: should be one for each text")
    return [
        {"text": text} if pair is None else {"text": text, "text_pair": pair}
        for text, pair in zip(body.texts, pairs, strict=True)
    ]


class SequenceClassification(RowTask):
    """See the module."""

    name = "sequence_classification"
    model_class = AutoModelForSequenceClassification
    heads = ("ForSequenceClassification",)
    options_class = ClassificationOptions
    card = TaskWords("text-classification", "classifies texts", fields="text, text_pair")
    routes = (
        Route(
            "/classify",
            "The class of each text, or of each pair, with the probability of every class.",
            body=ClassifyRequest,
            rows=_rows,
        ),
    )
    form = Form("/classify", "Classify", "One text a line …", show="scores")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        options: ClassificationOptions,
        *,
        labels: Sequence[str],
        problem_type: ProblemType,
    ) -> None:
        super().__init__(tokenizer, options)
        self.labels = list(labels)
        self.problem_type = problem_type
        self._id_of_label = {label: index for index, label in enumerate(labels)}

    @classmethod
    def named(cls, row: Row) -> Row:
        """Texts and labels of GLUE, IMDB, ATEC and others."""
        return texts_and_label(row)

    @classmethod
    def texts(cls, row: Row) -> Mapping[str, Any]:
        """One or two."""
        return only(row, names_of_texts(row))

    @classmethod
    def learn(
        cls,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerFast,
        options: ClassificationOptions,
    ) -> Self:
        """The kind of labels, and their names in order."""
        found = [_label_of(row) for row in rows]
        kind = _problem_type_of(found) if options.problem_type == "auto" else options.problem_type
        names: set[str] = set()
        for label in found:
            if kind == "multi_label":
                names.update(map(label_name, _as_list(label)))
            elif kind == "single_label":
                names.add(label_name(label))
        if kind == "multi_label" and not names:
            raise RowError(
                "rows to learn from should have labels; each row's list of them is empty"
            )
        values = {str(sorted(map(str, _as_list(label)))) for label in found}
        if len(values) < 2 or (kind == "single_label" and len(names) < 2):
            raise RowError(
                f"rows to learn from should have two labels at least; found only {label_name(found[0])!r} in "
                f"{len(rows):,} rows; name the right column with --label_column, or add rows with others"
            )
        return cls(
            tokenizer,
            options,
            labels=["score"] if kind == "regression" else sorted(names, key=_in_order),
            problem_type=kind,
        )

    @classmethod
    def open(
        cls,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerFast,
        options: ClassificationOptions,
    ) -> Self:
        """Labels and their kind out of the config; one label without a kind is a number."""
        kinds = {value: key for key, value in _PROBLEM_TYPES.items()}
        kind = kinds.get(config.problem_type or "")
        if kind is None:
            kind = "regression" if config.num_labels == 1 else "single_label"
        labels = [config.id2label[index] for index in range(config.num_labels)]
        return cls(tokenizer, options, labels=labels, problem_type=kind)

    def config_fields(self) -> dict[str, Any]:
        """Labels and their kind."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": self._id_of_label,
            "problem_type": _PROBLEM_TYPES[self.problem_type],
        }

    def label_counts(self, rows: Sequence[Row]) -> Counter[str]:
        """Of several classes at once each."""
        if self.problem_type == "regression":
            return Counter()
        labels = [row["label"] for row in rows if row.get("label") is not None]
        return Counter(label_name(name) for label in labels for name in _as_list(label))

    def unknown_labels(self, rows: Sequence[Row]) -> Counter[str]:
        """Those without an output of the model."""
        counts = self.label_counts(rows)
        return Counter({name: n for name, n in counts.items() if name not in self._id_of_label})

    def describe_labels(self, rows: Sequence[Row]) -> str:
        """Of numbers their range."""
        if self.problem_type == "regression":
            return described_numbers([_number(row) for row in rows])
        kind = "classes" if self.problem_type == "single_label" else "labels, several in a row"
        return f"{kind}: {counted(self.label_counts(rows))}"

    def num_targets(self, feature: Feature) -> int:
        """None where the class was not learned."""
        is_unknown = feature.get("labels") == IGNORED_LABEL and self.problem_type == "single_label"
        return int(not is_unknown)

    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """One for each row."""
        features = []
        for index, row in enumerate(rows):
            text = field(row, "text", str, self.name)
            pair = row.get("text_pair")
            if pair is not None:
                pair = field(row, "text_pair", str, self.name)
            feature = self.encode_pair(text, pair)
            if row.get("label") is not None:
                feature["labels"] = self._target(row)
            features.append({**feature, "row": index})
        return features

    def collate(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """`labels` are (B,) ids, (B, L) of 0 and 1, or (B,) numbers."""
        bare = [{k: v for k, v in feature.items() if k != "labels"} for feature in features]
        batch = super().collate(bare)
        if all("labels" in feature for feature in features):
            kind = torch.int64 if self.problem_type == "single_label" else torch.float32
            batch["labels"] = torch.tensor([f["labels"] for f in features], dtype=kind)
        return batch

    def loss_sum(self, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy; for several classes at once the mean over them; for a number its squared error."""
        labels = batch["labels"]
        if self.problem_type == "single_label":
            return cross_entropy(scores.float(), labels, reduction="sum")
        if self.problem_type == "regression":
            return mse_loss(scores.float().squeeze(-1), labels, reduction="sum")
        losses = binary_cross_entropy_with_logits(scores.float(), labels, reduction="none")
        return losses.mean(dim=1).sum()

    def predictions(
        self, rows: Sequence[Row], features: Sequence[Feature], scores: Sequence[Tensor]
    ) -> list[Prediction]:
        """One for each text."""
        return [self._prediction(logits) for logits in scores]

    def metrics(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Metrics:
        """Accuracy, F1 and Matthews; for several classes F1; for numbers the correlations.

        Classes that were not learned are further ones, which are never predicted.
        """
        if self.problem_type == "regression":
            expected = [_number(row) for row in rows]
            return Metrics(regression_metrics(expected, [one["score"] for one in predictions]))
        labels = [*self.labels, *sorted(self.unknown_labels(rows))]
        if self.problem_type == "multi_label":
            found = multi_label_metrics(
                [_indicators(row["label"], labels) for row in rows],
                [_indicators(one["labels"], labels) for one in predictions],
                labels,
            )
            return Metrics.of_classes(found, labels)
        id_of = {label: number for number, label in enumerate(labels)}
        found = classification_metrics(
            [id_of[label_name(row["label"])] for row in rows],
            [id_of[one["label"]] for one in predictions],
            labels,
        )
        if len(self.labels) == 2:
            found = dataclasses.replace(found, f1_binary=found.per_class[1].f1)
        return Metrics.of_classes(found, labels)

    def is_right(self, row: Row, prediction: Prediction) -> float:
        """Of a number how near it is, below 0."""
        if self.problem_type == "regression":
            return -abs(_number(row) - float(prediction["score"]))
        if self.problem_type == "multi_label":
            expected = {*map(label_name, _as_list(row["label"]))}
            return float(expected == {*prediction["labels"]})
        name = label_name(row["label"])
        return float(prediction["label"] == name) + float(prediction["scores"].get(name, 0)) - 1.0

    def baselines(
        self, train_rows: Sequence[Row], rows: Sequence[Row]
    ) -> dict[str, list[Prediction]]:
        """The most frequent answer; a logistic regression on words, or for a number their overlap."""
        if self.problem_type == "regression":
            return {"words": [{"score": score} for score in similarities(train_rows, rows)]}
        if self.problem_type == "multi_label":
            sets = Counter(tuple(sorted(map(label_name, row["label"]))) for row in train_rows)
            labels = list(sets.most_common(1)[0][0])
            majority = {"labels": labels, "scores": dict.fromkeys(labels, 1.0)}
            return {"majority": [majority] * len(rows)}
        counts = Counter(label_name(row["label"]) for row in train_rows)
        shares = {name: counts[name] / len(train_rows) for name in self.labels}
        majority = {"label": counts.most_common(1)[0][0], "scores": shares}
        return {
            "majority": [majority] * len(rows),
            "words": self._classified_by_words(train_rows, rows),
        }

    def _classified_by_words(
        self, train_rows: Sequence[Row], rows: Sequence[Row]
    ) -> list[Prediction]:
        probabilities = class_probabilities(
            [_marked_words(row) for row in train_rows],
            [self.labels.index(label_name(row["label"])) for row in train_rows],
            [_marked_words(row) for row in rows],
            num_classes=len(self.labels),
        )
        return [
            {
                "label": self.labels[int(row.argmax())],
                "scores": dict(zip(self.labels, row.tolist(), strict=True)),
            }
            for row in probabilities
        ]

    def _prediction(self, logits: Tensor) -> Prediction:
        if self.problem_type == "regression":
            return {"score": float(logits[0])}
        if self.problem_type == "multi_label":
            scores = dict(zip(self.labels, logits.sigmoid().tolist(), strict=True))
            return {
                "labels": [name for name, p in scores.items() if p >= _MIN_PROBABILITY],
                "scores": scores,
            }
        scores = dict(zip(self.labels, logits.softmax(-1).tolist(), strict=True))
        return {"label": self.labels[int(logits.argmax())], "scores": scores}

    def _target(self, row: Row) -> Any:
        label = row["label"]
        if self.problem_type == "regression":
            return _number(row)
        if self.problem_type == "single_label":
            return self._id_of_label.get(label_name(label), IGNORED_LABEL)
        return _indicators(label, self.labels)


def _indicators(label: Any, labels: Sequence[str]) -> list[float]:
    """(L,) 1 for each label that is there."""
    names = {label_name(name) for name in _as_list(label)}
    return [float(name in names) for name in labels]


def _as_list(label: Any) -> list[Any]:
    return label if isinstance(label, list) else [label]


def _marked_words(row: Row) -> list[str]:
    """Words; of a pair also which text each is from, and which are in both."""
    first = words(row["text"])
    if row.get("text_pair") is None:
        return first
    second = words(row["text_pair"])
    both = set(first) & set(second)
    marked = [f"1:{word}" for word in first] + [f"2:{word}" for word in second]
    return marked + [f"both:{word}" for word in sorted(both)] + ["both"] * len(both)


def _label_of(row: Row) -> Any:
    label = row.get("label")
    if label is None:
        raise RowError(
            f"{place(row)}a row to learn from should have a 'label'; found the fields {names_of(row)}; name "
            "the right one with --label_column, or leave out rows without a label with --on_bad_row skip"
        )
    return label


def _problem_type_of(labels: Sequence[Any]) -> ProblemType:
    if any(isinstance(label, list) for label in labels):
        return "multi_label"
    numbers = [as_number(label) for label in labels]
    are_numbers = all(number is not None for number in numbers)
    if are_numbers and any(not number.is_integer() for number in numbers if number is not None):
        return "regression"
    return "single_label"


def _number(row: Row) -> float:
    number = as_number(row["label"])
    if number is None:
        raise RowError(f"{place(row)}the label should be a number, found {row['label']!r}")
    return number


def _in_order(name: str) -> tuple[float, str]:
    """Numbers by their size, before names."""
    number = as_number(name)
    return (float("inf") if number is None else number, name)
