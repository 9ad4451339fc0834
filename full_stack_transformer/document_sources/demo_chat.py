"""`fst demo --chat`: teach a pretrained model to answer questions, show what that changed, and talk to it.

    collect_model, collect_documents -> prepare_dataset -> train (an adapter)
        -> evaluate: held-out questions and general text, before and after -> serve

As in `demo`, each step is a command that can be run by hand, and finished ones are reused.
"""

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from full_stack_transformer.arguments.data import DemoArguments
from full_stack_transformer.document_sources.demo_steps import (
    free_port,
    run,
    run_for_json,
    say,
    start,
    wait_until_it_answers,
)
from full_stack_transformer.storage import versions
from full_stack_transformer.tasks.catalogue import TASK_OF_KIND

_MODEL = "smollm2"
_TASK = TASK_OF_KIND["conversations"]
_ROWS, _DATASET = f"python_docs_{_TASK}", "python_questions"
_GENERAL = "package_descriptions"
_SUMMARY_FILE_NAME = "summary.json"
_ANSWERS_FILE_NAME = "answers.jsonl"
# Of an adapter, which takes two thirds of the time of training all weights, and forgets less. In these
# minutes compiling would not pay.
_TRAINING = (
    *("--lora_rank", "32", "--learning_rate", "1e-3", "--batch_size", "8"),
    *("--compile", "never", "--num_generated_samples", "0"),
)
_MAX_NEW_TOKENS = "32"
_NUM_SHOWN = 10
_MAX_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class _Measured:
    """A model on the held-out questions and on general text."""

    figures: dict[str, Any]
    answers: list[dict[str, Any]]
    perplexity: float


def main(arguments: DemoArguments) -> int:
    """Run all steps, show both sides, and serve until Ctrl-C.

    Raises:
        StepFailedError: a command failed.
    """
    started = time.perf_counter()
    port = free_port(arguments.port, "--port") if arguments.serve else 0
    root = arguments.root
    model = root / "models" / _MODEL
    if not model.is_dir():
        run("collect_model", _MODEL, "--models_root", str(root / "models"))
    rows = root / "documents" / _ROWS
    if not rows.is_dir():
        place = ("--documents_root", str(root / "documents"))
        run("collect_documents", "python_docs", "--task", _TASK, *place)
    dataset = _prepare(root, model, rows)
    experiment = _train(arguments, model, dataset)
    before, after = (
        _measure(root, name, path, model, rows)
        for name, path in (("before", model), ("after", experiment))
    )
    _show(before, after)
    minutes, seconds = divmod(time.perf_counter() - started, 60)
    say(f"\nAll of this took {minutes:.0f} min {seconds:.0f} s.\n")
    if not arguments.serve:
        say(f"\nTalk to it:  fst chat {experiment}\n")
        return 0
    return _serve(experiment, port)


def _prepare(root: Path, model: Path, rows: Path) -> Path:
    datasets = root / "datasets"
    if not versions(datasets, _DATASET):
        run(
            "prepare_dataset",
            *("--conversations", str(rows / "train.jsonl")),
            *("--documents_valid_file", str(rows / "valid.jsonl")),
            *("--tokenizer_path", str(model)),
            *("--datasets_root", str(datasets), "--dataset_name", _DATASET),
        )
    return versions(datasets, _DATASET)[-1]


def _train(arguments: DemoArguments, model: Path, dataset: Path) -> Path:
    root = arguments.root / "experiments"
    finished = [path for path in versions(root, _DATASET) if (path / _SUMMARY_FILE_NAME).is_file()]
    if finished and not arguments.fresh:
        say(f"\n{finished[-1]} is trained already (to train again: fst demo --chat --fresh)\n")
        return finished[-1]
    run(
        "train",
        *("--model_path", str(model), "--dataset_dir", str(dataset)),
        *("--experiments_root", str(root), "--experiment_name", _DATASET),
        *_TRAINING,
        *("--max_minutes", f"{arguments.minutes:g}"),
    )
    return versions(root, _DATASET)[-1]


