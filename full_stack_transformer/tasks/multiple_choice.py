"""Which of several texts goes on with a text, or answers it.

Rows: `text`, `choices`: list of texts, `label`: number of the right one, from 0.
Predictions: {"choice": number, "scores": [probability of each]}.

An encoder has a head that scores a pair of texts. A causal model has none, and needs none: a choice scores
the mean log-likelihood of its tokens after the text, which training raises for the right choice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from full_stack_transformer.errors import RowError
from full_stack_transformer.metrics.classification import classification_metrics
from full_stack_transformer.modelling.backbones import DECODER_PREFIX, GPT2_PRESET
from full_stack_transformer.tasks.task import (
    IGNORED_LABEL,
    Batch,
    Feature,
    Figures,
    Prediction,
    Row,
    Task,
    TaskOptions,
    field,
    pad,
    place,
    texts_of,
)


class MultipleChoice(Task):
    """See the module."""

    name = "multiple_choice"
    model_class = AutoModelForMultipleChoice
    baseline = "words"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: TaskOptions) -> None:
        super().__init__(tokenizer, options)
        self.by_likelihood = False

    @classmethod
    def open(
        cls, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, options: TaskOptions
    ) -> "MultipleChoice":
        """By likelihood where the saved model is a causal one."""
        task = cls(tokenizer, options)
        task.by_likelihood = cls.backbone_class(config) is AutoModelForCausalLM
        return task

    @classmethod
    def backbone_class(cls, config: PretrainedConfig) -> Any:
        """That of the saved model."""
        architecture = (config.architectures or [""])[0]
        has_head = architecture.endswith("ForMultipleChoice")
        return AutoModelForMultipleChoice if has_head else AutoModelForCausalLM

    def new_class(self, model_config: str) -> Any:
        """A decoder by its name is a causal model."""
        self.by_likelihood = model_config.startswith(DECODER_PREFIX) or model_config == GPT2_PRESET
        return AutoModelForCausalLM if self.by_likelihood else AutoModelForMultipleChoice

    def pretrained_class(self, model_path: str) -> Any:
        """Causal where the architecture has no head for choices."""
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
        self.by_likelihood = type(config) not in MODEL_FOR_MULTIPLE_CHOICE_MAPPING
        return AutoModelForCausalLM if self.by_likelihood else AutoModelForMultipleChoice

    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """One for each row: lists of its choices' tokens."""
        features = []
        for number, row in enumerate(rows):
            text = field(row, "text", str, self.name)
            choices = texts_of(row, "choices", self.name)
            if len(choices) < 2:
                raise RowError(f"{place(row)}a row should have two choices at least")
            encode = self._continued if self.by_likelihood else self.encode_pair
            encoded = [encode(text, choice) for choice in choices]
            feature: Feature = {name: [one[name] for one in encoded] for name in encoded[0]}
            if row.get("label") is not None:
                feature["labels"] = _label(row, len(choices))
            features.append({**feature, "row": number})
        return features

    def length(self, feature: Feature) -> int:
        """That of the longest choice."""
        return max(map(len, feature["input_ids"]))

    def num_tokens(self, feature: Feature) -> int:
        """Those of all choices."""
        return sum(map(len, feature["input_ids"]))

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Tensors (B, C, T); a row with fewer choices than others repeats its first, which does not count."""
        num_choices = [len(feature["input_ids"]) for feature in features]
        most = max(num_choices)
        batch: Batch = {"num_choices": torch.tensor(num_choices)}
        names = [*self.input_names, *(["choice_labels"] if self.by_likelihood else [])]
        paddings = {"input_ids": self.tokenizer.pad_token_id, "choice_labels": IGNORED_LABEL}
        for name in names:
            lists = [
                one
                for feature in features
                for one in feature[name] + feature[name][:1] * (most - len(feature[name]))
            ]
            batch[name] = pad(lists, paddings.get(name, 0)).view(len(features), most, -1)
        if all("labels" in feature for feature in features):
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        return batch

    def forward(self, backbone: Any, batch: Batch) -> Tensor:
        """Scores (B, C); -inf for a choice that is none."""
        inputs = {name: batch[name] for name in self.input_names}
        scores = (
            self._likelihoods(backbone, batch) if self.by_likelihood else backbone(**inputs).logits
        )
        places = torch.arange(scores.shape[1], device=scores.device)
        is_none = places >= batch["num_choices"][:, None]
        masked: Tensor = scores.float().masked_fill(is_none, float("-inf"))
        return masked

    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the right choice."""
        return cross_entropy(scores, batch["labels"], reduction="sum")

    def predictions(
        self, rows: Sequence[Row], features: Sequence[Feature], scores: Sequence[Tensor]
    ) -> list[Prediction]:
        """As the module says."""
        return [
            {
                "choice": int(logits.argmax()),
                "scores": logits.softmax(-1)[: len(row["choices"])].tolist(),
            }
            for row, logits in zip(rows, scores, strict=True)
        ]

    def figures(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Figures:
        """Accuracy."""
        most = max(len(row["choices"]) for row in rows)
        found = classification_metrics(
            [_label(row, most) for row in rows],
            [one["choice"] for one in predictions],
            [str(number) for number in range(most)],
        )
        return Figures({"accuracy": found.accuracy})

    def is_right(self, row: Row, prediction: Prediction) -> float:
        """How likely the right choice is, below the likeliest one."""
        scores = prediction["scores"]
        right = float(scores[int(row["label"])])
        return 1.0 if prediction["choice"] == int(row["label"]) else (right - max(scores)) / 2

    def _continued(self, text: str, choice: str) -> Feature:
        """Text and choice as a causal model reads them; of a long text the end."""
        tokenizer = self.tokenizer
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        after = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        after = after[: self.options.max_length - len(begin)]
        room = self.options.max_length - len(begin) - len(after)
        before = before[-room:] if room else []
        ids = [*begin, *before, *after]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "token_type_ids": [0] * len(ids),
            "choice_labels": [IGNORED_LABEL] * (len(ids) - len(after)) + after,
        }

    @staticmethod
    def _likelihoods(backbone: Any, batch: Batch) -> Tensor:
        """(B, C) mean log-likelihood of a choice's tokens."""
        labels = batch["choice_labels"].flatten(0, 1)[:, 1:]
        output = backbone(
            input_ids=batch["input_ids"].flatten(0, 1),
            attention_mask=batch["attention_mask"].flatten(0, 1),
            use_cache=False,
        )
        losses = cross_entropy(
            output.logits[:, :-1].float().transpose(1, 2),
            labels,
            ignore_index=IGNORED_LABEL,
            reduction="none",
        )
        numbers = (labels != IGNORED_LABEL).sum(-1).clamp(min=1)
        scores: Tensor = -losses.sum(-1) / numbers
        return scores.view(batch["input_ids"].shape[:2])


def _label(row: Row, num_choices: int) -> int:
    try:
        number = float(row["label"])
        label = int(number) if number.is_integer() else -1
    except (TypeError, ValueError, KeyError):
        label = -1
    if not 0 <= label < num_choices:
        raise RowError(
            f"{place(row)}the label should be the number of a choice, 0 to {num_choices - 1}, found "
            f"{row.get('label')!r}"
        )
    return label
