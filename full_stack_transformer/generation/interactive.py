"""`fst generate --interactive`: lines from a person, answers of a model."""

import contextlib
import logging
import secrets
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace

from full_stack_transformer.errors import RequestError
from full_stack_transformer.generation.chat import ChatMessage
from full_stack_transformer.generation.text_generator import GenerationOptions, TextGenerator

logger = logging.getLogger(__name__)

_HELP = "/reset begins anew, /seed N seeds the next answer, /quit or Ctrl-D ends, Ctrl-C stops an answer"


class Session:
    """A chat where the model has a template for it; else one text that both sides continue.

    Args:
        generator: what answers.
        options: how.
        seed: of the first answer, the next ones follow it; none draws one for each.
    """

    def __init__(
        self, generator: TextGenerator, options: GenerationOptions, *, seed: int | None
    ) -> None:
        self._generator = generator
        self._options = options
        self._seed = seed
        self._is_chat = not generator.template.is_plain
        self._messages: list[ChatMessage] = []
        self._text = ""

    def run(self) -> None:
        """Read and answer until the end of input."""
        kind = "a chat" if self._is_chat else "a text that you and the model continue in turn"
        logger.info("model %s: %s; %s", self._generator.model.name, kind, _HELP)
        with contextlib.suppress(EOFError):
            while True:
                line = _read_line()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self._obey(line)
                elif line or self._text:
                    self._answer(line)

    def _obey(self, line: str) -> None:
        command, _, value = line.partition(" ")
        if command == "/reset":
            self._messages, self._text = [], ""
            logger.info("begun anew")
        elif command == "/seed" and value.strip().isdecimal():
            self._seed = int(value)
        elif command == "/seed":
            logger.info("the next seed is %s", "a random one" if self._seed is None else self._seed)
        else:
            logger.info("%s is no command: %s", command, _HELP)

    def _answer(self, line: str) -> None:
        seed = secrets.randbelow(2**32) if self._seed is None else self._seed
        options = replace(self._options, seed=seed)
        if self._is_chat:
            messages = [*self._messages, ChatMessage("user", line)]
            pieces = self._generator.stream_chat(messages, options)
        else:
            text = self._text + line
            pieces = self._generator.stream(text, options)
        try:
            answer = _print_until_stopped(pieces)
        except RequestError as error:
            logger.info("%s; /reset begins anew", error)
            return
        if self._seed is not None:
            self._seed += 1
        # A stopped answer counts as far as it got.
        if self._is_chat:
            self._messages = [*messages, ChatMessage("assistant", answer)]
        else:
            self._text = text + answer


def _read_line() -> str:
    """The next line.

    Raises:
        EOFError: there is none.
    """
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").rstrip()
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
