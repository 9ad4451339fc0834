"""`fst demo`: the whole pipeline on this machine; each step is a command that can be run by hand.

    collect_documents -> prepare_dataset -> doctor -> train -> evaluate -> generate -> serve, tensorboard

`doctor` measures the machine: what is trained depends on the tokens that it can see in the time.
Finished steps of an earlier demo are reused, so it can be interrupted and started again at any time. The
commands run as processes; this module imports nothing heavy.
"""

import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from full_stack_transformer.arguments.data import DemoArguments
from full_stack_transformer.document_sources import demo_chat
from full_stack_transformer.document_sources.demo_steps import (
    free_port,
    run,
    run_for_json,
    say,
    start,
    wait_until_it_answers,
)
from full_stack_transformer.errors import MachineError, MissingExtraError, install_command
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME, read_json, versions

_SOURCE = "python_docs"
_PROMPTS = ("This module provides", "Return a new list", "Raise an exception if the file")
# `fst train` writes it when the training is complete.
_SUMMARY_FILE_NAME = "summary.json"
_SECONDS_TO_START = 120.0
_SECONDS_TO_MEASURE = "5"
# Of the minutes, what start, validations and samples leave for learning.
_FRACTION_OF_LEARNING = 0.8
# Tokens that `mini` would see, from which on a larger model is better. In the time of 0.9 M tokens
# of mini (loss 4.4) micro sees 2.2 M (loss 4.14); for 2 M mini reaches 3.90 (docs/benchmarks.md). That of
# `small` is a guess: mini would see the documents ten times.
_MIN_TOKENS = {"mini": 1.5e6, "small": 8e6}
_BATCH_SIZE = 8
_TOKENS_OF_A_SAMPLE = 220
# The documents are few: later epochs would learn them by heart.
_MAX_EPOCHS = 12


