"""OpenAI's routes, asked by OpenAI's own client."""

import base64
import json
import re
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from full_stack_transformer.generation.text_generator import TextGenerator

MODEL = "tiny-model"
MESSAGES: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello?"}]


def _complete(client: openai.OpenAI, **options: Any) -> Any:
    defaults: dict[str, Any] = {"model": MODEL, "prompt": "The", "max_tokens": 8}
    return client.completions.create(**defaults | options)


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model of this name"):
        client.models.retrieve("gpt-7")
    with pytest.raises(openai.NotFoundError, match="there are: tiny-model"):
        _complete(client, model="gpt-7")


def test_a_prompt_of_ids_is_taken_as_it_is(client: openai.OpenAI, generator: TextGenerator) -> None:
    ids = generator.model.tokenizer.encode_prompt("The reader")
    as_text = _complete(client, prompt="The reader", seed=3).choices[0].text
    assert _complete(client, prompt=ids, seed=3).choices[0].text == as_text
    with pytest.raises(openai.BadRequestError, match="token ids must be between"):
        _complete(client, prompt=[1, 99_999])


def test_several_prompts_have_their_choices_in_order(client: openai.OpenAI) -> None:
    alone = [
        [choice.text for choice in _complete(client, prompt=prompt, seed=1, n=2).choices]
        for prompt in ("The", "A small")
    ]
    together = _complete(client, prompt=["The", "A small"], seed=1, n=2)
    assert [choice.text for choice in together.choices] == [*alone[0], *alone[1]]
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]


def test_the_best_of_several_are_the_likeliest(client: openai.OpenAI) -> None:
    neutral: Any = {"temperature": 1, "top_p": 1, "extra_body": {"repetition_penalty": 1.0}}
    every = _complete(client, seed=1, n=6, logprobs=0, **neutral).choices
    means = {choice.text: float(np.mean(choice.logprobs.token_logprobs)) for choice in every}
    best = _complete(client, seed=1, n=2, best_of=6, **neutral).choices
    assert [choice.text for choice in best] == sorted(means, key=means.__getitem__)[:-3:-1]
    with pytest.raises(openai.BadRequestError, match="best_of"):
        _complete(client, n=3, best_of=2)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_log_probabilities_of_new_tokens(client: openai.OpenAI, streams: bool) -> None:
    answer = _complete(client, seed=2, logprobs=3, temperature=0, stream=streams)
    choices = [chunk.choices[0] for chunk in answer] if streams else [answer.choices[0]]
    text = "".join(choice.text for choice in choices)
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    best = [top for choice in choices for top in choice.logprobs.top_logprobs]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert len(tokens) == len(values) == len(best) == 8
    # Without temperature each token is the likeliest, bit for bit, as lm-evaluation-harness compares them.
    assert [max(top.values()) for top in best] == values
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(text)


