"""Text in, text out: stop strings, ignored words, streams, chats, scores, embeddings."""

import copy
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from full_stack_transformer.arguments.sampling import (
    SamplingKeywords,
    SamplingParameters,
    as_keywords,
)
from full_stack_transformer.errors import RequestError
from full_stack_transformer.generation.requests import (
    Continuation,
    Conventions,
    IgnoredWords,
    Piece,
)
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.generation.token_requests import TokenEvent
from full_stack_transformer.tokenization.chat import ChatMessage

NEUTRAL = as_keywords(SamplingParameters(max_new_tokens=30, seed=7))
GREEDY: SamplingKeywords = {**NEUTRAL, "temperature": 0}


@pytest.fixture(scope="module")
def generator(model_dir: Path) -> TextGenerator:
    return TextGenerator.open(model_dir, device="cpu")


def test_a_seed_gives_the_same_text_and_sequences_differ(generator: TextGenerator) -> None:
    texts = generator.generate("The reader", num_return_sequences=3, **NEUTRAL)
    assert texts == generator.generate("The reader", num_return_sequences=3, **NEUTRAL)
    assert len(set(texts)) == 3


def test_a_stream_adds_up_to_the_text(generator: TextGenerator) -> None:
    pieces = list(generator.stream("The reader", **NEUTRAL))
    assert len(pieces) > 5
    assert "".join(pieces) == generator.generate("The reader", **NEUTRAL)[0]


def test_a_reader_that_stops_listening_frees_the_slot(generator: TextGenerator) -> None:
    stream = generator.stream("The reader", **NEUTRAL)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert generator._engine.num_running == 0


def test_the_text_ends_before_a_stop_string(generator: TextGenerator) -> None:
    [text] = generator.generate("The reader", **NEUTRAL)
    for start in range(2, len(text) - 3, 3):
        stop = text[start : start + 3]
        given: SamplingKeywords = {**NEUTRAL, "stop": (stop,)}
        assert generator.generate("The reader", **given) == [text[: text.find(stop)]]
        assert "".join(generator.stream("The reader", **given)) == text[: text.find(stop)]


def test_half_a_stop_string_at_the_end_is_text(generator: TextGenerator) -> None:
    tokenizer = generator.model.tokenizer
    ids = tokenizer.encode_prompt("The reader")[1:]
    continuation = Continuation(tokenizer, stop=["reader!"])
    pieces = [continuation.push(TokenEvent(0, token_id, None)) for token_id in ids[:-1]]
    pieces.append(continuation.push(TokenEvent(0, ids[-1], "length")))
    assert "".join(piece.text for piece in pieces) == "The reader"
    assert pieces[-1].finish_reason == "length"


def test_a_long_prompt_is_refused_or_clipped(generator: TextGenerator) -> None:
    prompt = "word " * 30
    num_prompt = len(generator.model.tokenizer.encode_prompt(prompt))
    assert 60 < num_prompt < 128
    with pytest.raises(RequestError, match=f"prompt has {num_prompt} and 100 new ones"):
        generator.generate(prompt, max_new_tokens=100, seed=1)
    assert generator.generate(prompt, max_new_tokens=100, seed=1, clips=True)[0]
    assert generator.generate(prompt, seed=1)[0]  # the default is 128 tokens
    with pytest.raises(RequestError, match="shorten it"):
        generator.generate("word " * 200, seed=1, clips=True)


def test_control_text_in_a_prompt_stays_text(generator: TextGenerator) -> None:
    generator.generate("[DOC_END][PAD]", max_new_tokens=5, temperature=0)
    ids = generator.model.tokenizer.encode_prompt("[DOC_END][PAD]")
    assert len(ids) > 5


# ------------------------------------------------------------------ streams that share an engine


def test_streams_may_be_read_in_turn(model_dir: Path) -> None:
    """Also more streams than slots: whoever reads lets all go on."""
    generator = TextGenerator.open(model_dir, device="cpu", num_slots=2)
    many: list[SamplingKeywords] = [{**NEUTRAL, "seed": seed} for seed in range(5)]
    expected = [generator.generate("The reader", **given)[0] for given in many]
    streams = [generator.stream("The reader", **given) for given in many]
    texts = [""] * 5
    while streams:
        for number, stream in enumerate(streams):
            texts[number] += next(stream, "")
        if all(texts[number] == expected[number] for number in range(5)):
            break
    assert [next(stream, None) for stream in streams] == [None] * 5
    assert generator._engine.num_running == 0
    assert not generator._inboxes


def test_a_generator_on_a_model_that_is_trained_follows_its_weights(
    generator: TextGenerator,
) -> None:
    """As training uses it: made anew, on the backbone itself."""
    backbone = copy.deepcopy(generator.model.backbone)
    model = replace(generator.model, backbone=backbone)
    before = TextGenerator(model, num_slots=1).generate("The reader", **GREEDY)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(-1.5)
    after = TextGenerator(model, num_slots=1).generate("The reader", **GREEDY)
    assert before != after
    assert backbone.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in backbone.parameters())