@dataclass(frozen=True)
class Choice:
    """What to train here."""

    model_config: str
    num_tokens: float
    """That it will probably see."""

    @classmethod
    def of(cls, rates: dict[str, float], minutes: float) -> "Choice":
        """That for a machine, whose tokens per second are known for each preset."""
        seconds = 60 * minutes * _FRACTION_OF_LEARNING
        name = "micro"
        for larger, num_tokens in _MIN_TOKENS.items():
            if seconds * rates["mini"] >= num_tokens:
                name = larger
        return cls(name, seconds * rates[name])

    @property
    def num_steps(self) -> int:
        """Optimizer steps until then."""
        return max(1, round(self.num_tokens / (_BATCH_SIZE * _TOKENS_OF_A_SAMPLE)))

    def options(self) -> tuple[str, ...]:
        """Of fst train."""
        return (
            *("--model_config", self.model_config, "--batch_size", str(_BATCH_SIZE)),
            *("--num_warmup_steps", str(max(1, min(50, self.num_steps // 10)))),
            *("--val_check_interval", str(max(2, self.num_steps // 3))),
        )


def main(arguments: DemoArguments) -> int:
    """Run all steps, list the files, and serve until Ctrl-C.

    Raises:
        StepFailedError: a command failed.
    """
    # SIGTERM works like Ctrl-C, so that no process is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if arguments.chat:
        return demo_chat.main(arguments)
    started = time.perf_counter()
    ports = (0, 0)
    if arguments.serve:  # check now, not minutes later when they are needed
        ports = (
            free_port(arguments.port, "--port"),
            free_port(arguments.tensorboard_port, "--tensorboard_port"),
        )
    documents = _collect(arguments.root / "documents")
    dataset = _prepare(arguments.root / "datasets", documents)
    experiment = _train(arguments, dataset)
    run("evaluate", str(experiment), str(dataset))
    for prompt in _PROMPTS:
        # Below the default temperature, at which a model this small invents words.
        sampling = ("--max_new_tokens", "80", "--temperature", "0.5", "--seed", "1")
        run("generate", str(experiment), "--prompt", prompt, *sampling)
    minutes, seconds = divmod(time.perf_counter() - started, 60)
    say(f"\nFrom documents to text in {minutes:.0f} min {seconds:.0f} s. The files:\n")
    say(_table(documents, dataset, experiment))
    if not arguments.serve:
        say(f"\nServe the model:  fst serve {experiment}\n")
        return 0
    return _serve(arguments, experiment, *ports)


def _collect(root: Path) -> Path:
    documents = root / _SOURCE
    if (documents / "train.txt").is_file() and (documents / "valid.txt").is_file():
        say(f"\n{documents} exists already\n")
    else:
        run("collect_documents", _SOURCE, "--documents_root", str(root))
    return documents


def _prepare(root: Path, documents: Path) -> Path:
    if not versions(root, _SOURCE):
        run(
            "prepare_dataset",
            *("--documents_train_file", str(documents / "train.txt")),
            *("--documents_valid_file", str(documents / "valid.txt")),
            *("--datasets_root", str(root), "--dataset_name", _SOURCE),
            *("--vocab_size", "4096", "--max_sample_length", "256"),
        )
    dataset = versions(root, _SOURCE)[-1]
    assert (dataset / DESCRIPTION_FILE_NAME).is_file(), "a version is complete or absent"
    return dataset


def _train(arguments: DemoArguments, dataset: Path) -> Path:
    root = arguments.root / "experiments"
    finished = [path for path in versions(root, _SOURCE) if (path / _SUMMARY_FILE_NAME).is_file()]
    if finished and not arguments.fresh:
        say(f"\n{finished[-1]} is trained already (to train again: fst demo --fresh)\n")
        return finished[-1]
    choice = _choose(arguments.minutes)
    run(
        "train",
        *("--dataset_dir", str(dataset)),
        *("--experiments_root", str(root), "--experiment_name", _SOURCE),
        *("--optimizer", "muon", "--learning_rate", "4e-3", *choice.options()),
        *("--max_epochs", str(_MAX_EPOCHS), "--max_minutes", f"{arguments.minutes:g}"),
    )
    return versions(root, _SOURCE)[-1]


def _choose(minutes: float) -> Choice:
    """Measure the machine, and say what is trained and why."""
    report = run_for_json("doctor", "--json", "--seconds", _SECONDS_TO_MEASURE)
    if not report["speed"]:
        raise MissingExtraError(
            f"the demo needs PyTorch, which is not installed; {install_command('all')}"
        )
    if "not_measured" in report["speed"]:
        raise MachineError(f"the demo measures first: {report['speed']['not_measured']}")
    rates = {
        name: rate["tokens_per_second"]
        for name, rate in report["speed"]["training_tokens_per_second"].items()
    }
    choice = Choice.of(rates, minutes)
    found = report["machine"]
    device = next((device["name"] for device in found["devices"]), found["processor"])
    say(
        f"{device}, {found['cores']} cores, precision {report['decisions']['precision']}: the model "
        f"mini trains {rates['mini']:,} tokens/s, micro {rates['micro']:,}, at this moment.\nFor "
        f"{minutes:g} minutes the best choice is {choice.model_config}: about {choice.num_steps:,} steps of "
        f"{_BATCH_SIZE} samples, {choice.num_tokens:,.0f} tokens.\n"
    )
    return choice


def _serve(arguments: DemoArguments, experiment: Path, port: int, tensorboard_port: int) -> int:
    """Start the service and TensorBoard, show their addresses, and wait for Ctrl-C."""
    commands = (
        ("serve", str(experiment), "--port", str(port)),
        (
            "tensorboard",
            str(arguments.root / "experiments"),
            "--port",
            str(tensorboard_port),
        ),
    )
    processes = []
    try:
        for words in commands:
            say(f"\n$ fst {shlex.join(words)}\n")
            processes.append(start(*words))
        url = f"http://127.0.0.1:{port}"
        wait_until_it_answers(f"{url}/health", processes[0])
        tensorboard_url = f"http://127.0.0.1:{tensorboard_port}"
        wait_until_it_answers(tensorboard_url, processes[1])
        say(
            f"\n  API            {url}/v1  (OpenAI-compatible)\n  API docs       {url}/docs\n"
            f"  TensorBoard    {tensorboard_url}\n\n"
            f'  curl {url}/generated_texts/ -d \'{{"seed_text": "This function"}}\'\n\nCtrl-C stops it.\n'
        )
        return processes[0].wait()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _table(documents: Path, dataset: Path, experiment: Path) -> str:
    description = read_json(dataset / DESCRIPTION_FILE_NAME)
    summary = read_json(experiment / _SUMMARY_FILE_NAME)
    num_bytes = sum(path.stat().st_size for path in documents.glob("*.txt"))
    rows = (
        ("documents", documents, f"{num_bytes / 1e6:.1f} MB of text"),
        (
            "dataset",
            dataset,
            f"{description['number_of_train_tokens']:,} tokens in "
            f"{description['number_of_train_samples']:,} samples",
        ),
        ("experiment", experiment, f"{summary['num_steps']:,} steps, curves, checkpoints"),
        ("model", experiment / "model", f"validation loss {summary['best_validation_loss']:.3f}"),
    )
    width = max(len(str(path)) for _, path, _ in rows)
    return "".join(f"  {name:<12}{path!s:<{width}}  {facts}\n" for name, path, facts in rows)
