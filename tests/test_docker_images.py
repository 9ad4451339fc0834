"""The images, really built and run: `make docker-test`, with Docker or Podman, whichever runs here.

    train (as root, then as 1000) -> serve -> chat -> bot at a fake Bot API -> SIGTERM -> restart -> compose

Prints each command of the engine. `FST_DOCKER` names the engine; `FST_DOCKER_BUILD_ARGS` are more words for
its build, such as a proxy or the pip settings of a company: nothing of one machine is in the files.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import write_documents
from tests.fake_bot_api.process import FakeBotApi

pytestmark = pytest.mark.docker

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("train", "serve", "telegram")
_NETWORK = "fst-docker-test"
_TOKEN = "42:FAKE-token_of-the-only-bot"
_CONFINED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL")
_SAFE = ("--security-opt", "no-new-privileges")


@pytest.fixture(scope="module")
def engine() -> str:
    """docker or podman, whichever can run containers."""
    for name in filter(None, (os.environ.get("FST_DOCKER"), "docker", "podman")):
        if shutil.which(name) and not subprocess.run([name, "ps"], capture_output=True).returncode:
            return name
    pytest.skip("NOT BUILT: the images, for want of a running docker or podman")


class Engine:
    """Runs words of the engine, and shows them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *words: str | Path, timeout: float = 300, shows: bool = True) -> str:
        command = [self.name, *map(str, words)]
        print(f"\n$ {shlex.join(command)}", flush=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        print(done.stdout[-1500:] if shows else "", end="", flush=True)
        return done.stdout.strip()

    def errors(self, *words: str | Path) -> tuple[int, str]:
        """The exit code and standard error of words that may fail."""
        done = subprocess.run([self.name, *map(str, words)], capture_output=True, text=True)
        return done.returncode, done.stderr

    def logs(self, container: str) -> str:
        done = subprocess.run([self.name, "logs", container], capture_output=True, text=True)
        return done.stdout + done.stderr

    def port(self, container: str, inside: int) -> str:
        return f"http://{self('port', container, f'{inside}/tcp').splitlines()[0]}"


@pytest.fixture(scope="module")
def run(engine: str) -> Iterator[Engine]:
    """The engine, with the three images; what it started is removed afterwards."""
    run = Engine(engine)
    more = shlex.split(os.environ.get("FST_DOCKER_BUILD_ARGS", ""))
    if engine == "podman":
        more += ["--format", "docker"]  # with health checks
    for target in TARGETS:
        words = ("-f", "docker/Dockerfile", "--target", target, "-t", f"fst-{target}")
        started = time.monotonic()
        run("build", "--quiet", *more, *words, str(ROOT), timeout=3600)
        print(f"({time.monotonic() - started:.0f} s)")
    run("network", "create", _NETWORK)
    yield run
    for container in ("fst-service", "fst-bot", "fst-api"):
        run.errors("rm", "-f", container)
    run("network", "rm", _NETWORK)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The volume: what a user's directory would be, here anybody's."""
    directory = tmp_path_factory.mktemp("volume")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o777)
    write_documents(directory / "documents.txt", num_documents=200)
    (directory / "documents.txt").chmod(0o644)
    return directory


@pytest.fixture(scope="module")
def model(run: Engine, data: Path) -> Path:
    """A model that root trained."""
    image = ("run", "--rm", *_CONFINED, *_SAFE, "--user", "0:0", "-v", f"{data}:/data", "fst-train")
    # Without capabilities root is nobody special; the volume is open to all.
    run(
        *image,
        *("prepare_dataset", "--documents_train_file", "documents.txt", "--dataset_name", "tiny"),
        *("--validation_fraction", "0.1", "--vocab_size", "300", "--max_sample_length", "512"),
    )
    run(
        *image,
        *("train", "--dataset_dir", "data/datasets/tiny", "--experiment_name", "tiny"),
        *("--model_config", "tiny", "--max_steps", "20", "--num_warmup_steps", "5"),
        timeout=900,
    )
    return data / "data" / "experiments" / "tiny" / "0" / "model"


def test_sizes_user_and_no_compiler(run: Engine) -> None:
    for target in TARGETS:
        (inspected,) = json.loads(run("image", "inspect", f"fst-{target}", shows=False))
        print(f"fst-{target}: {inspected['Size'] / 1e9:.2f} GB")
        assert inspected["Config"]["User"] == "1000:1000"
        assert inspected["Config"]["Entrypoint"] == ["fst"]
        python = ("run", "--rm", "--entrypoint", "python", f"fst-{target}", "-c")
        assert run(*python, "import shutil; print(shutil.which('g++'), shutil.which('gcc'))") == (
            "None None"
        )
        assert run(*python, "import os; print(os.getuid(), os.getgid())") == "1000 1000"
    packages = run(*python, "import importlib.util as u; print(u.find_spec('torch'))")
    assert packages == "None", "the bot's image needs no torch"


def test_a_read_only_root_holds(run: Engine) -> None:
    command = ("run", "--rm", *_CONFINED, "--entrypoint", "python", "fst-serve", "-c")
    code, errors = run.errors(*command, "open('/opt/fst/a', 'w')")
    assert code == 1
    assert "Read-only file system" in errors or "Permission denied" in errors
    assert run(*command, "import tempfile; print(tempfile.gettempdir())") == "/tmp"


def test_what_one_user_trained_another_one_resumes_and_reads(
    run: Engine, data: Path, model: Path
) -> None:
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in sorted(model.iterdir())}
    print(modes)
    assert set(modes.values()) == {"0o644"}
    image = ("run", "--rm", *_CONFINED, *_SAFE, "-v", f"{data}:/data:ro", "fst-train")
    assert '"perplexity"' in run(
        *image, "evaluate", "data/experiments/tiny/0", "data/datasets/tiny"
    )
    text = run(
        *image, "generate", "data/experiments/tiny/0", "--prompt", "The reader", "--seed", "1"
    )
    assert text.startswith("The reader")


@contextmanager
def _service(run: Engine, model: Path) -> Iterator[str]:
    run(
        *("run", "-d", "--name", "fst-service", "--init", *_CONFINED, *_SAFE),
        *("--network", _NETWORK, "--network-alias", "service", "-p", "127.0.0.1::9228"),
        *("-v", f"{model}:/data/model:ro", "fst-serve", "serve", "/data/model"),
        *("--host", "0.0.0.0", "--allowed_hosts", "service"),
    )
    url = run.port("fst-service", 9228)
    try:
        _wait(lambda: "serving " in run.logs("fst-service"))
        yield url
    finally:
        run("rm", "-f", "fst-service")


def _wait(is_true: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_the_service_is_healthy_answers_by_the_decoder_and_drains(run: Engine, model: Path) -> None:
    with _service(run, model) as url:
        log = run.logs("fst-service")
        print(log)
        assert re.search(r"C\+\+|native|decoder", log), log
        health = run("image", "inspect", "fst-serve", "--format", "{{json .Config.Healthcheck}}")
        test = json.loads(health)["Test"]
        assert test[:2] == ["CMD", "python"]
        run("exec", "fst-service", *test[1:])
        if run.name == "podman":
            run("healthcheck", "run", "fst-service")
        else:
            _wait(lambda: "(healthy)" in run("ps", "--filter", "name=fst-service"))
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        answer = httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=60)
        print(answer.text)
        assert answer.json()["choices"][0]["message"]["role"] == "assistant"
        body = {"prompt": "x", "max_tokens": 500, "n": 8, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            stopping = threading.Thread(target=run, args=("stop", "-t", "30", "fst-service"))
            stopping.start()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        print("the stream ended with [DONE]")
        stopping.join()
        assert run("inspect", "fst-service", "--format", "{{.State.ExitCode}}") == "0"


def test_the_bot_answers_and_a_restart_keeps_its_database(
    run: Engine, model: Path, data: Path
) -> None:
    token = data / "token"
    token.write_text(_TOKEN)
    token.chmod(0o644)
    (data / "bot").mkdir(mode=0o777, exist_ok=True)
    (data / "bot").chmod(0o777)
    run(
        *("run", "-d", "--name", "fst-api", "--init", "--network", _NETWORK),
        *(
            "--network-alias",
            "api",
            "-p",
            "127.0.0.1::8081",
            "-v",
            f"{ROOT / 'tests'}:/tmp/it/tests:ro",
        ),
        *("--workdir", "/tmp/it", "--entrypoint", "python", "fst-telegram"),
        *("-m", "tests.fake_bot_api", "--host", "0.0.0.0", "--token", _TOKEN),
    )
    with _service(run, model):
        telegram = FakeBotApi(run.port("fst-api", 8081), _TOKEN)
        run(
            *(
                "run",
                "-d",
                "--name",
                "fst-bot",
                "--init",
                *_CONFINED,
                *_SAFE,
                "--network",
                _NETWORK,
            ),
            *("-v", f"{data / 'bot'}:/data/bot", "-v", f"{token}:/run/secrets/token:ro"),
            *("fst-telegram", "telegram_bot", "--token_file", "/run/secrets/token"),
            *("--service_url", "http://service:9228", "--telegram_api_base", "http://api:8081"),
            *("--database", "/data/bot/bot.sqlite3", "--monitoring_port", "9229"),
        )
        telegram.write(1, "The reader")
        first = telegram.bot_messages(1, at_least=1)
        print(first[-1]["text"])
        _wait(lambda: "answering as" in run.logs("fst-bot"))
        run("stop", "-t", "70", "fst-bot")
        assert run("inspect", "fst-bot", "--format", "{{.State.ExitCode}}") == "0"
        telegram.write(1, "A small model")  # nobody polls
        database = (data / "bot" / "bot.sqlite3").stat()
        assert (database.st_uid, database.st_mode & 0o777) == (1000, 0o600)
        run("start", "fst-bot")
        assert len(telegram.bot_messages(1, at_least=len(first) + 1)) > len(first)
        check = (
            "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9229/health').status)"
        )
        assert run("exec", "fst-bot", "python", "-c", check) == "200"
        telegram.http.close()


def test_compose_starts_service_bot_and_tensorboard(
    run: Engine, model: Path, data: Path, tmp_path: Path
) -> None:
    beside = Path(sys.executable).with_name("podman-compose")
    compose = {
        "docker": ["docker", "compose"],
        "podman": [str(beside) if beside.exists() else "podman-compose"],
    }.get(run.name, [])
    if not compose or not shutil.which(compose[0]):
        pytest.skip("NOT STARTED: compose.yaml, for want of docker compose or podman-compose")
    override = tmp_path / "override.yaml"
    override.write_text(
        "services:\n  bot:\n    command: [telegram_bot, --token_file, /run/secrets/telegram_bot_token, "
        '--service_url, "http://service:9228", --telegram_api_base, "http://fst-api:8081", --database, '
        '/data/bot/telegram_bot.sqlite3, --monitoring_port, "9229"]\n'
        f"networks:\n  default:\n    name: {_NETWORK}\n    external: true\n"
    )
    (data / "compose_bot").mkdir()
    for directory in (data / "compose_bot", data / "data" / "experiments"):  # root made the second
        directory.chmod(0o777)
    variables = {
        "MODEL_DIR": str(model),
        "EXPERIMENTS_ROOT": str(data / "data" / "experiments"),
        "BOT_DIR": str(data / "compose_bot"),
        "TOKEN_FILE": str(data / "token"),
        "DATA_DIR": str(data / "data"),
        "DATASET": "tiny",
        "SERVICE_PORT": "19228",
        "TENSORBOARD_PORT": "16006",
    }
    files = ("-f", str(ROOT / "docker" / "compose.yaml"), "-f", str(override))

    def call(*words: str, timeout: float = 300) -> str:
        print(f"\n$ {shlex.join([*compose, *words])}", flush=True)
        done = subprocess.run(
            [*compose, *files, *words],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    try:
        call("up", "--no-build", "--detach")
        _wait(lambda: _status("http://127.0.0.1:19228/health") == 200)
        _wait(lambda: _status("http://127.0.0.1:16006/") == 200)
        telegram = FakeBotApi(run.port("fst-api", 8081), _TOKEN)
        telegram.write(2, "The corpus")
        assert telegram.bot_messages(2, at_least=1)
        telegram.http.close()
        print(call("--profile", "train", "run", "--rm", "train", *_SHORT_TRAINING)[-1500:])
        assert (data / "data" / "experiments" / "composed" / "0" / "model").is_dir()
    finally:
        call("down")


_SHORT_TRAINING = (
    *("train", "--dataset_dir", "data/datasets/tiny", "--experiment_name", "composed"),
    *("--model_config", "tiny", "--max_steps", "5", "--num_warmup_steps", "1"),
)


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.HTTPError:
        return 0