def _measure(root: Path, name: str, path: Path, model: Path, rows: Path) -> _Measured:
    """Ask the held-out questions, and predict a text that neither the model nor the training is about."""
    place = root / "answers" / name
    asked = ("--conversations", str(rows / "valid.jsonl"), "--output_dir", str(place))
    figures = run_for_json(
        "evaluate", str(path), *asked, "--max_new_tokens", _MAX_NEW_TOKENS, "--num_resamples", "0"
    )
    lines = (place / _ANSWERS_FILE_NAME).read_text(encoding="utf-8").splitlines()
    general = run_for_json("evaluate", str(path), str(_general_text(root, model)))
    return _Measured(figures, [json.loads(line) for line in lines], general["perplexity"])


def _general_text(root: Path, model: Path) -> Path:
    documents = root / "documents" / _GENERAL
    if not documents.is_dir():
        run("collect_documents", _GENERAL, "--documents_root", str(root / "documents"))
    datasets = root / "datasets"
    if not versions(datasets, _GENERAL):
        run(
            "prepare_dataset",
            *("--documents_train_file", str(documents / "train.txt")),
            *("--documents_valid_file", str(documents / "valid.txt")),
            *("--tokenizer_path", str(model), "--max_sample_length", "512"),
            *("--datasets_root", str(datasets), "--dataset_name", _GENERAL),
        )
    return versions(datasets, _GENERAL)[-1]


def _show(before: _Measured, after: _Measured) -> None:
    say(f"\nAnswers to held-out questions, {_MODEL} before and after:\n")
    pairs = list(zip(before.answers, after.answers, strict=True))
    for index in range(0, len(pairs), max(1, len(pairs) // _NUM_SHOWN)):
        old, new = pairs[index]
        say(
            f"\n  {old['messages'][-2]['content']}\n"
            f"    before  {_shown(old)}\n"
            f"    after   {_shown(new)}{'' if new['is_right'] else '   (wrong)'}\n"
            f"    right   {old['expected']}\n"
        )
    say(f"\n{_table(before, after)}")


def _shown(answer: dict[str, Any]) -> str:
    text = " ".join(answer["messages"][-1]["content"].split())
    if len(text) <= _MAX_SHOWN_CHARACTERS:
        return text if answer["ended"] else f"{text} …"
    return f"{text[:_MAX_SHOWN_CHARACTERS].rstrip()} …"


def _table(before: _Measured, after: _Measured) -> str:
    """Right answers by kind of question, and what else was measured."""

    def row(name: str, number: object, *values: str) -> str:
        return f"  {name:<34}{number:>9}" + "".join(f"{value:>10}" for value in values) + "\n"

    def shares(name: str, key: str) -> str:
        found = [one.figures for one in (before, after)]
        values = (f"{100 * one[key]:.0f} %" for one in found)
        return row(name, found[0]["number_of_answers"], *values)

    lines = [row("right answers, by kind", "questions", "before", "after")]
    for kind, old in before.figures["kinds"].items():
        new = after.figures["kinds"][kind]
        values = (f"{100 * one['exact_match']:.0f} %" for one in (old, new))
        lines.append(row(f"  {kind}", old["number_of_answers"], *values))
    lines += [
        shares("all", "exact_match"),
        shares("with the right answer in them", "contains_expected"),
        shares("that end by themselves", "ended_by_itself"),
        row(
            "perplexity of general text",
            "",
            f"{before.perplexity:.2f}",
            f"{after.perplexity:.2f}",
            f"{100 * (after.perplexity / before.perplexity - 1):+.1f} %",
        ),
    ]
    return "".join(lines)


def _serve(experiment: Path, port: int) -> int:
    """Start the service, show its address, and wait for Ctrl-C."""
    words = ("serve", str(experiment), "--port", str(port))
    say(f"\n$ fst {shlex.join(words)}\n")
    process = start(*words)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_it_answers(f"{url}/health", process)
        say(
            f"\n  chat           {url}\n  API            {url}/v1  (OpenAI-compatible)\n\n"
            f"  or, in another terminal:  fst chat {experiment}\n\nCtrl-C stops it.\n"
        )
        return process.wait()
    finally:
        process.terminate()
        process.wait()
