"""`fst evaluate`: measure a model on the validation samples of a dataset directory, or on labelled rows."""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.datasets.description import open_dataset
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.evaluation.continued_texts import evaluate_generation
from full_stack_transformer.evaluation.harness import run_harness
from full_stack_transformer.evaluation.labelled_rows import evaluate_rows
from full_stack_transformer.evaluation.masked import evaluate_masked
from full_stack_transformer.evaluation.perplexity import measure_perplexity
from full_stack_transformer.evaluation.rounded_weights import measure_rounded_weights
from full_stack_transformer.modelling.model_directory import find_model_directory, open_model
from full_stack_transformer.tasks.catalogue import task_name_of
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer

logger = logging.getLogger(__name__)


def evaluate(arguments: EvaluateArguments) -> None:
    """Print the figures as JSON.

    Raises:
        ModelError: there is no model, or it has a head of no task that is known.
        DatasetError: the dataset was made with another tokenizer than the model's.
        RowError: the rows cannot be read, or do not fit the model's task.
    """
    sys.stdout.write(json.dumps(_measured(arguments), indent=2, ensure_ascii=False) + "\n")


def _measured(arguments: EvaluateArguments) -> dict[str, Any]:
    if arguments.harness is not None:
        return run_harness(
            arguments.model,
            arguments.harness,
            device=arguments.device,
            weights_dtype=arguments.weights_dtype,
            num_slots=arguments.batch_size,
        )
    if _holds_rows(arguments.data):
        return evaluate_rows(arguments)
    task = task_name_of(find_model_directory(arguments.model))
    return _MEASURES.get(task, evaluate_rows)(arguments)


def _holds_rows(path: Path) -> bool:
    """Whether it is a file, or a directory with training rows, and no dataset directory."""
    is_split = path.is_dir() and any(
        one.name.split(".")[0] == "train" and one.suffix for one in path.iterdir()
    )
    return path.is_file() or is_split


def _evaluate_language_model(arguments: EvaluateArguments) -> dict[str, Any]:
    model = open_model(arguments.model, device=arguments.device)
    dataset = open_dataset(arguments.data)
    theirs = open_saved_tokenizer(dataset.tokenizer_directory)
    if theirs.backend.get_vocab() != model.tokenizer.backend.get_vocab():
        raise DatasetError(
            f"{dataset.directory} was prepared with another tokenizer ({theirs.vocab_size:,} tokens) than "
            f"that of {arguments.model} ({model.tokenizer.vocab_size:,}); prepare the documents with "
            f"--tokenizer_path {arguments.model}"
        )
    started = time.perf_counter()
    figures = measure_perplexity(
        model.backbone, model.tokenizer, dataset.valid, batch_size=arguments.batch_size
    )
    seconds = time.perf_counter() - started
    logger.info(
        "measured %s tokens in %.1f s: loss %.4f, perplexity %.2f, %.3f bits per byte",
        f"{figures.num_target_tokens:,}",
        seconds,
        figures.loss,
        figures.perplexity,
        figures.bits_per_byte,
    )
    content = dataclasses.asdict(figures)
    if arguments.weights_dtype != "float32":
        rounded = measure_rounded_weights(
            model.backbone, dataset.valid, figures, arguments.weights_dtype
        )
        logger.info(
            "with %s weights: perplexity %.2f, %+.3f %%",
            rounded.weights_dtype,
            rounded.perplexity,
            100 * rounded.relative_perplexity_change,
        )
        content["rounded_weights"] = dataclasses.asdict(rounded)
    if arguments.generation:
        generated = evaluate_generation(
            model,
            dataset.valid,
            num_texts=arguments.generation,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
        )
        content["generation"] = generated.as_json()
    return content


_MEASURES: dict[str, Callable[[EvaluateArguments], dict[str, Any]]] = {
    "causal_lm": _evaluate_language_model,
    "masked_lm": evaluate_masked,
}
