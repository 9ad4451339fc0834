"""Text in, text out: stop strings, ignored words, streaming, the command."""

from pathlib import Path

import pytest

from full_stack_transformer.errors import RequestError
from full_stack_transformer.generation.engine import TokenEvent
from full_stack_transformer.generation.sampling import SamplingParameters
from full_stack_transformer.generation.text_generator import (
    Continuation,
    GenerationOptions,
    TextGenerator,
)
from tests.conftest import RunFst

OPTIONS = GenerationOptions(max_new_tokens=30, seed=7)


@pytest.fixture(scope="module")
def generator(model_dir: Path) -> TextGenerator:
    return TextGenerator.open(model_dir, device="cpu")


def test_a_seed_gives_the_same_text_and_sequences_differ(generator: TextGenerator) -> None:
    texts = generator.generate("The reader", OPTIONS, num_return_sequences=3)
    assert texts == generator.generate("The reader", OPTIONS, num_return_sequences=3)
    assert len(set(texts)) == 3


def test_a_stream_adds_up_to_the_text(generator: TextGenerator) -> None:
    pieces = list(generator.stream("The reader", OPTIONS))
    assert len(pieces) > 5
    assert "".join(pieces) == generator.generate("The reader", OPTIONS)[0]


def test_a_reader_that_stops_listening_frees_the_slot(generator: TextGenerator) -> None:
    stream = generator.stream("The reader", OPTIONS)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert generator._engine.num_running == 0


def test_the_text_ends_before_a_stop_string(generator: TextGenerator) -> None:
    [text] = generator.generate("The reader", OPTIONS)
    for start in range(2, len(text) - 3):
        stop = text[start : start + 3]
        options = GenerationOptions(max_new_tokens=30, seed=7, stop=(stop,))
        assert generator.generate("The reader", options) == [text[: text.find(stop)]]
        assert "".join(generator.stream("The reader", options)) == text[: text.find(stop)]


def test_half_a_stop_string_at_the_end_is_text(generator: TextGenerator) -> None:
    tokenizer = generator.model.tokenizer
    ids = tokenizer.encode_prompt("The reader")[1:]
    continuation = Continuation(tokenizer, stop=["reader!"])
    pieces = [continuation.push(TokenEvent(0, token_id, None)) for token_id in ids[:-1]]
    pieces.append(continuation.push(TokenEvent(0, ids[-1], "length")))
    assert "".join(piece.text for piece in pieces) == "The reader"
    assert pieces[-1].finish_reason == "length"


def test_ignored_words_never_appear(generator: TextGenerator) -> None:
    options = GenerationOptions(max_new_tokens=60, seed=1, ignored_words=("e", "th", " "))
    for text in generator.generate("The reader", options, num_return_sequences=4):
        assert not any(word in text for word in options.ignored_words)


def test_a_long_prompt_is_refused_or_clipped(generator: TextGenerator) -> None:
    prompt = "word " * 30
    num_prompt = len(generator.model.tokenizer.encode_prompt(prompt))
    assert 60 < num_prompt < 128
    many = GenerationOptions(max_new_tokens=100, seed=1)
    with pytest.raises(RequestError, match=f"prompt has {num_prompt} and 100 new ones"):
        generator.generate(prompt, many)
    clipped = GenerationOptions(max_new_tokens=100, seed=1, over_length="clip")
    assert generator.generate(prompt, clipped)[0]
    with pytest.raises(RequestError, match="shorten it"):
        generator.generate("word " * 200, clipped)


def test_control_text_in_a_prompt_stays_text(generator: TextGenerator) -> None:
    greedy = GenerationOptions(max_new_tokens=5, sampling=SamplingParameters(temperature=0))
    generator.generate("[DOC_END][PAD]", greedy)
    ids = generator.model.tokenizer.encode_prompt("[DOC_END][PAD]")
    assert len(ids) > 5


def test_the_command_prints_prompt_and_continuation(run_fst: RunFst, model_dir: Path) -> None:
    words = (
        "generate",
        model_dir,
        "--max_new_tokens",
        "12",
        "--seed",
        "5",
        "--temperature",
        "2",
        "--device",
        "cpu",
    )
    done = run_fst(*words, "--prompt", "The reader", "--num_return_sequences", "2")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.removesuffix("\n").split("\n---\n")
    assert first.startswith("The reader")
    assert first != second
    assert "seed 5" in done.stderr
    from_stdin = run_fst(*words, stdin="The reader\n")
    assert from_stdin.stdout == f"{first}\n"
