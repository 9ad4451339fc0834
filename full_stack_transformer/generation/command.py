"""`fst generate`: answer or continue a prompt, and print the text while it is generated."""

import json
import logging
import secrets
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from full_stack_transformer.arguments.models import GenerateArguments
from full_stack_transformer.arguments.sampling import SamplingKeywords
from full_stack_transformer.errors import InputError, UsageError
from full_stack_transformer.generation.chatting import Session, opened
from full_stack_transformer.generation.requests import MAX_RANDOM_SEED, Piece
from full_stack_transformer.generation.text_generator import TextGenerator, as_text_token
from full_stack_transformer.tokenization.chat import ChatMessage
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

logger = logging.getLogger(__name__)

_BETWEEN_SEQUENCES = "---\n"


def main(arguments: GenerateArguments) -> None:
    """Print the answers to a prompt, or the prompt and its continuations, token by token.

    Raises:
        InputError: the prompt cannot be read.
        ModelError: there is no model, or its weights cannot be had in that type here.
        RequestError: the prompt does not fit into the context, or the chat template refuses it.
    """
    prompt = "" if arguments.interactive else _read_prompt(arguments)
    generator = opened(arguments)
    given = arguments.sampling()
    if arguments.interactive:
        Session(generator, given, system=arguments.system, is_raw=arguments.raw).run()
        return
    given["seed"] = seed = _seed_of(given)
    is_chat = not generator.template.is_plain and not arguments.raw
    pieces = generator.pieces(
        _chat_of(prompt, arguments.system, generator) if is_chat else prompt,
        num_return_sequences=arguments.num_return_sequences,
        num_log_probabilities=arguments.log_probabilities,
        clips=True,
        is_chat=is_chat,
        **given,
    )
    if arguments.log_probabilities is None:
        shown = "" if is_chat else prompt
        _print_texts(shown, pieces, arguments.num_return_sequences)
    else:
        _print_tokens(pieces, generator.model.tokenizer)
    logger.info("model %s, seed %d", generator.model.name, seed)


def _chat_of(prompt: str, system: str | None, generator: TextGenerator) -> Sequence[int]:
    messages: list[ChatMessage] = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return generator.template.encode(messages, generator.model.tokenizer)


def _seed_of(given: SamplingKeywords) -> int:
    seed = given.get("seed")
    return secrets.randbelow(MAX_RANDOM_SEED) if seed is None else seed


def _read_prompt(arguments: GenerateArguments) -> str:
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.prompt_file is not None and str(arguments.prompt_file) != "-":
        return _read_file(arguments.prompt_file).rstrip("\n")
    if sys.stdin is None or (arguments.prompt_file is None and sys.stdin.isatty()):
        raise UsageError(
            "expected --prompt TEXT, --prompt_file FILE, --interactive, or a text on standard input"
        )
    return _decoded(sys.stdin.buffer.read(), "standard input").rstrip("\n")


def _read_file(path: Path) -> str:
    try:
        return _decoded(path.read_bytes(), f"--prompt_file {path}")
    except OSError as error:
        raise InputError(f"--prompt_file {path}: {error.strerror or error}") from error


def _decoded(content: bytes, place: str) -> str:
    """The text of a prompt, with line feeds and without a byte order mark."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        is_utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        byte = f"byte {content[error.start]:#04x} at offset {error.start}"
        raise InputError(
            f"{place} is not UTF-8: {'it is UTF-16' if is_utf_16 else byte}; convert it, for instance with "
            "iconv"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _print_texts(prompt: str, pieces: Iterable[tuple[int, Piece]], num_sequences: int) -> None:
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


def _print_tokens(pieces: Iterable[tuple[int, Piece]], tokenizer: DocumentTokenizer) -> None:
    """A line of JSON for each token."""
    for index, piece in pieces:
        for scored in piece.scored:  # one at most: each event is a piece
            token = as_text_token(scored, piece.decoded, tokenizer)
            line = {"sequence": index, **asdict(token)}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            sys.stdout.flush()
