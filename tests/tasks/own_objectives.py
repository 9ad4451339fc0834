"""Two objectives that the package does not know: one over a corpus, one over labelled rows."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.modelling.model_card import TaskWords
from full_stack_transformer.rows.fields import Row, field
from full_stack_transformer.tasks.routes import (
    MODEL_FIELD,
    Body,
    Form,
    FormField,
    Route,
    ShortText,
    Texts,
)
from full_stack_transformer.tasks.task import CorpusTask, Feature, Metrics, Prediction, RowTask
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL


class TokenAfterNext(CorpusTask, RowTask):
    """Predict the token after the next one.

    Rows: `text`. Predictions: {"token": the token after the one that follows the text}.
    """

    name = "token_after_next"
    model_class = AutoModelForCausalLM
    card = TaskWords("text-generation", "predicts the token after the next one", fields="text")
    routes = (Route("/look_ahead", "The token after the next one of each text."),)
    form = Form("/look_ahead", "Look ahead", "One text a line …")

    def new_class(self, model_config: str) -> Any:
        """A decoder, which cannot see what it is to predict."""
        return AutoModelForCausalLM

    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the labels two places on."""
        return cross_entropy(
            scores[:, :-2].flatten(0, 1).float(),
            batch["labels"][:, 2:].flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )

    def validation_sums(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The loss, and right guesses."""
        labels = batch["labels"][:, 2:]
        is_right = scores[:, :-2].argmax(-1) == labels
        return {
            "loss": self.loss_sum(scores, batch),
            "targets": (labels != IGNORED_LABEL).sum(),
            "right": is_right.sum(),
        }

    def validation_metrics(self, loss: float, sums: Any) -> dict[str, float]:
        """How many guesses are right."""
        return {"accuracy": sums["right"] / max(1, sums["targets"])}

    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """One for each row."""
        texts = [field(row, "text", str, self.name) for row in rows]
        return [{**self.encode_pair(text, None), "row": n} for n, text in enumerate(texts)]

    def predictions(
        self, rows: Sequence[Row], features: Sequence[Feature], scores: Sequence[Tensor]
    ) -> list[Prediction]:
        """By the scores of the last token."""
        last = [len(feature["input_ids"]) - 1 for feature in features]
        ids = [int(one[n].argmax()) for one, n in zip(scores, last, strict=True)]
        return [{"token": self.tokenizer.decode([token_id])} for token_id in ids]

    def metrics(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Metrics:
        """Nothing: rows have no label."""
        return Metrics({})

    def is_right(self, row: Row, prediction: Prediction) -> float:
        """Nobody knows."""
        return 1.0


class ShoutRequest(Body):
    """Body of `POST /is_shouting`."""

    utterances: Texts
    model: ShortText | None = MODEL_FIELD


class Shouting(BaseModel):
    """Answer of `POST /is_shouting`."""

    model: str
    is_loud: list[bool]


class Loudness(RowTask):
    """Whether somebody shouts.

    Rows: `utterance`, `is_loud`. Predictions: {"is_loud": bool, "score": probability}.
    """

    name = "loudness"
    model_class = AutoModelForSequenceClassification
    card = TaskWords("text-classification", "hears who shouts", fields="utterance")
    routes = (
        Route(
            "/is_shouting",
            "Whether each utterance is shouted.",
            body=ShoutRequest,
            answer=Shouting,
            rows=lambda body: [{"utterance": text} for text in body.utterances],
            reply=lambda predictions: {"is_loud": [one["is_loud"] for one in predictions]},
        ),
    )
    form = Form(
        "/is_shouting",
        "Listen",
        "One utterance a line …",
        fields=(FormField("utterances", "lines"),),
    )

    @classmethod
    def named(cls, row: Row) -> Row:
        """Also the rows of a data set that calls an utterance `said`."""
        return {**row, "utterance": row["said"]} if "said" in row else row

    def config_fields(self) -> dict[str, Any]:
        """Two classes."""
        return {"num_labels": 2}

    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """One for each row."""
        features = []
        for index, row in enumerate(rows):
            feature = self.encode_pair(field(row, "utterance", str, self.name), None)
            if row.get("is_loud") is not None:
                feature["labels"] = int(row["is_loud"])
            features.append({**feature, "row": index})
        return features

    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the right class."""
        return cross_entropy(scores.float(), batch["labels"], reduction="sum")

    def predictions(
        self, rows: Sequence[Row], features: Sequence[Feature], scores: Sequence[Tensor]
    ) -> list[Prediction]:
        """One for each row."""
        loud = [float(logits.softmax(-1)[1]) for logits in scores]
        return [{"is_loud": score > 0.5, "score": score} for score in loud]

    def metrics(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Metrics:
        """How many are right."""
        pairs = zip(rows, predictions, strict=True)
        right = [row["is_loud"] == one["is_loud"] for row, one in pairs]
        return Metrics({"accuracy": sum(right) / len(right)})

    def is_right(self, row: Row, prediction: Prediction) -> float:
        """The probability of what is right."""
        score = float(prediction["score"])
        return score if row["is_loud"] else 1 - score

    def baselines(
        self, train_rows: Sequence[Row], rows: Sequence[Row]
    ) -> dict[str, list[Prediction]]:
        """The most frequent answer."""
        is_loud = Counter(row["is_loud"] for row in train_rows).most_common(1)[0][0]
        return {"majority": [{"is_loud": is_loud, "score": float(is_loud)}] * len(rows)}
