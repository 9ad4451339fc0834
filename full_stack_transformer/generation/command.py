"""`fst generate`: continue a prompt and print the text while it is generated, or talk to a model."""

import contextlib
import io
import json
import logging
import secrets
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from full_stack_transformer.arguments.models import GenerateArguments
from full_stack_transformer.arguments.sampling import SamplingKeywords
from full_stack_transformer.errors import InputError, RequestError, UsageError
from full_stack_transformer.generation.open_draft import DraftSource
from full_stack_transformer.generation.requests import MAX_RANDOM_SEED, Piece
from full_stack_transformer.generation.text_generator import TextGenerator, as_text_token
from full_stack_transformer.storage import not_utf_8
from full_stack_transformer.tokenization.chat import ChatMessage
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

logger = logging.getLogger(__name__)

_BETWEEN_SEQUENCES = "---\n"
_HELP = "/reset starts over, /seed N seeds the next answer, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def main(arguments: GenerateArguments) -> None:
    """Print the prompt and its continuations, token by token.

    Raises:
        InputError: the prompt cannot be read.
        ModelError: there is no model, or its weights cannot be had in that type here.
        RequestError: the prompt does not fit into the context.
    """
    prompt = "" if arguments.interactive else _read_prompt(arguments)
    generator = TextGenerator.open(
        arguments.model,
        device=arguments.device,
        weights_dtype=arguments.weights_dtype,
        kv_dtype=arguments.kv_dtype,
        draft=_draft_of(arguments),
    )
    given = arguments.sampling()
    if arguments.interactive:
        Session(generator, given).run()
        return
    given["seed"] = seed = _seed_of(given)
    pieces = generator.pieces(
        prompt,
        num_return_sequences=arguments.num_return_sequences,
        num_log_probabilities=arguments.log_probabilities,
        clips=True,
        **given,
    )
    if arguments.log_probabilities is None:
        _print_texts(prompt, pieces, arguments.num_return_sequences)
    else:
        _print_tokens(pieces, generator.model.tokenizer)
    logger.info("model %s, seed %d", generator.model.name, seed)


def _draft_of(arguments: GenerateArguments) -> DraftSource | None:
    if arguments.draft_model is None:
        return None
    return DraftSource(arguments.draft_model, arguments.draft_weights_dtype)


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


class Session:
    """A chat where the model has a template for it; else one text that both sides continue.

    Args:
        generator: what answers.
        given: the sampling parameters; a seed is that of the first answer, the next ones add one each.
    """

    def __init__(self, generator: TextGenerator, given: SamplingKeywords) -> None:
        self._generator = generator
        self._given = given
        self._is_chat = not generator.template.is_plain
        self._messages: list[ChatMessage] = []
        self._text = ""

    def run(self) -> None:
        """Read and answer until the end of input."""
        kind = "a chat" if self._is_chat else "a text that you and the model continue in turn"
        logger.info("model %s: %s; %s", self._generator.model.name, kind, _HELP)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(
                errors="surrogateescape"
            )  # a wrong byte shall not end the session
        with contextlib.suppress(EOFError):
            while True:
                line = _read_line()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self._run_command(line)
                elif line or self._text:
                    self._answer(line)

    def _run_command(self, line: str) -> None:
        command, _, value = line.partition(" ")
        if command == "/reset":
            self._messages, self._text = [], ""
            logger.info("started over")
        elif command == "/seed" and value.strip().isdecimal():
            self._given["seed"] = int(value)
        elif command == "/seed":
            seed = self._given.get("seed")
            logger.info("the next seed is %s", "a random one" if seed is None else seed)
        else:
            logger.info("unknown command %s; %s", command, _HELP)

    def _answer(self, line: str) -> None:
        messages: list[ChatMessage] = [*self._messages, {"role": "user", "content": line}]
        text = self._text + line
        if self._is_chat:
            pieces = self._generator.stream_chat(messages, clips=True, **self._given)
        else:
            pieces = self._generator.stream(text, clips=True, **self._given)
        try:
            answer = _print_until_stopped(pieces)
        except RequestError as error:
            logger.info("%s; /reset starts over", error)
            return
        if (seed := self._given.get("seed")) is not None:
            self._given["seed"] = seed + 1
        # A stopped answer counts as far as it got.
        if self._is_chat:
            self._messages = [*messages, {"role": "assistant", "content": answer}]
        else:
            self._text = text + answer


def _read_line() -> str:
    """The next line.

    Raises:
        EOFError: the input has ended.
    """
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").rstrip()
            problem = not_utf_8(line)
            if problem is None:
                return line
            logger.info("this line is not UTF-8 (%s) and was passed over", problem)
        except KeyboardInterrupt:
            sys.stdout.write("\n")  # the line is given up, as in a shell


def _print_until_stopped(pieces: Iterator[str]) -> str:
    """Print the pieces up to their end or Ctrl-C; what was printed."""
    answer = ""
    with _interrupts() as interrupts:
        for piece in pieces:
            answer += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
            if interrupts:
                break
    sys.stdout.write("\n")
    return answer


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to, instead of an exception in the middle of a step of the engine."""
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
