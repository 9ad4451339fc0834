"""A vector for each text, such that texts that mean the same are close.

Rows: `text`, `text_pair` (optional), `label` (optional): how alike the two are, from 0 to any number.
Predictions: {"embedding": [numbers]} of one text, {"score": cosine} of two.

Losses: cosine (the cosine equals the label, divided by the greatest one) or simcse (a text is closer to its
pair than to the others of the batch; without a pair, to itself under other dropout; a pair whose label is
below half of the greatest one teaches nothing there). A saved model is one of sentence-transformers.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModel, PretrainedConfig, PreTrainedTokenizerFast

from full_stack_transformer.arguments.training import SentenceEmbeddingOptions
from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.errors import RowError
from full_stack_transformer.metrics.regression import pearson, spearman
from full_stack_transformer.modelling.embedding.head import (
    MODULES_FILE_NAME,
    Head,
    cosine_losses,
    needs_first_layer,
    read_head,
    simcse_losses,
    write_head,
)
from full_stack_transformer.modelling.model_card import TaskWords
from full_stack_transformer.rows.fields import (
    Row,
    described_numbers,
    field,
    names_of,
    names_of_texts,
    only,
    place,
    texts_and_label,
)
from full_stack_transformer.tasks.bag_of_words import similarities
from full_stack_transformer.tasks.routes import Form, Route
from full_stack_transformer.tasks.task import (
    Feature,
    Metrics,
    Prediction,
    RowTask,
    TaskOptions,
    pad,
)
from full_stack_transformer.tasks.together import of_the_others

_ALIKE = 0.5


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions(SentenceEmbeddingOptions, TaskOptions):
    """How vectors are made and learned."""


class Embeddings(BaseModel):
    """Answer of `POST /embed`."""

    model: str
    embeddings: list[list[float]]


class Similarities(BaseModel):
    """Answer of `POST /similarity`: cosines (texts, texts)."""

    model: str
    similarity: list[list[float]]


def _reply_embeddings(predictions: Sequence[Prediction]) -> dict[str, Any]:
    return {"embeddings": [one["embedding"] for one in predictions]}


def _reply_similarities(predictions: Sequence[Prediction]) -> dict[str, Any]:
    directions = normalize(torch.tensor([one["embedding"] for one in predictions]), dim=-1)
    return {"similarity": (directions @ directions.T).tolist()}


class SentenceEmbedding(RowTask):
    """See the module."""

    name = "sentence_embedding"
    model_class = AutoModel
    heads = ("Model",)
    marker_file = MODULES_FILE_NAME
    options_class = EmbeddingOptions
    needs_labels = False
    measured_by = "a pair of texts and a label"
    card = TaskWords("sentence-similarity", "embeds texts", fields="text, text_pair")
    routes = (
        Route(
            "/embed",
            "A vector for each text, as the model gives it.",
            answer=Embeddings,
            reply=_reply_embeddings,
            needs_vectors=True,
        ),
        Route(
            "/similarity",
            "The cosine between any two of the texts.",
            answer=Similarities,
            reply=_reply_similarities,
            needs_vectors=True,
        ),
    )
    form = Form("/similarity", "Compare", "Two or more texts, one a line …", show="matrix")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        options: EmbeddingOptions,
        *,
        loss: str = "simcse",
        greatest_label: float = 1.0,
    ) -> None:
        super().__init__(tokenizer, options)
        self.head = Head(options.pooling)
        self.loss = loss
        self._greatest_label = greatest_label

    @classmethod
    def named(cls, row: Row) -> Row:
        """Texts and labels of STS-B, ATEC and others."""
        return texts_and_label(row)

    @classmethod
    def texts(cls, row: Row) -> Mapping[str, Any]:
        """One or two."""
        return only(row, names_of_texts(row))

    @classmethod
    def learn(
        cls, rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, options: EmbeddingOptions
    ) -> Self:
        """Which loss, and how great labels are.

        Raises:
            RowError: the cosine loss is asked for, and a row has no pair or no label.
        """
        loss = options.embedding_loss
        lacking = next(
            (row for row in rows if row.get("label") is None or row.get("text_pair") is None), None
        )
        if loss == "auto":
            loss = "cosine" if lacking is None else "simcse"
        elif loss == "cosine" and lacking is not None:
            raise RowError(
                f"{place(lacking)}--embedding_loss cosine needs 'text_pair' and 'label' in each row; found "
                f"the fields {names_of(lacking)}"
            )
        labels = [_number(row) for row in rows if row.get("label") is not None]
        if loss == "simcse" and len(labels) == len(rows) and not max(labels, default=1.0) > 0:
            raise RowError(
                "--embedding_loss simcse learns from pairs that are alike, but no label is above 0; pass "
                "--embedding_loss cosine"
            )
        if loss == "cosine" and len({*labels}) == 1:
            raise RowError(
                f"--embedding_loss cosine needs two different labels at least; found only {labels[0]:g} in "
                f"{len(rows):,} rows; name the right column with --label_column, or pass --embedding_loss "
                "simcse if all pairs are alike"
            )
        return cls(
            tokenizer, options, loss=loss, greatest_label=max(map(abs, labels), default=1.0) or 1.0
        )

    def label_counts(self, rows: Sequence[Row]) -> Counter[str]:
        """None: labels are scores."""
        return Counter()

    def describe_labels(self, rows: Sequence[Row]) -> str:
        """The range of the scores."""
        return described_numbers([_number(row) for row in rows if row.get("label") is not None])

    def saved_options(self) -> dict[str, Any]:
        """None: the files of sentence-transformers say all."""
        return {}

    def finish_directory(self, directory: Path, config: PretrainedConfig) -> None:
        """The files that make it one of sentence-transformers."""
        write_head(
            directory,
            self.head,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            max_length=self.options.max_length,
        )

    def read_directory(self, directory: Path, device: torch.device) -> None:
        """The pooling, a whitening where there is one, and how much of a text is read."""
        self.head, max_length = read_head(directory, device=device)
        most = self.options.max_length
        self.options = replace(self.options, max_length=min(most, max_length or most))

    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """One for each row: `texts`, the tokens of one text or of both."""
        features = []
        for index, row in enumerate(rows):
            texts = [self.encode_pair(field(row, "text", str, self.name), None)]
            if row.get("text_pair") is not None:
                texts.append(self.encode_pair(field(row, "text_pair", str, self.name), None))
            feature: Feature = {"texts": texts, "row": index}
            if row.get("label") is not None:
                feature["labels"] = _number(row) / self._greatest_label
            features.append(feature)
        return features

    def length(self, feature: Feature) -> int:
        """That of the longer text."""
        return max(len(text["input_ids"]) for text in feature["texts"])

    def num_tokens(self, feature: Feature) -> int:
        """Those of its texts."""
        return sum(len(text["input_ids"]) for text in feature["texts"])

    def num_targets(self, feature: Feature) -> int:
        """1, and 0 for a pair that teaches nothing."""
        return int(self.loss == "cosine" or feature.get("labels", 1.0) >= _ALIKE)

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Tensors (B, N, T), N = 2 where any of the texts has a pair; then one without is there twice."""
        num_texts = max(len(feature["texts"]) for feature in features)
        texts = [
            feature["texts"][min(index, len(feature["texts"]) - 1)]
            for feature in features
            for index in range(num_texts)
        ]
        batch: Batch = {}
        for name in self.input_names:
            padding = self.tokenizer.pad_token_id if name == "input_ids" else 0
            batch[name] = pad([text[name] for text in texts], padding).view(
                len(features), num_texts, -1
            )
        labels = [feature.get("labels", 1.0) for feature in features]
        batch["labels"] = torch.tensor(labels, dtype=torch.float32)
        return batch

    def forward(self, backbone: Any, batch: Batch) -> Tensor:
        """Vectors (B, N, D); in training N = 2 for texts without a pair too, each under its own dropout."""
        num_texts = batch["input_ids"].shape[1]
        num_times = 2 if backbone.training and num_texts == 1 else 1
        inputs = {
            name: batch[name].repeat(1, num_times, 1).flatten(0, 1) for name in self.input_names
        }
        uses_first = needs_first_layer(self.head.pooling)
        output = backbone(**inputs, output_hidden_states=uses_first)
        vectors = self.head(
            output.last_hidden_state.float(),
            inputs["attention_mask"],
            first=output.hidden_states[1].float() if uses_first else None,
        )
        return vectors.view(len(batch["input_ids"]), num_texts * num_times, -1)

    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """SimCSE or the cosine loss, as the module says."""
        first, second = scores[:, 0], scores[:, -1]
        if self.loss == "cosine":
            return cosine_losses(first, second, batch["labels"]).sum()
        negatives = None
        if self.num_processes > 1:
            is_filler = "is_filler" in batch or len(batch.get("weights", first)) == 0
            negatives = of_the_others(second, num_used=0 if is_filler else len(second))
        temperature = self.options.simcse_temperature
        losses = simcse_losses(first, second, temperature=temperature, negatives=negatives)
        return (losses * (batch["labels"] >= _ALIKE)).sum()

    def predictions(
        self, rows: Sequence[Row], features: Sequence[Feature], scores: Sequence[Tensor]
    ) -> list[Prediction]:
        """A vector of a text, or the cosine of two."""
        return [
            {"score": float(cosine_similarity(vectors[0], vectors[1], dim=0))}
            if len(feature["texts"]) == 2
            else {"embedding": vectors[0].tolist()}
            for feature, vectors in zip(features, scores, strict=True)
        ]

    def metrics(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Metrics:
        """Correlation of cosines and labels, over the rows that have both."""
        pairs = [
            (_number(row), one["score"])
            for row, one in zip(rows, predictions, strict=True)
            if row.get("label") is not None and "score" in one
        ]
        if not pairs:
            return Metrics({})
        expected, found = zip(*pairs, strict=True)
        return Metrics({"spearman": spearman(expected, found), "pearson": pearson(expected, found)})

    def is_right(self, row: Row, prediction: Prediction) -> float:
        """How near the cosine is to the label, below 0."""
        if row.get("label") is None or "score" not in prediction:
            return 1.0
        return -abs(_number(row) / self._greatest_label - float(prediction["score"]))

    def baselines(
        self, train_rows: Sequence[Row], rows: Sequence[Row]
    ) -> dict[str, list[Prediction]]:
        """How many words both texts share."""
        return {"words": [{"score": score} for score in similarities(train_rows, rows)]}


def _number(row: Row) -> float:
    try:
        number = float(row["label"])
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(
            f"{place(row)}the label should be a number, how alike the texts are; found {row['label']!r}"
        )
    return number
