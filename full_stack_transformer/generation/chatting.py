"""`fst chat`: talk to a model in a terminal, or by lines where there is none.

    a line --+--> /command
             +--> messages --template--> answer, piece by piece --> Screen

A model without a chat template continues one text in turn with the user. Knows nothing of how an answer is
shown.
"""

import contextlib
import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from full_stack_transformer import interruption
from full_stack_transformer.arguments.models import ChatArguments, GenerateArguments
from full_stack_transformer.arguments.sampling import SamplingKeywords
from full_stack_transformer.errors import InputError, RequestError, UsageError
from full_stack_transformer.generation.open_draft import DraftSource
from full_stack_transformer.generation.screen import Screen, read_message
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.tokenization.chat import ChatMessage

logger = logging.getLogger(__name__)

HELP = """\
/system TEXT  set the system prompt, and start over; without TEXT show it, - for none
/again        another answer to your last message
/undo         take back the last message and its answer
/history      show the conversation
/save FILE    save it: Markdown for .md, else a line of JSON with its messages
/load FILE    go on with a conversation of /save
/seed N       seed of the next answer
/clear        start over, also /reset
/quit         end, also Ctrl-D
Ctrl-C stops an answer. A message of several lines stands between two lines of \"\"\"."""


def main(arguments: ChatArguments) -> None:
    """Talk until the end of input.

    Raises:
        ModelError: there is no model, or its weights cannot be had in that type here.
        UsageError: --system, for a model without a chat template.
    """
    generator = opened(arguments)
    Session(
        generator,
        arguments.sampling(),
        system=arguments.system,
        is_raw=arguments.raw,
        markdown=arguments.markdown,
    ).run()


def opened(arguments: ChatArguments | GenerateArguments) -> TextGenerator:
    """The model of a command.

    Raises:
        ModelError: there is none, or its weights cannot be had in that type here.
        UsageError: --system, for a model without a chat template.
    """
    draft = None
    if arguments.draft_model is not None:
        draft = DraftSource(arguments.draft_model, arguments.draft_weights_dtype)
    generator = TextGenerator.open(
        arguments.model,
        base=arguments.base,
        device=arguments.device,
        weights_dtype=arguments.weights_dtype,
        kv_dtype=arguments.kv_dtype,
        draft=draft,
    )
    if arguments.system is not None and generator.template.is_plain:
        raise UsageError(f"--system: {arguments.model} has no chat template; omit it")
    return generator