# ------------------------------------------------------------------ words that must not appear


@pytest.mark.parametrize("num_sequences", [1, 4])
def test_ignored_words_never_appear(generator: TextGenerator, num_sequences: int) -> None:
    """One sequence alone is made with guesses, several without."""
    words = ("e", "th", " ", "é", "🙂")
    given: SamplingKeywords = {
        **NEUTRAL,
        "max_new_tokens": 60,
        "seed": 1,
        "ignored_words": words,
    }
    prompt = "abc abc abc abc abc"
    texts = generator.generate(prompt, num_return_sequences=num_sequences, **given)
    for text in texts:
        assert text
        assert not any(word in text for word in words)
    assert generator.generate(prompt, **given)[0] == texts[0]


def test_ignored_words_never_appear_across_the_borders_of_tokens(generator: TextGenerator) -> None:
    """Every three letters of an ordinary text, which tokens spell in many ways, are forbidden in turn."""
    prompt = "The reader learns"
    [text] = generator.generate(prompt, **NEUTRAL)
    for start in range(0, len(text) - 3, 3):
        word = text[start : start + 3]
        given: SamplingKeywords = {**NEUTRAL, "ignored_words": (word,)}
        other = "".join(generator.stream(prompt, **given))
        assert word not in prompt[-2:] + other
        assert other[:1] == text[:1] or start < 4


def test_a_word_that_begins_in_the_prompt_is_ignored_too(generator: TextGenerator) -> None:
    tokenizer = generator.model.tokenizer
    prompt_ids = tokenizer.encode_prompt("a reader")
    ignored = IgnoredWords(("ders", "", "日本"), prompt_ids, tokenizer)
    [s, n, ate] = [tokenizer.encode_text(text) for text in ("s", "n", "日本")]
    assert ignored.forbid(s)
    assert not ignored.forbid(n)
    assert [ignored.forbid(ate[:length]) for length in (1, len(ate) - 1, len(ate))] == [
        False,
        False,
        True,
    ]
    # A chat's answer does not go on from the question: a control token stands between them.
    after_turn = IgnoredWords(("ders",), [*prompt_ids, tokenizer.end_id], tokenizer)
    assert not after_turn.forbid(s)
    # Control tokens within are not seen by a reader.
    assert after_turn.forbid([*tokenizer.encode_text("der"), tokenizer.pad_id, *s])


def test_words_of_the_prompt_itself_may_stay(generator: TextGenerator) -> None:
    given: SamplingKeywords = {**NEUTRAL, "ignored_words": ("reader",)}
    assert generator.generate("The reader", **given)[0]


# ------------------------------------------------------------------ ends


def test_a_minimum_of_tokens_holds_back_the_end(generator: TextGenerator) -> None:
    end_id = generator.model.tokenizer.end_id
    eager: SamplingKeywords = {**GREEDY, "logit_bias": {end_id: 1000.0}}
    assert generator.generate("The", **eager) == [""]
    patient: SamplingKeywords = {**eager, "min_new_tokens": 7}
    pieces = generator.pieces("The", num_log_probabilities=0, **patient)
    assert sum(len(piece.scored) for _, piece in pieces) == 7


def test_a_token_that_the_template_names_ends_an_answer(model_dir: Path) -> None:
    generator = TextGenerator.open(model_dir, device="cpu")

    def pieces() -> list[Piece]:
        found = generator.pieces("The", is_chat=True, num_log_probabilities=0, **NEUTRAL)
        return [piece for _, piece in found]

    expected = [token.token_id for piece in pieces() for token in piece.scored]
    fifth = expected[5]
    generator._conventions = replace(generator._conventions, answer_end_ids=frozenset({fifth}))
    ended = pieces()
    ids = [token.token_id for piece in ended for token in piece.scored]
    assert ids == expected[: expected.index(fifth)]
    assert ended[-1].finish_reason == "stop"


def test_the_end_tokens_that_the_model_names_end_a_text(generator: TextGenerator) -> None:
    backbone = copy.deepcopy(generator.model.backbone)
    backbone.generation_config.eos_token_id = [40, 41, 100_000]
    model = replace(generator.model, backbone=backbone)
    tokenizer = generator.model.tokenizer
    [request] = Conventions.of(model).requests("The", NEUTRAL, max_length=128)
    ours = {tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id}
    assert request.stop_ids == ours | {40, 41}


