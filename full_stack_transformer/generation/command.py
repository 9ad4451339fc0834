"""`fst generate`: continue a prompt and print the text while it is made."""

import json
import logging
import secrets
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from full_stack_transformer.arguments.models import GenerateArguments
from full_stack_transformer.errors import InputError, UsageError
from full_stack_transformer.generation.continuation import TextPiece
from full_stack_transformer.generation.interactive import Session
from full_stack_transformer.generation.sampling import SamplingParameters
from full_stack_transformer.generation.text_generator import GenerationOptions, TextGenerator

logger = logging.getLogger(__name__)

_BETWEEN_SEQUENCES = "---\n"


def generate(arguments: GenerateArguments) -> None:
    """Print the prompt and its continuations, token by token.

    Raises:
        InputError: the prompt cannot be read.
        ModelError: there is no model, or its weights cannot be had in that type here.
        RequestError: the prompt does not fit into the context.
    """
    prompt = "" if arguments.interactive else _read_prompt(arguments)
    generator = TextGenerator.open(
        arguments.model, device=arguments.device, weights_dtype=arguments.weights_dtype
    )
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    options = _options(arguments, seed)
    if arguments.interactive:
        Session(generator, options, seed=arguments.seed).run()
        return
    pieces = generator.pieces(prompt, options, num_return_sequences=arguments.num_return_sequences)
    if arguments.log_probabilities is None:
        _print_texts(prompt, pieces, arguments.num_return_sequences)
    else:
        _print_tokens(pieces)
    logger.info("model %s, seed %d", generator.model.name, seed)


def _read_prompt(arguments: GenerateArguments) -> str:
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.prompt_file is not None:
        return _read_file(arguments.prompt_file).rstrip("\n")
    if sys.stdin.isatty():
        raise UsageError(
            "expected --prompt TEXT, --prompt_file FILE, --interactive, or a text on standard input"
        )
    return sys.stdin.read().rstrip("\n")


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--prompt_file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt_file {path} is no UTF-8: {error}") from error


def _options(arguments: GenerateArguments, seed: int) -> GenerationOptions:
    return GenerationOptions(
        max_new_tokens=arguments.max_new_tokens,
        min_new_tokens=arguments.min_new_tokens,
        sampling=SamplingParameters(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            typical_p=arguments.typical_p,
            repetition_penalty=arguments.repetition_penalty,
            presence_penalty=arguments.presence_penalty,
            frequency_penalty=arguments.frequency_penalty,
            logit_bias=arguments.logit_biases(),
        ),
        stop=arguments.stop,
        ignored_words=arguments.ignored_words,
        num_log_probabilities=arguments.log_probabilities,
        seed=seed,
        over_length="clip",
    )


def _print_texts(prompt: str, pieces: Iterable[tuple[int, TextPiece]], num_sequences: int) -> None:
    """The continuations in their order; one that is ahead of its turn waits."""
    waiting = [""] * num_sequences
    is_over = [False] * num_sequences
    shown = 0
    sys.stdout.write(prompt)
    for index, piece in pieces:
        waiting[index] += piece.text
        is_over[index] = piece.finish_reason is not None
        while shown < num_sequences:
            sys.stdout.write(waiting[shown])
            waiting[shown] = ""
            if not is_over[shown]:
                break
            shown += 1
            sys.stdout.write("\n" if shown == num_sequences else f"\n{_BETWEEN_SEQUENCES}{prompt}")
        sys.stdout.flush()


def _print_tokens(pieces: Iterable[tuple[int, TextPiece]]) -> None:
    """A line of JSON for each token."""
    for index, piece in pieces:
        if piece.token is not None:
            line = {"sequence": index, **asdict(piece.token)}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            sys.stdout.flush()