def test_a_text_is_scored_without_new_tokens(
    client: openai.OpenAI, generator: TextGenerator
) -> None:
    """What lm-evaluation-harness does: echo, no new token, log-probabilities of a prompt of ids."""
    ids = generator.model.tokenizer.encode_prompt("The reader learns from")
    scored = _complete(client, prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert scored.text == "The reader learns from"
    assert scored.logprobs.token_logprobs[0] is None
    assert len(scored.logprobs.token_logprobs) == len(ids)
    # As the harness really asks: one token more, which it leaves out.
    asked = _complete(client, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)
    values = asked.choices[0].logprobs.token_logprobs
    assert values[:-1] == scored.logprobs.token_logprobs
    # The same figures from PyTorch, within what bfloat16 leaves.
    import torch

    backbone = generator.model.backbone
    with torch.no_grad():
        logits = backbone(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    expected = logits[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert np.allclose(values[1:-1], expected, atol=0.15)


def test_a_text_prompt_is_scored_after_its_first_token(client: openai.OpenAI) -> None:
    scored = _complete(client, prompt="The reader", max_tokens=0, echo=True, logprobs=0).choices[0]
    assert "".join(scored.logprobs.tokens) == "The reader"
    values = scored.logprobs.token_logprobs
    assert (values[0], scored.logprobs.top_logprobs[0]) == (None, None)
    assert None not in values[1:]
    assert scored.logprobs.text_offset[0] == 0


def test_a_stop_text_ends_the_answer_also_of_its_log_probabilities(client: openai.OpenAI) -> None:
    plain = _complete(client, seed=1, max_tokens=20).choices[0].text
    stopped = _complete(client, seed=1, max_tokens=20, stop=[plain[7:9]], logprobs=0).choices[0]
    assert stopped.text == plain[: plain.find(plain[7:9])]
    assert stopped.finish_reason == "stop"
    assert all(offset < len(stopped.text) for offset in stopped.logprobs.text_offset)


def test_biases_and_penalties_change_the_choice(
    client: openai.OpenAI, generator: TextGenerator
) -> None:
    [token] = generator.model.tokenizer.encode_text("z")
    biased = _complete(client, logit_bias={str(token): 100}, temperature=0)
    assert biased.choices[0].text == "z" * 8
    varied = _complete(
        client, logit_bias={str(token): 20}, temperature=0, frequency_penalty=2, max_tokens=40
    )
    assert varied.choices[0].text != "z" * 40


def test_our_own_fields_come_as_extra_body(client: openai.OpenAI, generator: TextGenerator) -> None:
    extra = {"top_k": 3, "min_p": 0.01, "typical_p": 0.99, "repetition_penalty": 1.2}
    answer = _complete(client, seed=1, extra_body=extra | {"ignored_words": ["e"], "min_tokens": 8})
    assert "e" not in answer.choices[0].text
    assert answer.usage.completion_tokens == 8
    likeliest = _complete(client, seed=1, extra_body={"top_k": 1})
    assert likeliest.choices[0].text == _complete(client, temperature=0).choices[0].text


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: openai.OpenAI) -> None:
    chunks = list(
        _complete(client, seed=1, stream=True, stream_options={"include_usage": True}, n=2)
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 16
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_model_takes_its_turn_in_a_chat(
    client: openai.OpenAI, generator: TextGenerator
) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_completion_tokens=12,
        seed=4,
        logprobs=True,
        top_logprobs=2,
    )
    [choice] = answer.choices
    stop = ("\nUser:", "\nSystem:")
    prompt = "System: Be short.\nUser: Hello?\nAssistant:"
    [text] = generator.generate(prompt, max_new_tokens=12, seed=4, stop=stop)
    assert choice.message.content == text.lstrip()
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 12
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=12, seed=4, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_only_an_answer_can_be_continued(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hello?"}], "continue_final_message": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "continue_final_message"


def test_messages_may_come_in_parts(client: openai.OpenAI) -> None:
    parts: Any = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}],
        }
    ]
    whole: Any = [{"role": "user", "content": "Hello?"}]
    texts = {
        client.chat.completions.create(model=MODEL, messages=one, max_tokens=8, seed=1)
        .choices[0].message.content
        for one in (parts, whole)
    }  # fmt: skip
    assert len(texts) == 1


def test_texts_become_vectors_of_length_one(http: httpx.Client, client: openai.OpenAI) -> None:
    texts = ["The reader", "The corpus", "The reader"]
    vectors = [one.embedding for one in client.embeddings.create(model=MODEL, input=texts).data]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] == vectors[2] != vectors[1]
    body = {"input": texts[0], "encoding_format": "base64"}
    coded = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(coded), "<f4"), vectors[0])


def test_an_answer_can_be_held_to_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "wild": {"type": "boolean"}},
        "required": ["kind", "wild"],
        "additionalProperties": False,
    }
    for seed in range(3):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=60,
            seed=seed,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "animal", "schema": schema, "strict": True},
            },
        )
        assert answer.choices[0].finish_reason == "stop"
        found = json.loads(answer.choices[0].message.content or "")
        assert found["kind"] in ("cat", "dog")
        assert isinstance(found["wild"], bool)


def test_an_answer_can_be_held_to_an_expression(client: openai.OpenAI) -> None:
    wanted = {"response_format": {"type": "regex", "regex": "[0-9]{4}-[0-9]{2}"}}
    text = _complete(client, max_tokens=20, seed=1, extra_body=wanted).choices[0].text
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"suffix": "x"}, "suffix: not supported"),
        ({"max_tokens": 0}, "only possible with echo|only possible|0 is only"),
        ({"guided_regex": "a"}, "guided_regex: not supported"),
        ({"stream_options": {"include_usage": True}}, "only possible with stream"),
        ({"prompt": []}, "prompt: should be a text"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 500}, "context is 128 tokens"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_impossible_is_said_clearly(
    http: httpx.Client, body: dict[str, Any], message: str
) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x"} | body)
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"]["message"])