def test_nothing_of_a_step_is_kept_after_a_stop_string(generator: TextGenerator) -> None:
    """Several tokens of one step: a guess that was right may lie behind the stop string."""
    tokenizer = generator.model.tokenizer
    given: SamplingKeywords = {**GREEDY, "max_new_tokens": 60}
    prompt = "one two three. one two three. one two"
    [text] = generator.generate(prompt, **given)
    for stop in sorted({text[start : start + 2] for start in range(len(text) - 2)}):
        stopping: SamplingKeywords = {**given, "stop": (stop,)}
        assert generator.generate(prompt, **stopping) == [text[: text.find(stop)]]
    assert tokenizer.after_decoding(text) == text


# ------------------------------------------------------------------ measure


@pytest.mark.parametrize(
    "text", ["The reader learns from 日本語 🙂.", "", "x", "[DOC_END] \ufffd"], ids=range(4)
)
def test_a_score_is_the_sum_of_what_the_model_says(generator: TextGenerator, text: str) -> None:
    exact = TextGenerator(generator.model)
    ids = generator.model.tokenizer.encode_prompt(text)
    with torch.inference_mode():
        logits = generator.model.backbone(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(dim=-1)[torch.arange(len(ids) - 1), ids[1:]]
    scored = exact.score(text, num_alternatives=2)
    assert [token.token_id for token in scored.tokens] == ids[1:]
    assert "".join(token.text for token in scored.tokens) == text
    assert scored.log_likelihood == pytest.approx(float(expected.sum()), abs=1e-3)
    mean = float(expected.mean()) if len(ids) > 1 else 0.0
    assert scored.perplexity == pytest.approx(math.exp(-mean), rel=1e-3)
    for token in scored.tokens:
        assert len(token.alternatives) == 2
        assert token.alternatives[0].log_probability >= token.alternatives[1].log_probability
    assert generator.score(text).log_likelihood == pytest.approx(scored.log_likelihood, rel=0.05)


def test_an_embedding_is_the_mean_of_the_hidden_states(generator: TextGenerator) -> None:
    exact = TextGenerator(generator.model, num_slots=2)
    texts = ["The reader", "", "learns from the documents and 日本語", "The reader"]
    vectors = exact.embed(texts)
    assert vectors.shape == (4, 64)
    assert vectors.dtype == np.float32
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor([generator.model.tokenizer.encode_prompt(text)])
        with torch.inference_mode():
            output = generator.model.backbone(ids, output_hidden_states=True)
        states = output.hidden_states[-1][0]
        expected = states[1:].mean(dim=0) if text else states[0]
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-4)
    assert np.array_equal(vectors[0], vectors[3])
    assert exact.embed([]).shape == (0, 64)
    cosine = np.sum(generator.embed(texts) * vectors, axis=1) / (
        np.linalg.norm(vectors, axis=1) * np.linalg.norm(generator.embed(texts), axis=1)
    )
    assert np.all(cosine > 0.99)


def test_what_does_not_fit_is_neither_scored_nor_embedded(generator: TextGenerator) -> None:
    for refused in (generator.score, lambda text: generator.embed([text])):
        with pytest.raises(RequestError, match="context is 128 tokens"):
            refused("word " * 200)


def test_scoring_and_embedding_wait_for_a_free_slot(model_dir: Path) -> None:
    generator = TextGenerator.open(model_dir, device="cpu", num_slots=1)
    expected = generator.generate("The reader", **NEUTRAL)[0]
    scored, vectors = generator.score("The"), generator.embed(["The"])
    stream = generator.stream("The reader", **NEUTRAL)
    text = next(stream)
    assert generator.score("The") == scored
    assert np.array_equal(generator.embed(["The"]), vectors)
    assert text + "".join(stream) == expected


# ------------------------------------------------------------------ chat


def test_a_chat_without_a_template_ends_where_the_user_would_speak(
    generator: TextGenerator,
) -> None:
    messages = [ChatMessage(role="user", content="What is good?")]
    prompt = "User: What is good?\nAssistant:"
    given: SamplingKeywords = {**NEUTRAL, "max_new_tokens": 40}
    stopping: SamplingKeywords = {**given, "stop": ("\nUser:", "\nSystem:")}
    [text] = generator.generate(prompt, **stopping)
    assert generator.chat(messages, **given) == text.lstrip()
    assert "".join(generator.stream_chat(messages, **given)) == text.lstrip()


def test_a_chat_follows_the_template_of_the_model(
    generator: TextGenerator, model_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "chatting"
    shutil.copytree(model_dir, directory)
    template = (
        "{% for m in messages %}{{ bos_token + m.content + eos_token }}{% endfor %}{{ bos_token }}"
    )
    (directory / "chat_template.jinja").write_text(template)
    chatting = TextGenerator.open(directory, device="cpu")
    tokenizer = chatting.model.tokenizer
    question = tokenizer.encode_text("What is good?")
    ids = [tokenizer.begin_id, *question, tokenizer.end_id, tokenizer.begin_id]
    expected = "".join(chatting.stream(ids, **NEUTRAL))
    messages = [ChatMessage(role="user", content="What is good?")]
    assert chatting.chat(messages, **NEUTRAL) == expected
