"""`fst evaluate`: measure a model on the validation samples of a dataset directory, or on labelled rows."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.datasets.batches import SortedBatches
from full_stack_transformer.datasets.corpus import (
    Corpus,
    DatasetDirectory,
    open_dataset,
)
from full_stack_transformer.errors import ModelError
from full_stack_transformer.evaluation.answers import evaluate_answers
from full_stack_transformer.evaluation.comparison import compare
from full_stack_transformer.evaluation.continued_texts import evaluate_generation
from full_stack_transformer.evaluation.harness import run_harness
from full_stack_transformer.evaluation.labelled_rows import evaluate_rows, holds_rows
from full_stack_transformer.evaluation.log_likelihoods import measure_rounded_weights
from full_stack_transformer.modelling.model_directory import OpenedModel
from full_stack_transformer.modelling.places import find_model
from full_stack_transformer.own_classes import trust_options
from full_stack_transformer.quantization.files import open_rounded
from full_stack_transformer.tasks.catalogue import TASK_OF_KIND
from full_stack_transformer.tasks.opening import (
    open_task,
    row_task_class,
    row_task_class_of,
    task_class,
    task_class_of,
)
from full_stack_transformer.tasks.task import CorpusTask

logger = logging.getLogger(__name__)


def main(arguments: EvaluateArguments) -> None:
    """Print the metrics as JSON.

    Raises:
        ModelError: there is no model, or no task can use its head.
        DatasetError: the dataset was made with another tokenizer than the model's.
        RowError: the rows cannot be read, or do not fit the model's task.
    """
    sys.stdout.write(json.dumps(measured(arguments), indent=2, ensure_ascii=False) + "\n")


def measured(arguments: EvaluateArguments) -> dict[str, Any]:
    """What `evaluate` prints."""
    trust_options(arguments)
    if arguments.harness is not None:
        return run_harness(
            arguments.model,
            arguments.harness,
            base=arguments.base,
            device=arguments.device,
            weights_dtype=arguments.weights_dtype,
            num_slots=arguments.batch_size,
            kv_dtype=arguments.kv_dtype,
        )
    if arguments.conversations:
        return evaluate_answers(arguments)
    if arguments.compare is not None:
        return compare(arguments, _evaluate_generator)
    place = find_model(arguments.model, arguments.base)
    directory = place.directory
    own = task_class_of(directory, place.adapter)
    if issubclass(own, CorpusTask) and not holds_rows(arguments.data):
        return _evaluate_corpus(arguments, own)
    if any((arguments.data / "train").glob("corpus*.npy")):
        raise ModelError(
            f"{directory} is a model for {own.name}, which is measured on labelled rows, and "
            f"{arguments.data} is a dataset directory for language models; type: fst evaluate "
            f"{arguments.model} ROWS.jsonl"
        )
    cls = row_task_class(arguments.task) if arguments.task else row_task_class_of(directory)
    return evaluate_rows(arguments, cls)


def _evaluate_generator(arguments: EvaluateArguments) -> dict[str, Any]:
    """The metrics of a model that continues texts."""
    place = find_model(arguments.model, arguments.base)
    cls = task_class_of(place.directory, place.adapter)
    assert issubclass(cls, CorpusTask)
    return _evaluate_corpus(arguments, cls)


def _evaluate_corpus(arguments: EvaluateArguments, cls: type[CorpusTask]) -> dict[str, Any]:
    """The metrics of a model on the validation samples of a dataset directory."""
    dataset = open_dataset(arguments.data, arguments)
    if cls.generates and dataset.kind not in cls.kinds:
        cls = cast(type[CorpusTask], task_class(TASK_OF_KIND[dataset.kind]))
    opened = open_task(arguments.model, base=arguments.base, cls=cls, device=arguments.device)
    task, backbone = opened.task, opened.backbone
    assert isinstance(task, CorpusTask)
    dataset = _as_asked(dataset, task)
    task.model_path = str(arguments.model)
    task.read_dataset(dataset)
    started = time.perf_counter()
    loss, sums = measure_corpus(task, backbone, dataset.valid, batch_size=arguments.batch_size)
    content = task.evaluation(loss, sums)
    _log(content, sums, time.perf_counter() - started)
    if not task.generates or dataset.kind != "documents":
        return content
    if arguments.weights_dtype != "float32" or arguments.kv_dtype not in ("auto", "float32"):
        rounded = measure_rounded_weights(
            _rounded_before(arguments) or backbone,
            dataset.valid,
            loss,
            arguments.weights_dtype,
            arguments.kv_dtype,
        )
        logger.info(
            "with %s weights, keys and values in %s: perplexity %.2f, %+.3f %%",
            rounded.weights_dtype,
            rounded.kv_dtype,
            rounded.perplexity,
            100 * rounded.relative_perplexity_change,
        )
        content["rounded_weights"] = asdict(rounded)
    if arguments.generation:
        content["generation"] = evaluate_generation(
            OpenedModel("evaluated", backbone, task.tokenizer, opened.description),
            dataset.valid,
            num_texts=arguments.generation,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
        ).as_json()
    return content


def _rounded_before(arguments: EvaluateArguments) -> Backbone | None:
    """The model with the weights that `fst quantize` wrote, where there are such."""
    place = find_model(arguments.model, arguments.base)
    if arguments.model.suffix == ".ckpt" or place.adapter is not None:
        return None
    return open_rounded(place.directory, arguments.weights_dtype)


def _as_asked(dataset: DatasetDirectory, task: CorpusTask) -> DatasetDirectory:
    """The dataset without begin tokens, where the model has never seen one before a text."""
    tokenizer = task.tokenizer
    if not task.generates or tokenizer.prefix_ids or dataset.kind != "documents":
        return dataset
    return replace(dataset, valid=dataset.valid.without_first(tokenizer.begin_id))


@torch.inference_mode()
def measure_corpus(
    task: CorpusTask, backbone: Backbone, corpus: Corpus, *, batch_size: int
) -> tuple[float, dict[str, float]]:
    """The mean loss of all targets, and what the task adds up; neither depends on the batch size.

    Args:
        task: has read the dataset of the corpus.
        backbone: in evaluation mode.
        corpus: samples of token ids.
        batch_size: samples in a batch.
    """
    device = next(backbone.parameters()).device
    plan = SortedBatches(task.samples(corpus), batch_size=batch_size)
    collate = task.collator(corpus, seed=0)
    sums: dict[str, float] = {}
    for position in range(plan.num_batches_per_epoch):
        batch = {key: value.to(device) for key, value in collate(plan.batch(0, position)).items()}
        scores = task.forward(backbone, batch)
        for name, value in task.validation_sums(scores, batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums["loss"] / max(1, sums["targets"]), sums


def _log(content: Mapping[str, Any], sums: Mapping[str, float], seconds: float) -> None:
    metrics = ", ".join(
        f"{name.replace('_', ' ')} {value:.4f}"
        for name, value in content.items()
        if isinstance(value, float)
    )
    logger.info("measured %s tokens in %.1f s: %s", f"{int(sums['targets']):,}", seconds, metrics)