class Session:
    """A chat where the model has a template for it; else one text that both sides continue.

    Args:
        generator: what answers.
        given: the sampling parameters; a seed is that of the first answer, the next ones add one each.
        system: the system prompt.
        is_raw: continue one text, whatever the model is.
        markdown: show answers as Markdown in a terminal.
    """

    def __init__(
        self,
        generator: TextGenerator,
        given: SamplingKeywords,
        *,
        system: str | None = None,
        is_raw: bool = False,
        markdown: bool = True,
    ) -> None:
        self._generator = generator
        self._given = given
        self._is_chat = not generator.template.is_plain and not is_raw
        self._system = system
        self._messages: list[ChatMessage] = []
        self._text = ""
        self._screen = Screen(markdown=markdown and self._is_chat)

    def run(self) -> None:
        """Read and answer until the end of input."""
        kind = "a chat" if self._is_chat else "a text that you and the model continue in turn"
        name = self._generator.model.name
        logger.info("model %s: %s; /help lists the commands, Ctrl-D ends", name, kind)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(
                errors="surrogateescape"
            )  # a wrong byte shall not end the session
        with contextlib.suppress(EOFError):
            while True:
                line = read_message()
                if line in ("/quit", "/exit", "/bye"):
                    return
                if line.startswith("/"):
                    self._run_command(line)
                elif line or self._text:
                    self._answer(line)

    # ------------------------------------------------------------------ commands

    def _run_command(self, line: str) -> None:
        command, _, value = line.partition(" ")
        value = value.strip()
        commands = {
            **dict.fromkeys(("/clear", "/reset"), self._start_over),
            "/help": lambda _: logger.info(HELP),
            "/seed": self._seed,
            "/history": self._show_history,
        }
        chats = {
            "/system": self._set_system,
            "/again": self._answer_again,
            "/undo": self._undo,
            "/save": self._save,
            "/load": self._load,
        }
        if self._is_chat:
            commands |= chats
        if command in commands:
            try:
                commands[command](value)
            except InputError as error:
                logger.info("%s", error)
        elif command in chats:
            logger.info("%s is for a chat, and this model has no chat template", command)
        else:
            logger.info("unknown command %s; /help lists the commands", command)

    def _start_over(self, value: str = "") -> None:
        self._messages, self._text = [], ""
        logger.info("started over")

    def _seed(self, value: str) -> None:
        if value.isdecimal():
            self._given["seed"] = int(value)
            return
        seed = self._given.get("seed")
        logger.info("the next seed is %s", "a random one" if seed is None else seed)

    def _set_system(self, value: str) -> None:
        if value:
            self._system = None if value == "-" else value
            self._start_over()
        else:
            logger.info("system prompt: %s", self._system or "that of the chat template")

    def _answer_again(self, value: str) -> None:
        if len(self._messages) < 2:
            logger.info("there is no answer yet")
            return
        question = self._messages[-2]["content"]
        before = self._messages
        self._messages = before[:-2]
        if not self._answer(question):
            self._messages = before

    def _undo(self, value: str) -> None:
        if not self._messages:
            logger.info("there is no message yet")
            return
        logger.info("took back: %.70s", self._messages[-2]["content"])
        self._messages = self._messages[:-2]

    def _show_history(self, value: str) -> None:
        self._screen.show_text(_as_markdown(self._all()) if self._is_chat else self._text)

    def _all(self) -> list[ChatMessage]:
        """The conversation, with its system prompt."""
        if self._system is None:
            return list(self._messages)
        return [{"role": "system", "content": self._system}, *self._messages]

    def _save(self, value: str) -> None:
        if not value:
            raise InputError("/save needs the name of a file: /save chat.md")
        path = Path(value).expanduser()
        line = json.dumps({"messages": self._all()}, ensure_ascii=False)
        text = _as_markdown(self._all()) if path.suffix == ".md" else line
        try:
            path.write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}; it was not saved") from error
        logger.info("saved %d messages in %s", len(self._messages), path)

    def _load(self, value: str) -> None:
        if not value:
            raise InputError("/load needs the name of a file of /save: /load chat.jsonl")
        self._system, self._messages = _read_conversation(Path(value).expanduser())
        logger.info("%d messages", len(self._messages))

    # ------------------------------------------------------------------ answers

    def _answer(self, line: str) -> bool:
        """Show the answer to a line, or what continues it; whether there was one."""
        question: ChatMessage = {"role": "user", "content": line}
        text = self._text + line
        if self._is_chat:
            asked = [*self._all(), question]
            pieces = self._generator.stream_chat(asked, clips=True, **self._given)
        else:
            pieces = self._generator.stream(text, clips=True, **self._given)
        try:
            answer = self._show_until_stopped(pieces)
        except RequestError as error:
            logger.info("%s; /clear starts over", error)
            return False
        if (seed := self._given.get("seed")) is not None:
            self._given["seed"] = seed + 1
        # A stopped answer counts as far as it got.
        if self._is_chat:
            self._messages += [question, {"role": "assistant", "content": answer}]
        else:
            self._text = text + answer
        return True

    def _show_until_stopped(self, pieces: Iterator[str]) -> str:
        """Show the pieces up to their end or Ctrl-C; what was shown."""
        answer = ""
        with interruption.collected() as received, self._screen.answer() as show:
            for piece in pieces:
                answer += piece
                show(piece)
                if received:
                    break
        return answer


def _as_markdown(messages: list[ChatMessage]) -> str:
    return "\n\n".join(f"**{one['role'].capitalize()}**\n\n{one['content']}" for one in messages)


def _read_conversation(path: Path) -> tuple[str | None, list[ChatMessage]]:
    """System prompt and messages of a file of /save.

    Raises:
        InputError: it is none.
    """
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
        turns = [(str(one["role"]), str(one["content"])) for one in messages]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no conversation of /save (as JSON, not .md)") from error
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise InputError(f"{path}: user and assistant should speak in turn, and the assistant last")
    read: list[ChatMessage] = []
    for (_, question), (_, answer) in zip(turns[::2], turns[1::2], strict=True):
        read += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return system, read
