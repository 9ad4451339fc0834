"""`fst generate`: prompts from everywhere, every option reaches the engine, a session of lines."""

import dataclasses
import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.arguments.models import GenerateArguments
from full_stack_transformer.arguments.sampling import SamplingKeywords
from full_stack_transformer.errors import InputError, MachineError, UsageError
from full_stack_transformer.generation import command
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.generation.token_requests import TokenRequest
from full_stack_transformer.tokenization.chat import ChatMessage
from tests.conftest import RunFst

PROMPT = "The reader"


@pytest.fixture(scope="module")
def exact(model_dir: Path) -> TextGenerator:
    return TextGenerator.open(model_dir, device="cpu", weights_dtype="float32")


def _arguments(model_dir: Path, **options: Any) -> GenerateArguments:
    given = {
        "max_new_tokens": 12,
        "seed": 5,
        "temperature": 2.0,
        "device": "cpu",
        "weights_dtype": "float32",
        **options,
    }
    return GenerateArguments(model_dir, **given)


def _printed(capsys: pytest.CaptureFixture[str], arguments: GenerateArguments) -> str:
    command.main(arguments)
    return capsys.readouterr().out


# ------------------------------------------------------------------ one prompt


def test_the_command_prints_prompt_and_continuations(run_fst: RunFst, model_dir: Path) -> None:
    words = ("generate", model_dir, "--max_new_tokens", "12", "--seed", "5", "--temperature", "2")
    done = run_fst(*words, "--prompt", PROMPT, "--num_return_sequences", "2", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.removesuffix("\n").split("\n---\n")
    assert first.startswith(PROMPT)
    assert first != second
    assert "seed 5" in done.stderr


def test_a_prompt_comes_from_the_option_a_file_or_standard_input(
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = _printed(capsys, _arguments(model_dir, prompt=PROMPT))
    file = tmp_path / "prompt.txt"
    file.write_text(f"{PROMPT}\n", encoding="utf-8")
    assert _printed(capsys, _arguments(model_dir, prompt_file=file)) == expected
    with file.open() as opened:
        monkeypatch.setattr("sys.stdin", opened)
        assert _printed(capsys, _arguments(model_dir)) == expected


def test_sequences_made_at_once_are_printed_in_order(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [
        _printed(capsys, _arguments(model_dir, prompt=PROMPT, seed=seed, max_new_tokens=30))
        for seed in range(5, 15)
    ]
    together = _arguments(model_dir, prompt=PROMPT, num_return_sequences=10, max_new_tokens=30)
    assert _printed(capsys, together) == "---\n".join(alone)


def test_every_option_reaches_the_engine(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TokenRequest] = []

    def start(self: TextGenerator, request: TokenRequest) -> int:
        seen.append(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "_start", start)
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.8,
        "min_p": 0.02,
        "typical_p": 0.9,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.6,
    }
    bias = {"logit_bias": ("11=-100", "12=2.5")}
    others = {"min_new_tokens": 3, "stop": ("a", "b"), "ignored_words": ("c",), "seed": 9}
    with pytest.raises(KeyboardInterrupt):
        _printed(capsys, _arguments(model_dir, prompt=PROMPT, **given, **bias, **others))
    [request] = seen
    others |= {"max_new_tokens": 12, "logit_bias": {11: -100.0, 12: 2.5}}
    assert dataclasses.asdict(request.sampling) == {**given, **others}


def test_log_probabilities_are_lines_of_json(
    model_dir: Path, exact: TextGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(
        model_dir, prompt=PROMPT, log_probabilities=3, num_return_sequences=2, max_new_tokens=9
    )
    lines = [json.loads(line) for line in _printed(capsys, arguments).splitlines()]
    texts = ["", ""]
    for line in lines:
        texts[line["sequence"]] += line["text"]
        values = [one["log_probability"] for one in line["alternatives"]]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert line["log_probability"] <= values[0]
    given = arguments.sampling()
    assert texts == exact.generate(PROMPT, num_return_sequences=2, **given)


def test_a_prompt_is_a_question_where_the_model_has_a_template(
    chatting_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = TextGenerator.open(chatting_dir, device="cpu", weights_dtype="float32")
    asked = _arguments(chatting_dir, prompt=PROMPT, system="Be brief.", num_return_sequences=2)
    messages: list[ChatMessage] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PROMPT},
    ]
    answers = []
    for seed in (5, 6):
        given: SamplingKeywords = {**asked.sampling(), "seed": seed}
        answers.append(generator.chat(messages, clips=True, **given))
    assert _printed(capsys, asked) == f"{answers[0]}\n---\n{answers[1]}\n"
    raw = _printed(capsys, _arguments(chatting_dir, prompt=PROMPT, raw=True))
    [continued] = generator.generate(PROMPT, clips=True, **asked.sampling())
    assert raw == f"{PROMPT}{continued}\n"


def test_a_system_prompt_needs_a_template(model_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"--system: .* has no chat template"):
        command.main(_arguments(model_dir, prompt=PROMPT, system="Be brief."))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": ("11",)}, "--logit_bias must be ID=VALUE"),
        ({"logit_bias": ("a=1",)}, "--logit_bias must be ID=VALUE"),
        ({"logit_bias": ("11=nan",)}, "--logit_bias must be between -100 and 100"),
        ({"min_p": 2.0}, "--min_p must be a number from 0 to 1"),
        ({"typical_p": 0.0}, "--typical_p"),
        ({"presence_penalty": 200.0}, "--presence_penalty"),
        ({"min_new_tokens": 13}, "--min_new_tokens 13 is above --max_new_tokens 12"),
        ({"draft_weights_dtype": "int8"}, "--draft_weights_dtype is for --draft_model"),
        ({"log_probabilities": -1}, "--log_probabilities must be at least 0"),
        ({"prompt": "a", "prompt_file": Path("b")}, "--prompt or --prompt_file"),
        ({"system": "a", "raw": True}, "--system is for a chat; omit --raw"),
        ({"interactive": True, "prompt": "a"}, "omit --prompt"),
        ({"interactive": True, "num_return_sequences": 2}, "omit --num_return_sequences"),
        ({"interactive": True, "log_probabilities": 1}, "omit --log_probabilities"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _arguments(Path("model"), **options)


def test_a_prompt_that_cannot_be_read_is_named(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    with pytest.raises(InputError, match=r"--prompt_file .*No such file"):
        command.main(_arguments(model_dir, prompt_file=file))
    file.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"--prompt_file .* is not UTF-8"):
        command.main(_arguments(model_dir, prompt_file=file))


# ------------------------------------------------------------------ a session of lines


def _session(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: GenerateArguments,
    lines: list[str],
) -> list[str]:
    """The lines that are printed when a person types these and then Ctrl-D."""
    typed: Iterator[str] = iter(lines)

    def read(prompt: str = "") -> str:
        try:
            line = next(typed)
        except StopIteration:
            raise EOFError from None
        if line == "Ctrl-C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)
    output = _printed(capsys, arguments)
    return output.splitlines()


@pytest.fixture
def _text_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models write every character that breaks lines; these tests count lines."""
    breaks = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    before = GenerateArguments.sampling

    def sampling(arguments: GenerateArguments) -> SamplingKeywords:
        return {**before(arguments), "ignored_words": tuple(breaks)}

    monkeypatch.setattr(GenerateArguments, "sampling", sampling)


@pytest.mark.usefixtures("_text_of_one_line")
def test_a_session_goes_on_with_one_text(
    model_dir: Path,
    exact: TextGenerator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = _arguments(model_dir, interactive=True)
    lines = ["The reader", " learns", "/reset", "/seed 5", "The reader", "", "/seed", "/what"]
    first, second, again, more = _session(monkeypatch, capsys, arguments, lines)

    def expected(text: str, seed: int) -> str:
        given: SamplingKeywords = {**arguments.sampling(), "seed": seed}
        return "".join(exact.stream(text, clips=True, **given))

    assert first == again == expected("The reader", 5)
    assert second == expected(f"The reader{first} learns", 6)
    assert more == expected(f"The reader{first}", 6)


@pytest.mark.usefixtures("_text_of_one_line")
def test_a_session_is_a_chat_where_the_model_has_a_template(
    chatting_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = _arguments(chatting_dir, interactive=True)
    generator = TextGenerator.open(chatting_dir, device="cpu", weights_dtype="float32")
    messages: list[ChatMessage] = []
    answers = _session(monkeypatch, capsys, arguments, ["hello", "Ctrl-C", "why", "/quit", "x"])
    assert answers[1] == ""  # the line that was given up
    for seed, (line, answer) in enumerate(
        zip(["hello", "why"], [answers[0], *answers[2:]], strict=True), start=5
    ):
        messages.append(ChatMessage(role="user", content=line))
        given: SamplingKeywords = {**arguments.sampling(), "seed": seed}
        pieces = generator.stream_chat(messages, clips=True, **given)
        assert "".join(pieces) == answer
        messages.append(ChatMessage(role="assistant", content=answer))


@pytest.mark.usefixtures("_text_of_one_line")
def test_ctrl_c_stops_an_answer_and_the_session_goes_on(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(model_dir, interactive=True, max_new_tokens=60)
    whole = _session(monkeypatch, capsys, arguments, ["The reader"])[0]
    stream = TextGenerator.stream

    def interrupted(self: TextGenerator, *words: Any, **given: Any) -> Iterator[str]:
        for number, piece in enumerate(stream(self, *words, **given)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(TextGenerator, "stream", interrupted)
    lines = _session(monkeypatch, capsys, arguments, ["The reader", "/reset", "/seed 5", "The"])
    assert 0 < len(lines[0]) < len(whole)
    assert whole.startswith(lines[0])
    assert len(lines) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_text_that_has_become_too_long_is_said(
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        _session(monkeypatch, capsys, _arguments(model_dir, interactive=True), ["word " * 200])
    assert "context is 128 tokens" in caplog.text
    assert "/clear starts over" in caplog.text


def test_a_session_of_piped_lines_ends_with_them(run_fst: RunFst, model_dir: Path) -> None:
    words = ("generate", model_dir, "--interactive", "--max_new_tokens", "3", "--seed", "1")
    done = run_fst(*words, stdin="The reader\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "a text that you and the model continue in turn" in done.stderr


def test_a_seed_gives_the_same_text_whatever_the_processor(
    model_dir: Path, run_fst: RunFst, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"temperature": 1.5, "top_p": 0.98, "max_new_tokens": 100, "seed": 3}
    here = _printed(capsys, _arguments(model_dir, prompt=PROMPT, weights_dtype="int8", **options))
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = run_fst(
        *("generate", model_dir, "--prompt", PROMPT, "--weights_dtype", "int8", *words),
        # The decoder in plain C++, and PyTorch without vector instructions of later processors.
        env={"FST_ISA": "plain", "ATEN_CPU_CAPABILITY": "default"},
    )
    assert "C++ (plain)" in done.stderr
    # Reading another program's output as text makes every kind of line end the same.
    assert done.stdout == here.replace("\r\n", "\n").replace("\r", "\n")


def test_an_instruction_set_that_is_not_there_is_refused(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FST_ISA", "sse9")
    with pytest.raises(MachineError, match="FST_ISA must be one of avx512_bf16"):
        command.main(_arguments(model_dir, prompt=PROMPT))
