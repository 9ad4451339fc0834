"""Two real pretrained models give what transformers and sentence-transformers get from them.

python -m pytest -m real
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import httpx
import numpy as np
import psutil
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from full_stack_transformer.evaluation.log_likelihoods import perplexity
from full_stack_transformer.generation.runners.native.decoder import why_not_native
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.modelling.embedding.encoder import open_sentence_encoder
from full_stack_transformer.modelling.model_directory import open_model
from tests import real_models
from tests.conftest import RunFst
from tests.logged_process import running_service

QUESTION = {"role": "user", "content": "What is the capital of France?"}
# The first example of sentence-transformers' documentation, and its output.
SENTENCES = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
)
PUBLISHED = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
# STS-B's own examples of its scores 5, 4, 2 and 0 (Cer et al. 2017, table 1).
PAIRS = (
    ("The bird is bathing in the sink.", "Birdie is washing itself in the water basin."),
    (
        "Two boys on a couch are playing video games.",
        "Two boys are playing a video game.",
    ),
    (
        "They flew out of the nest in groups.",
        "They flew into the nest together.",
    ),
    (
        "The black dog is running through the snow.",
        "A race car driver is driving his car through the mud.",
    ),
)
# Resident memory of `fst serve` as soon as it is ready, with a fifth to spare: 1,167, 825 and 668 MB. Of them
# Python, torch and transformers take 500. Keys and values are taken later, as texts need them.
MAX_STARTED_BYTES = {"float32": 1_400e6, "bfloat16": 1_000e6, "int8": 1_000e6, "int4": 800e6}


def mean_of_tokens(directory: Path, texts: list[str]) -> torch.Tensor:
    """What the model card computes with transformers alone."""
    tokens = AutoTokenizer.from_pretrained(directory)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(directory)(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].float()
    return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def check_similarities(directory: Path) -> None:
    """Vectors of all-MiniLM-L6-v2 are those of transformers, and have the published cosines."""
    encoder = open_sentence_encoder(directory, device="cpu")
    vectors = encoder.encode(SENTENCES)
    assert vectors @ vectors.T == pytest.approx(np.array(PUBLISHED), abs=1e-4)
    texts = [text for pair in PAIRS for text in pair]
    assert encoder.encode(texts) == pytest.approx(
        mean_of_tokens(directory, texts).numpy(), abs=1e-5
    )
    cosines = (encoder.encode(texts[::2]) * encoder.encode(texts[1::2])).sum(1)
    assert min(cosines) == cosines[-1] < 0.1


def test_minilm_has_the_published_similarities() -> None:
    """In the default run too, once it has been downloaded: 3 seconds."""
    check_similarities(real_models.minilm(may_download=False))


@pytest.mark.real
def test_minilm_serves_the_published_similarities() -> None:
    directory = real_models.minilm()
    check_similarities(directory)
    with running_service(directory) as (url, _):
        answer = httpx.post(f"{url}/similarity", json={"texts": SENTENCES})
        assert answer.status_code == 200, answer.text
        found = answer.json()["similarity"]
        assert np.array(found) == pytest.approx(np.array(PUBLISHED), abs=1e-4)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return real_models.smollm2()


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> tuple[list[int], list[int]]:
    """Prompt and greedy answer of transformers' own generate, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [QUESTION], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    length = prompt["input_ids"].shape[1]
    return output[0, :length].tolist(), output[0, length:].tolist()


