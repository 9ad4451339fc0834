"""`fst evaluate TUNED DATASETS --compare BASE`: what a model learned, and what it forgot, in one table.

    base  ──┐
            ├─> the same validation samples of each dataset ──> loss, perplexity, bits per byte, change
    tuned ──┘

Losses of models with different tokenizers are about different tokens. Those models are compared by bits per
byte alone: each predicts all tokens of the same decoded texts from its begin token on.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.datasets.corpus import DatasetDirectory, open_dataset
from full_stack_transformer.errors import DatasetError, ModelError
from full_stack_transformer.evaluation.log_likelihoods import (
    log_likelihoods,
    open_scoring_runner,
    rolling_spans,
)
from full_stack_transformer.modelling.backbones import context_length
from full_stack_transformer.modelling.places import find_model
from full_stack_transformer.tasks.opening import open_task, task_class_of
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    open_saved_tokenizer,
)

logger = logging.getLogger(__name__)

# Of a model whose config names no context.
_DEFAULT_MAX_LENGTH = 512
Metrics = dict[str, Any]


def compare(
    arguments: EvaluateArguments, measure: Callable[[EvaluateArguments], Metrics]
) -> dict[str, Any]:
    """The metrics of both models on each dataset, and by how many per cent they differ; logs a table of them.

    Args:
        arguments: with `compare`.
        measure: the metrics of a model on a dataset that was made with its tokenizer.

    Raises:
        ModelError: a model does not continue texts.
        DatasetError: conversations were made with another tokenizer than that of both models.
    """
    assert arguments.compare is not None
    models = {
        "base": replace(arguments, model=arguments.compare, base=None),
        "tuned": arguments,
    }
    tokenizers = {name: _tokenizer(one) for name, one in models.items()}
    comparisons = []
    for path in (arguments.data, *arguments.more_datasets):
        dataset = open_dataset(path, arguments)
        theirs = open_saved_tokenizer(dataset.tokenizer_directory)
        if all(_are_alike(theirs, ours) for ours in tokenizers.values()):
            found = {name: measure(replace(one, dataset_dir=path)) for name, one in models.items()}
        else:
            texts = _texts(dataset, theirs)
            found = {name: _bits_per_byte(one, texts) for name, one in models.items()}
        comparisons.append(
            {"dataset": str(dataset.directory), **found, "change_in_percent": _changes(found)}
        )
    is_same = _are_alike(*tokenizers.values())
    content = {name: str(one.model) for name, one in models.items()}
    logger.info("%s", _table(content, comparisons, has_same_tokenizer=is_same))
    return {**content, "same_tokenizer": is_same, "comparisons": comparisons}


def _tokenizer(arguments: EvaluateArguments) -> DocumentTokenizer:
    place = find_model(arguments.model, arguments.base)
    cls = task_class_of(place.directory, place.adapter)
    if not cls.generates:
        raise ModelError(
            f"{place.own} is a model for {cls.name}; --compare is for models that continue texts"
        )
    tokenizer: DocumentTokenizer = cls.open_tokenizer(place.tokenizer)
    return tokenizer


def _are_alike(one: DocumentTokenizer, other: DocumentTokenizer) -> bool:
    return one.backend.get_vocab() == other.backend.get_vocab()


def _texts(dataset: DatasetDirectory, tokenizer: DocumentTokenizer) -> list[str]:
    """The validation samples as text.

    Raises:
        DatasetError: they are not documents, whose text is all that a model is given.
    """
    if dataset.kind != "documents":
        raise DatasetError(
            f"{dataset.directory} holds {dataset.kind} in tokens of another tokenizer than that of both "
            "models; such models are compared by the bits per byte of documents"
        )
    samples = dataset.valid.gather(range(len(dataset.valid)))
    texts = (tokenizer.decode(sample.tolist()) for sample in samples)
    return [text for text in texts if text]


@torch.inference_mode()
def _bits_per_byte(arguments: EvaluateArguments, texts: list[str]) -> Metrics:
    """What a model needs for a byte of texts, each of which it reads from the begin token on."""
    opened = open_task(arguments.model, base=arguments.base, device=arguments.device)
    try:
        max_length = context_length(opened.backbone.config)
    except ModelError:
        max_length = _DEFAULT_MAX_LENGTH
    tokenizer = opened.task.tokenizer
    spans = [
        span for text in texts for span in rolling_spans(text, tokenizer, max_length=max_length)
    ]
    longest = max(len(span.token_ids) for span in spans)
    runner = open_scoring_runner(
        opened.backbone, weights_dtype="float32", kv_dtype="auto", max_length=longest
    )
    total = sum(found.value for found in log_likelihoods(spans, runner))
    num_bytes = sum(len(text.encode()) for text in texts)
    return {"bits_per_byte": -total / math.log(2) / num_bytes, "num_bytes": num_bytes}


def _changes(found: Mapping[str, Metrics]) -> dict[str, float]:
    """By how many per cent the tuned model's metrics are higher than the base's."""
    base, tuned = found["base"], found["tuned"]
    return {
        name: 100 * (tuned[name] / value - 1)
        for name, value in base.items()
        if isinstance(value, float) and value
    }


def _table(
    models: Mapping[str, str], comparisons: list[dict[str, Any]], *, has_same_tokenizer: bool
) -> str:
    lines = [f"{name}: {path}" for name, path in models.items()]
    if not has_same_tokenizer:
        lines.append(
            "the models have different tokenizers, so that their losses do not compare: bits per byte alone"
        )
    lines.append(f"{'':<24}{'base':>12}{'tuned':>12}{'change':>12}")
    for comparison in comparisons:
        lines.append(comparison["dataset"])
        for name, change in comparison["change_in_percent"].items():
            values = "".join(f"{comparison[model][name]:12,.4f}" for model in models)
            lines.append(f"  {name.replace('_', ' '):<22}{values}{change:+10.1f} %")
    return "\n".join(lines)