# ---------------------------------------------------------------------- log-probabilities


def test_the_token_that_was_taken_is_always_among_the_best(client: openai.OpenAI) -> None:
    for number in (0, 1, 3):
        answer = _complete(client, seed=7, logprobs=number, temperature=3, max_tokens=20)
        logprobs = answer.choices[0].logprobs
        sizes = set()
        for token, value, top in zip(
            logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
        ):
            assert token in top
            assert value in top.values() or len(top) < number + 1
            sizes.add(len(top))
        assert max(sizes) <= number + 1
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, logprobs=True
    )
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.model_dump()["refusal"] is None
    assert "refusal" in chat.choices[0].logprobs.model_fields_set


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_streamed_log_probabilities_are_those_of_the_whole(
    client: openai.OpenAI, kind: str
) -> None:
    """Also where a stop text ends the answer in the middle of a token, or seems to begin again and again."""

    def ask(stop: list[str], stream: bool) -> Any:
        options: Any = {
            "seed": 3,
            "max_tokens": 24,
            "temperature": 1.5,
            "stop": stop,
            "stream": stream,
        }
        if kind == "completion":
            return _complete(client, logprobs=1, **options)
        return client.chat.completions.create(
            model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=1, **options
        )

    def tokens(choice: Any) -> list[Any]:
        if choice.logprobs is None:
            return []
        if kind == "chat":
            return [(one.token, one.logprob) for one in choice.logprobs.content]
        lists = choice.logprobs
        return list(zip(lists.tokens, lists.token_logprobs, lists.text_offset, strict=True))

    def text(choice: Any) -> str:
        return (choice.text if kind == "completion" else _delta(choice).content) or ""

    [plain] = ask([], stream=False).choices
    whole_text = text(plain)
    stops = [
        [],
        [whole_text[5:7]],
        [whole_text[8:11], "nothing"],
        [whole_text[2:4] + "\u2603"],
        [whole_text[9]],
    ]
    for stop in stops:
        [whole] = ask(stop, stream=False).choices
        pieces = [chunk.choices[0] for chunk in ask(stop, stream=True)]
        assert [one for piece in pieces for one in tokens(piece)] == tokens(whole)
        assert len(tokens(whole)) > 0 or not text(whole)
        if kind == "completion":
            shown = "".join(one[0] for one in tokens(whole))
            assert shown.startswith(whole.text) or "\ufffd" in whole.text


def _delta(choice: Any) -> Any:
    return choice.message if hasattr(choice, "message") else choice.delta


def test_offsets_count_broken_characters(client: openai.OpenAI, generator: TextGenerator) -> None:
    tokenizer = generator.model.tokenizer
    byte_ids = [
        tokenizer.backend.token_to_id(name) for name in ("â", "Ģ", "ľ")
    ]  # e2 80 9c, a quotation mark
    [a] = tokenizer.encode_text("a")
    first, second, third = byte_ids
    prompts = {
        (a, first, a, a): [0, 1, 2, 3],  # a, broken, a, a
        (a, first, second, third, a): [0, 1, 1, 1, 2],  # one character of three tokens
        (a, first, first, a): [0, 1, 2, 3],
        (a, first, second, a): [0, 1, 1, 2],
        (first, second, a): [0, 0, 1],
    }
    for ids, offsets in prompts.items():
        answer = _complete(client, prompt=list(ids), max_tokens=0, echo=True, logprobs=0).choices[0]
        assert answer.logprobs.text_offset == offsets, answer.text
        assert len(answer.text) == offsets[-1] + 1


# ---------------------------------------------------------------------- many at once


def test_thousands_of_texts_become_vectors(http: httpx.Client) -> None:
    texts = [f"text {number % 7}" for number in range(2048)]
    answer = http.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"}).json()
    vectors = [one["embedding"] for one in answer["data"]]
    assert len(vectors) == 2048
    assert vectors[:7] == vectors[7:14]
    assert len(set(vectors)) == 7


def test_a_hundred_texts_of_one_prompt(client: openai.OpenAI) -> None:
    answer = _complete(client, n=128, max_tokens=1, seed=1)
    assert [choice.index for choice in answer.choices] == list(range(128))
    assert len(_complete(client, prompt=["a"] * 65, max_tokens=1).choices) == 65
