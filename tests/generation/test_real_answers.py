"""Twenty greedy answers of SmolLM2-135M-Instruct are those of transformers' own generate, token by token.

python -m pytest -m real tests/generation/test_real_answers.py
"""

import json
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from full_stack_transformer.telegram.sending.markdown import markdown_pieces
from tests import real_models
from tests.conftest import RunFst
from tests.fake_bot_api.process import running_fake_bot_api
from tests.logged_process import running_service
from tests.telegram.bot_forks import QUICK, bot_forks
from tests.telegram.bot_process import bot_command
from tests.telegram.watching import finals

pytestmark = pytest.mark.real

QUESTIONS = (
    "What is the capital of France?",
    "How many days are there in a week?",
    "What color is the sky on a clear day?",
    "Name three fruits.",
    "What is 2 + 2?",
    "Write a haiku about rain.",
    "Who wrote Romeo and Juliet?",
    "What does a compiler do?",
    "Translate 'good morning' into French.",
    "Write a Python function that returns the square of a number.",
    "What is the largest planet?",
    "Give me a recipe for pancakes.",
    "What is photosynthesis?",
    "List the seasons of the year.",
    "Why is the sea salty?",
    "What is an operating system?",
    "Tell me a joke.",
    "What is the opposite of hot?",
    "Explain recursion in one sentence.",
    "¿Dónde está Madrid? 🙂",
)
NUM_TOKENS = 40
GREEDY = (
    *("--temperature", "0", "--weights_dtype", "float32"),
    *("--max_new_tokens", str(NUM_TOKENS)),
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return real_models.smollm2()


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> list[list[int]]:
    """The answers of transformers in fp32, without the token that ends one."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**prompt, max_new_tokens=NUM_TOKENS, do_sample=False)
        ids = output[0, prompt["input_ids"].shape[1] :].tolist()
        answers.append(ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids)
    return answers


def test_the_command_answers_as_transformers(
    smollm2: Path, expected: list[list[int]], run_fst: RunFst
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for question, ids in zip(QUESTIONS, expected, strict=True):
        done = run_fst("generate", smollm2, "-p", question, *GREEDY, "--log_probabilities", "0")
        found = [json.loads(line)["token_id"] for line in done.stdout.splitlines()]
        assert found in (ids, [*ids, tokenizer.eos_token_id]), (question, done.stderr)


def test_the_chat_answers_as_transformers(
    smollm2: Path, expected: list[list[int]], run_fst: RunFst
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lines = "".join(f"{question}\n/clear\n" for question in QUESTIONS)
    done = run_fst("chat", smollm2, *GREEDY, stdin=lines)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert done.stdout == "".join(f"{text}\n" for text in texts), done.stderr


def test_the_service_answers_as_transformers(smollm2: Path, expected: list[list[int]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    with (
        running_service(smollm2, "--weights_dtype", "float32") as (url, _),
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        for question, ids in zip(QUESTIONS, expected, strict=True):
            messages = [{"role": "user", "content": question}]
            body = {"messages": messages, "temperature": 0, "max_tokens": NUM_TOKENS}
            answer = client.post("/v1/chat/completions", json={**body, "logprobs": True}).json()
            found = answer["choices"][0]
            tokens = [one["token"] for one in found["logprobs"]["content"]]
            assert tokens[len(ids) :] in ([], [tokenizer.eos_token]), question
            for token, text in zip(tokens, map(tokenizer.decode, ids), strict=False):
                assert token == text or "\ufffd" in text, question  # part of a character
            assert found["message"]["content"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_bot_answers_as_transformers(smollm2: Path, expected: list[list[int]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    options = ("--temperature", "0", "--max_new_tokens", str(NUM_TOKENS))
    with (
        running_service(smollm2, "--weights_dtype", "float32") as (url, _),
        running_fake_bot_api(with_limits=False) as telegram,
        bot_forks() as forks,
    ):
        bot = forks.bot(bot_command(url, telegram.url, *options), telegram.token, QUICK)
        try:
            bot.start()
            for chat_id, question in enumerate(QUESTIONS, start=1):
                telegram.write(chat_id, question)
            for chat_id, ids in enumerate(expected, start=1):
                (answer,) = finals(telegram, chat_id)
                [piece] = markdown_pieces(tokenizer.decode(ids, skip_special_tokens=True))
                assert answer["text"] == piece.text.strip()
        finally:
            bot.kill()
