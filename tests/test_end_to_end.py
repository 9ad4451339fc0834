"""From documents to the reply of a bot, through the real commands and processes."""

import json
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from full_stack_transformer.arguments.sampling import SamplingKeywords
from full_stack_transformer.generation.text_generator import TextGenerator
from tests.conftest import RunFst, write_documents
from tests.fake_bot_api.process import running_fake_bot_api
from tests.logged_process import LoggedProcess, running_service
from tests.telegram.bot_process import BotProcess, bot_command


@pytest.fixture(scope="module")
def experiment(run_fst: RunFst, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents -> dataset -> experiment, each stage in its own process."""
    root = tmp_path_factory.mktemp("road")
    write_documents(root / "train.txt", num_documents=120)
    write_documents(root / "valid.txt", num_documents=12, first=500)
    prepared = run_fst(
        "prepare_dataset",
        *("--documents_train_file", "train.txt", "--documents_valid_file", "valid.txt"),
        *("--dataset_name", "road", "--vocab_size", "320", "--max_sample_length", "96"),
        cwd=root,
    )
    assert prepared.stdout == "data/datasets/road/0\n", prepared.stderr
    trained = run_fst(
        *("train", "--dataset_dir", "data/datasets/road", "--experiment_name", "road"),
        *("--model_config", "tiny", "--max_epochs", "4", "--learning_rate", "5e-3"),
        *("--num_warmup_steps", "2", "--accelerator", "cpu"),
        cwd=root,
    )
    assert trained.stdout == "data/experiments/road/0\n", trained.stderr
    return root / "data/experiments/road/0"


@pytest.fixture(scope="module")
def url(experiment: Path) -> Iterator[str]:
    with running_service(experiment) as (url, process):
        yield url
        assert process.stop() == 0


def test_the_service_names_the_experiment_and_its_data(url: str, experiment: Path) -> None:
    version = httpx.get(f"{url}/version", timeout=60).json()
    assert version["model"] == "road/0"
    assert version["description"]["experiment"] == "road/0"
    assert version["description"]["dataset"]["dataset_name"] == "road"
    assert version["description"]["step"] > 0


def test_the_openai_client_gets_the_text_of_the_command(
    url: str, experiment: Path, run_fst: RunFst
) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.completions.create(
            model="road/0", prompt="The reader", max_tokens=20, seed=4, temperature=0.5
        )
        pieces = client.completions.create(
            model="road/0", prompt="The reader", max_tokens=20, seed=4, temperature=0.5, stream=True
        )
        streamed = "".join(piece.choices[0].text for piece in pieces)
    printed = run_fst(
        *("generate", experiment, "--prompt", "The reader", "--max_new_tokens", "20"),
        *("--seed", "4", "--temperature", "0.5", "--device", "cpu"),
    )
    assert printed.stdout == f"The reader{answer.choices[0].text}\n"
    assert streamed == answer.choices[0].text


def test_the_bot_replies_with_a_continuation_and_repeats(url: str) -> None:
    with running_fake_bot_api() as telegram:
        bot = BotProcess(bot_command(url, telegram.url), telegram.token)
        try:
            bot.start()
            telegram.write(7, "A small model")
            [first] = telegram.bot_messages(7, at_least=1)
            telegram.press(7, first["message_id"])
            messages = telegram.bot_messages(7, at_least=2)
            assert bot.stop() == 0
        finally:
            bot.kill()
    for message in messages:
        assert message["text"].startswith("A small model")
        assert len(message["text"]) > len("A small model")
        assert {"type": "bold", "offset": 0, "length": 13} in message["entities"]
        [[repeat, *_]] = message["reply_markup"]["inline_keyboard"]
        assert "Repeat" in repeat["text"]


def test_the_library_generates_what_the_service_does(url: str, experiment: Path) -> None:
    """The few lines of the README: open, generate."""
    body = {"seed_text": "The corpus", "generation_max_len": 25, "seed": 11, "temperature": 0.8}
    [text] = httpx.post(f"{url}/generated_texts/", json=body, timeout=60).json()["texts"]
    generator = TextGenerator.open(experiment, device="cpu")
    given: SamplingKeywords = {"max_new_tokens": 25, "seed": 11, "temperature": 0.8}
    assert generator.generate("The corpus", **given) == [text]


# ---------------------------------------------------------------------- one seed, one text

PROMPT, SEED = "The reader", 11
EXPLICIT: SamplingKeywords = {
    "max_new_tokens": 30,
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
}


@pytest.fixture(scope="module")
def exact_url(experiment: Path) -> Iterator[str]:
    """A service that computes as training does."""
    with running_service(experiment, "--weights_dtype", "float32") as (url, process):
        yield url
        assert process.stop() == 0


def _texts_over_http(url: str, given: dict[str, Any]) -> dict[str, str]:
    length: dict[str, Any] = {"max_tokens": given["max_new_tokens"]} if given else {}
    others = {name: value for name, value in given.items() if name != "max_new_tokens"}
    body = {"model": "road/0", "prompt": PROMPT, "seed": SEED, **length, **others}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    sdk: dict[str, Any] = {
        name: others.pop(name) for name in ("temperature", "top_p") if name in others
    }
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        pieces = client.completions.create(
            model="road/0",
            prompt=PROMPT,
            seed=SEED,
            stream=True,
            extra_body=others,
            **length,
            **sdk,
        )
        streamed = "".join(piece.choices[0].text for piece in pieces)
    native: dict[str, Any] = {"seed_text": PROMPT, "seed": SEED, **sdk, **others}
    native |= {"generation_max_len": given["max_new_tokens"]} if given else {}
    texts = httpx.post(f"{url}/generated_texts/", json=native, timeout=60).json()["texts"]
    return {"whole": answer["choices"][0]["text"], "streamed": streamed, "native": texts[0]}


def _text_of_the_bot(url: str, given: dict[str, Any]) -> str:
    with running_fake_bot_api() as telegram:
        bot = BotProcess(bot_command(url, telegram.url), telegram.token)
        try:
            bot.start()
            settings = {"seed": SEED, **given}
            for number, (name, value) in enumerate(settings.items(), start=1):
                name = "length" if name == "max_new_tokens" else name
                telegram.write(7, f"/settings {name} {value}")
                telegram.bot_messages(7, at_least=number)
            telegram.write(7, PROMPT)
            message = telegram.bot_messages(7, at_least=len(settings) + 1)[-1]
            assert bot.stop() == 0
        finally:
            bot.kill()
    text: str = message["text"]
    return text.removeprefix(PROMPT)


@pytest.mark.parametrize("given", [{}, EXPLICIT], ids=["model-decides", "explicit"])
def test_one_seed_gives_one_text_at_every_door(
    given: dict[str, Any], exact_url: str, experiment: Path, run_fst: RunFst
) -> None:
    generator = TextGenerator.open(experiment, device="cpu", weights_dtype="float32")
    [text] = generator.generate(PROMPT, seed=SEED, **given)
    assert len(text) > 10
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    printed = run_fst(
        *("generate", experiment, "--prompt", PROMPT, "--seed", str(SEED), *words),
        *("--device", "cpu", "--weights_dtype", "float32"),
    )
    assert printed.stdout == f"{PROMPT}{text}\n", printed.stderr
    expected = {"whole": text, "streamed": text, "native": text}
    assert _texts_over_http(exact_url, given) == expected
    assert _text_of_the_bot(exact_url, given) == text.rstrip()


def test_samples_of_a_training_are_what_the_model_generates(experiment: Path) -> None:
    generator = TextGenerator.open(experiment, device="cpu", weights_dtype="float32")
    step = generator.model.description["step"]
    lines = (experiment / "generated.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [sample for line in lines if (sample := json.loads(line))["step"] == step]
    assert [sample["seed"] for sample in samples] == [0, 1]
    texts = [sample["text"] for sample in samples]
    assert generator.generate("", seed=0, num_return_sequences=2) == texts


@pytest.mark.parametrize("given", [{}, EXPLICIT], ids=["model-decides", "explicit"])
def test_one_seed_gives_one_answer_in_every_chat(
    given: dict[str, Any], experiment: Path, run_fst: RunFst, tmp_path: Path
) -> None:
    directory = tmp_path / "chatting"
    shutil.copytree(experiment / "model", directory)
    template = "{% for m in messages %}{{ bos_token + m.content + eos_token }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template + "{{ bos_token }}")
    generator = TextGenerator.open(directory, device="cpu", weights_dtype="float32")
    message = {"role": "user", "content": "Hello?"}
    answer = generator.chat([{"role": "user", "content": "Hello?"}], seed=SEED, **given)
    assert len(answer) > 10
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    printed = run_fst(
        *("generate", directory, "--interactive", "--seed", str(SEED), *words),
        *("--device", "cpu", "--weights_dtype", "float32"),
        stdin="Hello?\n",
    )
    assert printed.stdout == f"{answer}\n"
    body = {"messages": [message], "seed": SEED, **given}
    body |= {"max_tokens": body.pop("max_new_tokens")} if given else {}
    with running_service(directory, "--weights_dtype", "float32") as (url, process):
        asked = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert process.stop() == 0
    assert asked["choices"][0]["message"]["content"] == answer


def test_the_demo_walks_the_road_and_serves_when_typed_again(
    run_fst: RunFst, tmp_path: Path
) -> None:
    """The whole demo on real documents with seconds of training; then typed again, until Ctrl-C."""
    words = ["demo", "--root", str(tmp_path / "demo"), "--minutes", "0.05"]
    first = run_fst(*words, "--no-serve", env={"CUDA_VISIBLE_DEVICES": ""})
    assert first.returncode == 0, first.stderr
    commands = [line.split()[2] for line in first.stdout.splitlines() if line.startswith("$ fst")]
    road = ["collect_documents", "prepare_dataset", "doctor", "train", "evaluate", "generate"]
    assert list(dict.fromkeys(commands)) == road
    assert "the best choice is" in first.stdout
    for kind in ("documents", "dataset", "experiment", "model"):
        [line] = [line for line in first.stdout.splitlines() if line.startswith(f"  {kind} ")]
        assert Path(line.split()[1]).is_dir()

    again = LoggedProcess(
        [
            *(sys.executable, "-m", "full_stack_transformer", *words),
            *("--port", "0", "--tensorboard_port", "0"),
        ],
        "Ctrl-C stops it",
    )
    try:
        again.start()
        assert "is trained already" in again.log
        assert "$ fst train" not in again.log
        docs = again.wait_for_log("  API docs").split()[2]
        assert httpx.get(docs, timeout=60).status_code == 200
        board = again.wait_for_log("  TensorBoard").split()[1]
        assert httpx.get(board, timeout=60).status_code == 200
        again.send_signal(signal.SIGTERM)
        assert again.wait() == 130  # as after Ctrl-C
        with pytest.raises(httpx.ConnectError):
            httpx.get(docs)
    finally:
        again.kill()


def test_the_demo_says_at_once_that_a_port_is_in_use(run_fst: RunFst, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_fst("demo", "--root", tmp_path / "demo", "--port", str(port))
    assert done.returncode == 1
    assert f"127.0.0.1:{port}: Address already in use" in done.stderr
    assert not (tmp_path / "demo").exists()
