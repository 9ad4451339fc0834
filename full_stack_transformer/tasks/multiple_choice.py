"""Which of several texts goes on with a text, or answers it.

Rows: `text`, `choices`: list of texts, `label`: index of the right one, from 0.
Predictions: {"choice": index, "scores": [probability of each]}.

An encoder has a head that scores a pair of texts. A causal model has none, and needs none: a choice scores
the mean log-likelihood of its tokens after the text, which training raises for the right choice.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.errors import RowError
from full_stack_transformer.metrics.classification import classification_metrics
from full_stack_transformer.modelling.backbones import DECODER_PREFIX, GPT2_PRESET
from full_stack_transformer.modelling.model_card import TaskWords
from full_stack_transformer.modelling.pretrained import open_config
from full_stack_transformer.rows.fields import (
    Columns,
    Row,
    counted,
    field,
    is_unknown,
    missing_field,
    only,
    place,
    texts_of,
    with_origin,
)
from full_stack_transformer.tasks.bag_of_words import cosines, words
from full_stack_transformer.tasks.routes import (
    MODEL_FIELD,
    Body,
    FilledText,
    Form,
    FormField,
    Route,
    ShortText,
    Text,
)
from full_stack_transformer.tasks.task import (
    Feature,
    Metrics,
    Prediction,
    RowTask,
    TaskOptions,
    pad,
)
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL

_MAX_CHOICES = 32


class ChooseRequest(Body):
    """Body of `POST /choose`."""

    text: Text = Field(description="What one of the choices goes on with, or answers.")
    choices: Annotated[
        list[FilledText], Field(min_length=2, max_length=_MAX_CHOICES, fail_fast=True)
    ]
    model: ShortText | None = MODEL_FIELD


class Choice(BaseModel):
    """Answer of `POST /choose`."""

    model: str
    choice: int = Field(description="Number of the likeliest, from 0.")
    scores: list[float] = Field(description="The probability of each.")


class MultipleChoice(RowTask):
    """See the module."""

    name = "multiple_choice"
    model_class = AutoModelForMultipleChoice
    heads = ("ForMultipleChoice", "ForCausalLM", "LMHeadModel")
    columns = Columns(("text", "choices"), "label")
    card = TaskWords("multiple-choice", "chooses among texts", fields="text, choices")
    routes = (
        Route(
            "/choose",
            "Which of several texts goes on with a text, or answers it.",
            body=ChooseRequest,
            answer=Choice,
            rows=lambda body: [{"text": body.text, "choices": body.choices}],
            reply=lambda predictions: predictions[0],
        ),
    )
    form = Form(
        "/choose",
        "Choose",
        "A text, then a choice on each line …",
        show="choice",
        fields=(FormField("text", "line"), FormField("choices", "lines")),
    )

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
        config = open_config(model_path)
        self.by_likelihood = type(config) not in MODEL_FOR_MULTIPLE_CHOICE_MAPPING
        return AutoModelForCausalLM if self.by_likelihood else AutoModelForMultipleChoice

    @classmethod
    def named(cls, row: Row) -> Row:
        """Rows of SWAG and CommonsenseQA."""
        if isinstance(row.get("choices"), list) and "text" in row:
            return row
        endings = _endings(row)
        # A table has a column for the greatest number of choices: the last ones may hold nothing.
        while endings and row[endings[-1]] in (None, ""):
            endings.pop()
        if endings:  # SWAG: the context, then the beginning of the sentence that each choice ends
            beginning = row.get("sent2") or ""
            texts = [f"{beginning} {row[name] or ''}".strip() for name in endings]
            text = row.get("sent1", row.get("startphrase", ""))
            return _chosen(row, text, texts, row.get("label", row.get("gold")))
        if "question" in row:
            return _commonsense(row)
        raise missing_field(row, ["choices", "ending0", "question"], "choices")

    @classmethod
    def texts(cls, row: Row) -> Mapping[str, Any]:
        """The text and its choices."""
        endings = _endings(row)
        if endings:
            return only(row, ["sent1" if "sent1" in row else "startphrase", "sent2", *endings])
        return only(row, ["text" if "text" in row else "question", "choices"])

    def describe_labels(self, rows: Sequence[Row]) -> str:
        """Where the right choices stand."""
        return f"right choices: {counted(self.label_counts(rows))}"

    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """One for each row: lists of its choices' tokens."""
        features = []
        for index, row in enumerate(rows):
            text = field(row, "text", str, self.name)
            choices = texts_of(row, "choices", self.name)
            if len(choices) < 2:
                raise RowError(f"{place(row)}a row should have two choices at least")
            encode = self._continued if self.by_likelihood else self.encode_pair
            encoded = [encode(text, choice) for choice in choices]
            feature: Feature = {name: [one[name] for one in encoded] for name in encoded[0]}
            if row.get("label") is not None:
                feature["labels"] = _label(row, len(choices))
            features.append({**feature, "row": index})
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
        """Scores (B, C); -inf where a row has fewer choices."""
        inputs = {name: batch[name] for name in self.input_names}
        scores = (
            self._likelihoods(backbone, batch) if self.by_likelihood else backbone(**inputs).logits
        )
        places = torch.arange(scores.shape[1], device=scores.device)
        is_missing = places >= batch["num_choices"][:, None]
        masked: Tensor = scores.float().masked_fill(is_missing, float("-inf"))
        return masked

    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the right choice."""
        return cross_entropy(scores, batch["labels"], reduction="sum")

    def predictions(
        self, rows: Sequence[Row], features: Sequence[Feature], scores: Sequence[Tensor]
    ) -> list[Prediction]:
        """The most likely choice of each row."""
        return [
            {
                "choice": int(logits.argmax()),
                "scores": logits.softmax(-1)[: len(row["choices"])].tolist(),
            }
            for row, logits in zip(rows, scores, strict=True)
        ]

    def metrics(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Metrics:
        """Accuracy."""
        most = max(len(row["choices"]) for row in rows)
        found = classification_metrics(
            [_label(row, most) for row in rows],
            [one["choice"] for one in predictions],
            [str(index) for index in range(most)],
        )
        return Metrics({"accuracy": found.accuracy})

    def is_right(self, row: Row, prediction: Prediction) -> float:
        """How likely the right choice is, below the likeliest one."""
        scores = prediction["scores"]
        right = float(scores[int(row["label"])])
        return 1.0 if prediction["choice"] == int(row["label"]) else (right - max(scores)) / 2

    def baselines(
        self, train_rows: Sequence[Row], rows: Sequence[Row]
    ) -> dict[str, list[Prediction]]:
        """The most frequent position, and the choice whose words are most like the text's."""
        position = Counter(int(row["label"]) for row in train_rows).most_common(1)[0][0]
        known = [
            words(row["text"]) + words(choice) for row in train_rows for choice in row["choices"]
        ]
        texts = [words(row["text"]) for row in rows for _ in row["choices"]]
        choices = [words(choice) for row in rows for choice in row["choices"]]
        counts = [len(row["choices"]) for row in rows]
        scores = np.split(cosines(known, texts, choices), np.cumsum(counts)[:-1])
        return {
            "majority": [_choice(np.eye(count)[min(position, count - 1)]) for count in counts],
            "words": [_choice(one) for one in scores],
        }

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
        num_tokens = (labels != IGNORED_LABEL).sum(-1).clamp(min=1)
        scores: Tensor = -losses.sum(-1) / num_tokens
        return scores.view(batch["input_ids"].shape[:2])


