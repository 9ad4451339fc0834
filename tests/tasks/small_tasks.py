"""Rows of every task that a tiny model learns in seconds, and a tokenizer for them."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.modelling.backbones import new_backbone
from full_stack_transformer.modelling.model_directory import save_model_directory
from full_stack_transformer.rows.fields import Row
from full_stack_transformer.tasks.opening import row_task_class
from full_stack_transformer.tasks.task import RowTask, Task
from full_stack_transformer.tokenization.transformers_tokenizer import (
    open_tokenizer,
    special_token_ids,
    train_tokenizer,
)

_ANIMALS = ("cat", "dog", "hen", "cow", "pig")
_PLANTS = ("oak", "fern", "rose", "pine", "moss")
_VERBS = ("sees", "finds", "likes", "hears")
TINY_ENCODER = {
    "model_type": "modernbert",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "classifier_pooling": "mean",
    # What a step draws must not depend on the steps before.
    "mlp_dropout": 0.1,
    "embedding_dropout": 0.1,
}


def small_rows(task: str, number: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """So many rows of a task."""
    draw = random.Random(f"{task} {seed}")
    return [_MAKERS[task](draw) for _ in range(number)]


def _sentence(draw: random.Random, kind: tuple[str, ...]) -> str:
    words = [draw.choice(kind), draw.choice(_VERBS), "the", draw.choice(kind)]
    return " ".join(words + ["again"] * draw.randrange(4))


def _class_row(draw: random.Random) -> dict[str, Any]:
    label = draw.choice(("animal", "plant"))
    return {"text": _sentence(draw, _ANIMALS if label == "animal" else _PLANTS), "label": label}


def _pair_row(draw: random.Random) -> dict[str, Any]:
    row = _class_row(draw)
    other = _class_row(draw)
    score = 4.5 if row["label"] == other["label"] else 0.5
    return {"text": row["text"], "text_pair": other["text"], "label": score}


def _many_row(draw: random.Random) -> dict[str, Any]:
    labels = [name for name in ("animal", "plant") if draw.random() < 0.6]
    kinds = {"animal": _ANIMALS, "plant": _PLANTS}
    text = " and ".join(_sentence(draw, kinds[name]) for name in labels) or "nothing"
    return {"text": text, "label": labels}


def _choice_row(draw: random.Random) -> dict[str, Any]:
    label = draw.randrange(3)
    choices = [_sentence(draw, _PLANTS) for _ in range(2 + draw.randrange(2))]
    label = min(label, len(choices) - 1)
    choices[label] = _sentence(draw, _ANIMALS)
    return {"text": _sentence(draw, _ANIMALS), "choices": choices, "label": label}


def _span_row(draw: random.Random) -> dict[str, Any]:
    words = [draw.choice(_PLANTS) for _ in range(12)]
    if draw.random() < 0.2:
        return {"question": "which animal", "context": " ".join(words), "answers": []}
    place = draw.randrange(12)
    words[place] = draw.choice(_ANIMALS)
    start = len(" ".join(words[:place])) + (place > 0)
    answer = {"text": words[place], "start": start}
    return {"question": "which animal", "context": " ".join(words), "answers": [answer]}


def _words_row(draw: random.Random) -> dict[str, Any]:
    kinds = [draw.choice((_ANIMALS, _PLANTS, _VERBS)) for _ in range(4 + draw.randrange(6))]
    labels = {_ANIMALS: "B-ANIMAL", _PLANTS: "B-PLANT", _VERBS: "O"}
    return {"words": [draw.choice(kind) for kind in kinds], "labels": [labels[k] for k in kinds]}


_MAKERS: dict[str, Any] = {
    "sequence_classification": _class_row,
    "regression": _pair_row,
    "multi_label": _many_row,
    "multiple_choice": _choice_row,
    "span_selection": _span_row,
    "token_labelling": _words_row,
    "sentence_embedding": _pair_row,
}


def small_tokenizer(directory: Path, *, max_length: int = 48) -> Path:
    """A byte-level BPE that knows the words of the rows."""
    words = " ".join((*_ANIMALS, *_PLANTS, *_VERBS, "which animal the again and nothing"))
    train_tokenizer([words] * 3, directory, vocab_size=300, max_length=max_length)
    return directory


def save_task(
    directory: Path,
    task: Task,
    backbone: Backbone,
    tokenizer_dir: Path,
    description: Mapping[str, Any],
) -> None:
    """The model directory that training would write."""
    save_model_directory(
        directory,
        backbone,
        tokenizer_directory=tokenizer_dir,
        description=dict(description),
        finish=lambda partial: task.finish_directory(partial, backbone.config),
    )


def are_close(left: Any, right: Any) -> bool:
    """Whether predictions are the same but for the last digits of their numbers."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(are_close(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(are_close, left, right))
    return bool(left == pytest.approx(right, abs=1e-5))


def small_task(
    name: str, rows: Sequence[Row], directory: Path, *, shape: str = "tiny", **options: Any
) -> tuple[RowTask, Backbone]:
    """A task that has seen the rows' labels, and a model for it with random weights."""
    tokenizer = open_tokenizer(directory)
    cls = row_task_class(name)
    options = {"max_length": tokenizer.model_max_length, **options}
    task = cls.learn(rows, tokenizer, cls.options_class(**options))
    torch.manual_seed(0)
    backbone = new_backbone(
        shape,
        vocab_size=len(tokenizer),
        max_length=tokenizer.model_max_length,
        special_token_ids=special_token_ids(tokenizer),
        model_class=task.new_class(shape),
        **task.config_fields(),
    )
    return task, backbone.eval()
