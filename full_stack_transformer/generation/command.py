"""`fst generate`: continue a prompt and print the text while it is made."""

import logging
import secrets
import sys
from dataclasses import replace

from full_stack_transformer.arguments import GenerateArguments
from full_stack_transformer.errors import UsageError
from full_stack_transformer.generation.sampling import SamplingParameters
from full_stack_transformer.generation.text_generator import GenerationOptions, TextGenerator

logger = logging.getLogger(__name__)


def generate(arguments: GenerateArguments) -> None:
    """Print the prompt and its continuation, token by token."""
    prompt = arguments.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError("expected --prompt TEXT, or a text on standard input")
        prompt = sys.stdin.read().rstrip("\n")
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    generator = TextGenerator.open(arguments.model, device=arguments.device)
    options = GenerationOptions(
        max_new_tokens=arguments.max_new_tokens,
        sampling=SamplingParameters(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            repetition_penalty=arguments.repetition_penalty,
        ),
        stop=arguments.stop,
        over_length="clip",
    )
    for index in range(arguments.num_return_sequences):
        if index:
            sys.stdout.write("---\n")
        sys.stdout.write(prompt)
        for text in generator.stream(prompt, replace(options, seed=seed + index)):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    logger.info("model %s, seed %d", generator.model.name, seed)