def _choice(scores: NDArray[np.float64]) -> Prediction:
    return {"choice": int(scores.argmax()), "scores": scores.tolist()}


def _endings(row: Row) -> list[str]:
    """The names of SWAG's choices in their order."""
    endings = [name for name in row if name.startswith("ending") and name[6:].isdecimal()]
    return sorted(endings, key=lambda name: int(name[6:]))


def _commonsense(row: Row) -> Row:
    question = row["question"]
    if isinstance(question, dict):  # CommonsenseQA as it was published
        text, choices = question.get("stem"), question.get("choices")
    else:  # as the hub has it: columns instead of rows
        text, choices = question, row.get("choices")
    if isinstance(choices, dict):
        names, texts = list(choices["label"]), list(choices["text"])
    elif isinstance(choices, list) and all(isinstance(one, dict) for one in choices):
        names, texts = [one["label"] for one in choices], [one["text"] for one in choices]
    else:
        raise missing_field(row, ["choices"], "a list of choices")
    key = row.get("answerKey", row.get("answer"))
    return _chosen(row, text, texts, names.index(key) if key in names else None)


def _chosen(row: Row, text: Any, choices: Sequence[str], label: Any) -> Row:
    found = {"text": text, "choices": list(choices)}
    return with_origin(found if is_unknown(label) else {**found, "label": int(label)}, row)


def _label(row: Row, num_choices: int) -> int:
    try:
        number = float(row["label"])
        label = int(number) if number.is_integer() else -1
    except (TypeError, ValueError, KeyError):
        label = -1
    if not 0 <= label < num_choices:
        raise RowError(
            f"{place(row)}the label should be the index of a choice, 0 to {num_choices - 1}, found "
            f"{row.get('label')!r}"
        )
    return label