@contextmanager
def served(model: Path, weights_dtype: str) -> Iterator[tuple[httpx.Client, int]]:
    """A client of `fst serve`, and the number of its process."""
    with (
        running_service(model, "--weights_dtype", weights_dtype) as (url, process),
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        yield client, process.pid


def answer_to(client: httpx.Client, *messages: dict[str, str], **fields: object) -> httpx.Response:
    """Of a chat, greedily."""
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 40, **fields}
    body["model"] = client.get("/v1/models").json()["data"][0]["id"]
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.real
def test_the_greedy_answer_is_that_of_transformers(
    smollm2: Path, expected: tuple[list[int], list[int]], run_fst: RunFst, tmp_path: Path
) -> None:
    prompt_ids, answer_ids = expected
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.decode(answer_ids, skip_special_tokens=True)
    assert text == "The capital of France is Paris."
    generator = TextGenerator.open(smollm2, device="cpu", weights_dtype="float32")
    pieces = generator.pieces(prompt_ids, max_new_tokens=40, temperature=0, num_log_probabilities=0)
    ids = [scored.token_id for _, piece in pieces for scored in piece.scored]
    assert ids in (answer_ids, answer_ids[:-1])  # the end of the answer is no text
    # The command: as a text, token by token, and in a chat.
    options = ("--temperature", "0", "--weights_dtype", "float32", "--max_new_tokens", "40")
    inputs = tokenizer(QUESTION["content"], return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    theirs = output[inputs["input_ids"].shape[1] :].tolist()
    done = run_fst(
        *("generate", smollm2, "--prompt", QUESTION["content"], "--log_probabilities", "0"),
        *options,
    )
    ids = [json.loads(line)["token_id"] for line in done.stdout.splitlines()]
    assert ids in (theirs, theirs[:-1]), done.stderr
    done = run_fst("generate", smollm2, "--interactive", *options, stdin=QUESTION["content"] + "\n")
    assert text in done.stdout, done.stderr


@pytest.mark.real
def test_the_service_answers_as_transformers(
    smollm2: Path, expected: tuple[list[int], list[int]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    with served(smollm2, "float32") as (client, pid):
        assert psutil.Process(pid).memory_info().rss < MAX_STARTED_BYTES["float32"]
        answer = answer_to(client, QUESTION, logprobs=True).json()["choices"][0]
        tokens = [one["token"] for one in answer["logprobs"]["content"]]
        words = [tokenizer.decode([one]) for one in expected[1]]
        assert tokens == words[: len(tokens)]
        assert words[len(tokens) :] in ([], ["<|im_end|>"])
        assert answer["message"]["content"] == "The capital of France is Paris."
        second = {"role": "user", "content": "And of Germany?"}
        told = answer_to(client, QUESTION, answer["message"], second).json()["choices"][0]
        assert "Berlin" in told["message"]["content"]


@pytest.mark.real
def test_a_text_is_scored_without_a_begin_token(smollm2: Path) -> None:
    generator = TextGenerator.open(smollm2, device="cpu", weights_dtype="float32")
    last = generator.score("Two plus two equals four").tokens[-1]
    assert last.text == " four"
    assert -2.07 < last.log_probability < -2.03
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(smollm2)("Two plus two equals four", return_tensors="pt")
    with torch.inference_mode():
        theirs = model(**ids).logits[0, -2].log_softmax(-1)[ids["input_ids"][0, -1]]
    assert last.log_probability == pytest.approx(float(theirs), abs=1e-3)


@pytest.mark.real
@pytest.mark.parametrize("weights_dtype", ["bfloat16", "int8", "int4"])
def test_rounded_weights_serve_it(smollm2: Path, weights_dtype: str) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    if weights_dtype in ("int8", "int4") and why_not_native(backbone) is not None:
        pytest.skip(f"{weights_dtype} needs the C++ decoder")
    del backbone
    with served(smollm2, weights_dtype) as (client, pid):
        assert psutil.Process(pid).memory_info().rss < MAX_STARTED_BYTES[weights_dtype]
        # Of France it says "The" or "L" with 0.15 and 0.14: there rounding decides.
        question = {"role": "user", "content": "What is the capital of Germany?"}
        answer = answer_to(client, question).json()["choices"][0]["message"]["content"]
        assert "Berlin" in answer


@pytest.mark.real
def test_rounded_weights_predict_a_text_nearly_as_well(smollm2: Path) -> None:
    """Its weights came from 4 bits with a scale and a minimum, which int4 represents."""
    model = open_model(smollm2, device="cpu")
    if why_not_native(model.backbone) is not None:
        pytest.skip("rounded weights need the C++ decoder")
    ids = model.tokenizer.encode_text("\n\n".join(topics.values()))
    samples = [ids[start : start + 512] for start in range(0, 20_480, 512)]
    exact = perplexity(model.backbone, samples, "float32")
    assert perplexity(model.backbone, samples, "int8") == pytest.approx(exact, rel=0.003)
    assert perplexity(model.backbone, samples, "int4") == pytest.approx(exact, rel=0.01)
