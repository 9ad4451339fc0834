"""`fst evaluate`: measure a model on the validation samples of a dataset directory."""

import dataclasses
import json
import logging
import sys
import time

from full_stack_transformer.arguments import EvaluateArguments
from full_stack_transformer.datasets.description import open_dataset
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.evaluation.continued_texts import evaluate_generation
from full_stack_transformer.evaluation.harness import run_harness
from full_stack_transformer.evaluation.perplexity import measure_perplexity
from full_stack_transformer.evaluation.rounded_weights import measure_rounded_weights
from full_stack_transformer.modelling.model_directory import open_model
from full_stack_transformer.tokenization import open_saved_tokenizer

logger = logging.getLogger(__name__)


def evaluate(arguments: EvaluateArguments) -> None:
    """Print the figures as JSON.

    Raises:
        DatasetError: the dataset was made with another tokenizer than the model's.
    """
    if arguments.harness is not None:
        found = run_harness(
            arguments.model,
            arguments.harness,
            device=arguments.device,
            weights_dtype=arguments.weights_dtype,
            num_slots=arguments.batch_size,
        )
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    model = open_model(arguments.model, device=arguments.device)
    dataset = open_dataset(arguments.dataset_dir)
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
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
