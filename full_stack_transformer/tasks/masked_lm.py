"""Guess the tokens that stand behind a mask token, from both sides.

Trained on a dataset directory, whose samples are masked by datasets/masking.py.
Rows to predict: `text`, with the tokenizer's mask token in it, once or more.
Predictions: for each mask [{"token": id, "text": str, "score": probability}], the likeliest first.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM

from full_stack_transformer.arguments.training import MaskedLMOptions
from full_stack_transformer.datasets.batches import Samples, SortedBatches
from full_stack_transformer.datasets.collators import Batch, Collator
from full_stack_transformer.datasets.corpus import Corpus, DatasetDirectory
from full_stack_transformer.datasets.masking import (
    MaskedCollator,
    MaskedSamples,
    Masking,
    make_masking,
)
from full_stack_transformer.errors import ModelError, RowError
from full_stack_transformer.modelling.model_card import TaskWords
from full_stack_transformer.rows.fields import Row, field, place, texts_and_label
from full_stack_transformer.tasks.routes import Form, Route
from full_stack_transformer.tasks.task import (
    CorpusTask,
    Feature,
    Metrics,
    Prediction,
    RowTask,
    TaskOptions,
)
from full_stack_transformer.tokenization.document_tokenizer import (
    IGNORED_LABEL,
    open_saved_tokenizer,
)
from full_stack_transformer.tokenization.transformers_tokenizer import save_tokenizer

_NUM_GUESSES = 5


@dataclass(frozen=True, kw_only=True)
class _Options(MaskedLMOptions, TaskOptions):
    """What is hidden."""

    seed: int = 0
    """Of the training; a validation always hides the same tokens."""


class MaskedLm(CorpusTask, RowTask):
    """See the module."""

    name = "masked_lm"
    model_class = AutoModelForMaskedLM
    heads = ("ForMaskedLM",)
    options_class = _Options
    needs_labels = False
    card = TaskWords("fill-mask", "guesses hidden tokens", fields="text, with [MASK] in it")
    routes = (
        Route(
            "/fill_mask",
            "The likeliest tokens for each mask of each text; `/version` names the mask token.",
        ),
    )
    form = Form("/fill_mask", "Fill in", "One text a line, with MASK in it …", show="guesses")
    _masking: Masking

    @classmethod
    def open_tokenizer(cls, directory: Path) -> Any:
        """That of the model, which has a mask token.

        Raises:
            ModelError: it has none.
        """
        tokenizer = super().open_tokenizer(directory)
        if tokenizer.mask_token is None:
            raise ModelError(
                f"the tokenizer in {directory} has no mask token, which a masked language model needs; name "
                "it as mask_token in tokenizer_config.json"
            )
        return tokenizer

    @classmethod
    def named(cls, row: Row) -> Row:
        """Texts of GLUE, IMDB, Wikipedia and others."""
        return texts_and_label(row)

    @property
    def control_tokens(self) -> list[str]:
        """The mask."""
        return [str(self.tokenizer.mask_token)]

    @classmethod
    def tokenizer_files(cls, dataset: DatasetDirectory, place: Callable[[], Path]) -> Path:
        """The tokenizer of the dataset with a mask token."""
        directory = place()
        save_tokenizer(
            open_saved_tokenizer(dataset.tokenizer_directory),
            directory,
            max_length=dataset.description["max_sample_length"],
            can_mask=True,
        )
        return directory

    def read_dataset(self, dataset: DatasetDirectory) -> None:
        """Refuse a dataset whose tokens have other ids here."""
        theirs = open_saved_tokenizer(dataset.tokenizer_directory)
        known = self.tokenizer.get_vocab()
        if any(known.get(token) != index for token, index in theirs.backend.get_vocab().items()):
            raise self.other_vocabulary(dataset, theirs.vocab_size)
        super().read_dataset(dataset)
        self._masking = make_masking(
            theirs,
            mask_id=self.tokenizer.mask_token_id,
            vocab_size=self.vocab_size,
            probability=self.options.mask_probability,
            whole_words=self.options.whole_word_masking,
            seed=self.options.seed,
        )

    def samples(self, corpus: Corpus) -> Samples:
        """Their hidden tokens are the targets."""
        return MaskedSamples(corpus, self._masking)

    def collator(self, corpus: Corpus, *, seed: int) -> Collator:
        """Hides tokens as seed, epoch and sample decide."""
        masking = dataclasses.replace(self._masking, seed=seed)
        pad_id = self.dataset.description["special_token_ids"]["pad"]
        return MaskedCollator(corpus, masking, pad_id=pad_id)

    def description_fields(self) -> dict[str, Any]:
        """How tokens were hidden, so that an evaluation hides them alike."""
        options = {
            "probability": self.options.mask_probability,
            "whole_words": self.options.whole_word_masking,
        }
        return {"masking": options}

    @classmethod
    def options_of(cls, description: Mapping[str, Any]) -> dict[str, Any]:
        """The same, read again."""
        masking = description.get("masking", {})
        return {
            "mask_probability": masking.get("probability", Masking.probability),
            "whole_word_masking": masking.get("whole_words", False),
        }

    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the hidden tokens."""
        is_hidden = batch["labels"] != IGNORED_LABEL
        logits = scores[is_hidden].float()
        return cross_entropy(logits, batch["labels"][is_hidden], reduction="sum")

    def validation_sums(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross entropies and right guesses of the hidden tokens."""
        is_hidden = batch["labels"] != IGNORED_LABEL
        is_right = (scores.argmax(-1) == batch["labels"]) & is_hidden
        return {
            "loss": self.loss_sum(scores, batch),
            "targets": is_hidden.sum(),
            "right": is_right.sum(),
        }

    def validation_metrics(self, loss: float, sums: Mapping[str, float]) -> dict[str, float]:
        """Accuracy of the guesses, and perplexity."""
        accuracy = sums["right"] / max(1, sums["targets"])
        return {"accuracy": accuracy, **super().validation_metrics(loss, sums)}

    def evaluation(self, loss: float, sums: Mapping[str, float]) -> dict[str, Any]:
        """The same, beside always guessing the most frequent hidden token."""
        found = self.validation_metrics(loss, sums)
        num_hidden = max(1, int(sums["targets"]))
        return {
            "task": self.name,
            "loss": loss,
            "perplexity": found["perplexity"],
            "accuracy": found["accuracy"],
            "num_samples": len(self.dataset.valid),
            "num_hidden_tokens": num_hidden,
            "baselines": {"majority": {"accuracy": self._most_frequent() / num_hidden}},
        }

    def _most_frequent(self) -> int:
        """How often the most frequent one of the hidden tokens is hidden."""
        hidden = Counter[int]()
        plan = SortedBatches(self.samples(self.dataset.valid), batch_size=64)
        collate = self.collator(self.dataset.valid, seed=0)
        for position in range(plan.num_batches_per_epoch):
            labels = collate(plan.batch(0, position))["labels"]
            hidden.update(labels[labels != IGNORED_LABEL].tolist())
        return max(hidden.values(), default=0)

    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """One for each row, with the `positions` of its masks."""
        mask_id = self.tokenizer.mask_token_id
        features = []
        for index, row in enumerate(rows):
            feature = self.encode_pair(field(row, "text", str, self.name), None)
            positions = [n for n, token in enumerate(feature["input_ids"]) if token == mask_id]
            if not positions:
                raise RowError(
                    f"{place(row)}a text should hold {self.tokenizer.mask_token} within its first "
                    f"{self.options.max_length} tokens"
                )
            features.append({**feature, "positions": positions, "row": index})
        return features

    def predictions(
        self, rows: Sequence[Row], features: Sequence[Feature], scores: Sequence[Tensor]
    ) -> list[Prediction]:
        """A list for each row, with a list of guesses for each mask."""
        return [
            [self._guesses(logits[position]) for position in feature["positions"]]
            for feature, logits in zip(features, scores, strict=True)
        ]

    def metrics(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Metrics:
        """How often the first guess, or one of the guesses, is the row's `label`, for one mask a row."""
        labels = [field(row, "label", str, self.name) for row in rows]
        guesses = [[one["text"].strip() for one in masks[0]] for masks in predictions]
        first = [label == texts[0] for label, texts in zip(labels, guesses, strict=True)]
        among = [label in texts for label, texts in zip(labels, guesses, strict=True)]
        return Metrics(
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
