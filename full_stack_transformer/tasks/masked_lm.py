"""Guess the tokens that stand behind a mask token, from both sides.

Rows: `text`, with the tokenizer's mask token in it, once or more.
Predictions: for each mask [{"token": id, "text": str, "score": probability}], the likeliest first.
Trained on a dataset directory, whose samples are masked by datasets/masking.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM

from full_stack_transformer.errors import RowError
from full_stack_transformer.tasks.task import (
    IGNORED_LABEL,
    Feature,
    Figures,
    Prediction,
    Row,
    Task,
    field,
    place,
)

_NUM_GUESSES = 5


class MaskedLm(Task):
    """See the module."""

    name = "masked_lm"
    model_class = AutoModelForMaskedLM
    needs_labels = False

    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """One for each row, with the `positions` of its masks."""
        mask_id = self.tokenizer.mask_token_id
        features = []
        for number, row in enumerate(rows):
            feature = self.encode_pair(field(row, "text", str, self.name), None)
            positions = [n for n, token in enumerate(feature["input_ids"]) if token == mask_id]
            if not positions:
                raise RowError(
                    f"{place(row)}a text should hold {self.tokenizer.mask_token} within its first "
                    f"{self.options.max_length} tokens"
                )
            features.append({**feature, "positions": positions, "row": number})
        return features

    def loss_sum(self, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy of the hidden tokens."""
        labels = batch["labels"]
        return cross_entropy(
            scores.flatten(0, 1).float(),
            labels.flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )

    def predictions(
        self, rows: Sequence[Row], features: Sequence[Feature], scores: Sequence[Tensor]
    ) -> list[Prediction]:
        """A list for each row, with a list of guesses for each mask."""
        return [
            [self._guesses(logits[position]) for position in feature["positions"]]
            for feature, logits in zip(features, scores, strict=True)
        ]

    def figures(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Figures:
        """How often the first guess, or one of the guesses, is the row's `label`, for one mask a row."""
        first = [
            row["label"] == guesses[0][0]["text"].strip()
            for row, guesses in _pairs(rows, predictions)
        ]
        among = [
            row["label"] in [one["text"].strip() for one in guesses[0]]
            for row, guesses in _pairs(rows, predictions)
        ]
        return Figures(
            {"accuracy": sum(first) / len(first), f"top_{_NUM_GUESSES}": sum(among) / len(among)}
        )

    def is_right(self, row: Row, prediction: Prediction) -> float:
        """The probability of the right guess."""
        scores = [one["score"] for one in prediction[0] if one["text"].strip() == row["label"]]
        return float(sum(scores))

    def _guesses(self, logits: Tensor) -> list[dict[str, object]]:
        probabilities, ids = torch.topk(logits.softmax(-1), min(_NUM_GUESSES, len(logits)))
        return [
            {"token": token, "text": self.tokenizer.decode([token]), "score": score}
            for token, score in zip(ids.tolist(), probabilities.tolist(), strict=True)
        ]


def _pairs(rows: Sequence[Row], predictions: Sequence[Prediction]) -> list[tuple[Row, Prediction]]:
    for row in rows:
        field(row, "label", str, MaskedLm.name)
    return list(zip(rows, predictions, strict=True))
