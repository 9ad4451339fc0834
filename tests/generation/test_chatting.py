"""`fst chat`: its commands, and the real program in a terminal of its own."""

import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer import interruption
from full_stack_transformer.arguments.models import ChatArguments
from full_stack_transformer.arguments.sampling import SamplingKeywords
from full_stack_transformer.errors import UsageError
from full_stack_transformer.generation import chatting
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.tokenization.chat import ChatMessage

OPTIONS: dict[str, Any] = {
    "max_new_tokens": 6,
    "seed": 5,
    "temperature": 2.0,
    "device": "cpu",
    "weights_dtype": "float32",
}


@pytest.fixture(scope="module")
def generator(chatting_dir: Path) -> TextGenerator:
    return TextGenerator.open(chatting_dir, device="cpu", weights_dtype="float32")


@pytest.fixture(autouse=True)
def _opened_once(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextGenerator, "open", lambda *_words, **_options: generator)


def _chat(
    monkeypatch: pytest.MonkeyPatch, model: Path, lines: list[str], **options: Any
) -> ChatArguments:
    """Run the command while a person types these lines and then Ctrl-D."""
    typed: Iterator[str] = iter(lines)

    def read(prompt: str = "") -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    arguments = ChatArguments(model, **{**OPTIONS, **options})
    chatting.main(arguments)
    return arguments


def _answer(
    generator: TextGenerator, arguments: ChatArguments, messages: list[ChatMessage], seed: int
) -> str:
    given: SamplingKeywords = {**arguments.sampling(), "seed": seed}
    return generator.chat(messages, clips=True, **given)


def _saved(path: Path) -> list[ChatMessage]:
    messages: list[ChatMessage] = json.loads(path.read_text(encoding="utf-8"))["messages"]
    return messages


def test_a_conversation_is_kept_saved_and_loaded(
    chatting_dir: Path, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, second = tmp_path / "chat.jsonl", tmp_path / "more.jsonl"
    lines = ["/system Be brief.", "hello", '"""', "two", "lines", '"""', f"/save {file}"]
    arguments = _chat(monkeypatch, chatting_dir, lines)
    system, *turns = _saved(file)
    assert system == {"role": "system", "content": "Be brief."}
    assert [turn["content"] for turn in turns[::2]] == ["hello", "two\nlines"]
    for number in (0, 2):
        before = [system, *turns[: number + 1]]
        expected = _answer(generator, arguments, before, seed=5 + number // 2)
        assert turns[number + 1] == {"role": "assistant", "content": expected}
    lines = [f"/load {file}", "/undo", "/seed 6", '"""two', 'lines"""', f"/save {second}"]
    _chat(monkeypatch, chatting_dir, lines)
    assert _saved(second) == [system, *turns]


def test_another_answer_takes_the_place_of_the_last(
    chatting_dir: Path, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jsonl"
    lines = ["/again", "hello", "/again", f"/save {file}", "/clear", "/undo"]
    arguments = _chat(monkeypatch, chatting_dir, lines, system="Be brief.")
    messages = _saved(file)
    assert len(messages) == 3
    assert messages[2]["content"] == _answer(generator, arguments, messages[:2], seed=6)


def test_a_conversation_is_saved_as_markdown(
    chatting_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "chat.md"
    _chat(monkeypatch, chatting_dir, ["hello", f"/save {file}", "/history"])
    text = file.read_text(encoding="utf-8")
    assert text.startswith("**User**\n\nhello\n\n**Assistant**\n\n")
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/what", "unknown command /what; /help lists the commands"),
        ("/help", "/save FILE"),
        ("/system", "system prompt: that of the chat template"),
        ("/save", "/save needs the name of a file"),
        ("/save /nowhere/chat.md", "/nowhere/chat.md: No such file or directory; it was not saved"),
        ("/load /nowhere", "/nowhere: No such file or directory"),
        ("/load /dev/null", "/dev/null is no conversation of /save"),
        ("/undo", "there is no message yet"),
        ("/again", "there is no answer yet"),
        ("/seed", "the next seed is 5"),
    ],
)
def test_commands_say_what_is_wrong(
    chatting_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    line: str,
    message: str,
) -> None:
    with caplog.at_level(logging.INFO):
        _chat(monkeypatch, chatting_dir, [line])
    assert message in caplog.text


def test_a_model_without_a_template_says_what_it_cannot(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    with caplog.at_level(logging.INFO):
        _chat(monkeypatch, model_dir, ["/system Be brief."])
    assert "/system is for a chat, and this model has no chat template" in caplog.text
    with pytest.raises(UsageError, match="has no chat template"):
        _chat(monkeypatch, model_dir, [], system="Be brief.")


class _Terminal:
    """A process that believes to run in a terminal."""

    def __init__(self, *words: str | Path) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "full_stack_transformer", *map(str, words)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, pattern: str, seconds: float = 120) -> str:
        """What is shown up to the pattern, without colours."""
        shown, end = "", time.monotonic() + seconds
        while not re.search(pattern, shown):
            assert time.monotonic() < end, shown
            if select.select([self._master], [], [], 0.2)[0]:
                content = os.read(self._master, 65536).decode(errors="replace")
                shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", content)
        return shown

    def close(self) -> None:
        os.close(self._master)
        self.process.kill()
        self.process.wait()


def test_ctrl_c_in_a_terminal_ends_the_answer_and_ctrl_d_the_program(chatting_dir: Path) -> None:
    # A prompt takes 1 token a letter; the text has room for thousands of steps, but not the context.
    words = ("--min_new_tokens", "100", "--temperature", "1", "--device", "cpu", "--seed", "1")
    terminal = _Terminal("chat", chatting_dir, *words)
    try:
        terminal.read_until("> ")
        terminal.type("hello\r")
        terminal.read_until(r"hello\r?\n.+")
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.read_until("> ")
        # Who watches over Ctrl-C has seen that somebody took it.
        with pytest.raises(subprocess.TimeoutExpired):
            terminal.process.wait(timeout=interruption._SECONDS_OF_NATIVE_CODE + 0.5)
        terminal.type("/help\r")
        terminal.read_until(
            r"/save FILE[\s\S]*\n> "
        )  # else Ctrl-D may come before it is waited for
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
