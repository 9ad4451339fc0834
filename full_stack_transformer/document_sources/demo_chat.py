"""`fst demo --chat`: teach a pretrained model to answer questions, show what that changed, and talk to it.

    collect_model, collect_documents -> prepare_dataset -> train (an adapter, documents replayed)
        -> evaluate --compare: held-out questions, and general text -> serve

As in `demo`, each step is a command that can be run by hand, and finished ones are reused.
"""

import json
import shlex
import time
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
_QUESTIONS, _NAME = f"python_docs_{_TASK}", "python_questions"
# Of many authors, and about neither what is learned nor what is replayed.
_GENERAL_TEXT = "package_descriptions"
_SUMMARY_FILE_NAME = "summary.json"
_SIDES = ("base", "tuned")
_ANSWERS_FILE_NAMES = ("base_answers.jsonl", "answers.jsonl")
_SHARES = {
    "exact_match": "held-out questions answered right",
    "contains_expected": "answers with the right one in them",
    "ended_by_itself": "answers that end by themselves",
}
# Of an adapter, which takes two thirds of the time of training all weights, and forgets less. In these
# minutes compiling would not pay.
_TRAINING = (
    *("--lora_rank", "32", "--learning_rate", "1e-3", "--batch_size", "8"),
    *("--compile", "never", "--num_generated_samples", "0", "--limit_val_batches", "6"),
)
# Part of the learned tokens. Without it the model unlearns to read prose.
_REPLAY = 0.5
_MAX_NEW_TOKENS = "32"
_NUM_SHOWN = 10
_MAX_SHOWN_CHARACTERS = 100


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
    documents = _documents(root, model, "python_docs")
    questions = root / "documents" / _QUESTIONS
    if not questions.is_dir():
        place = ("--documents_root", str(root / "documents"))
        run("collect_documents", "python_docs", "--task", _TASK, *place)
    experiment = _train(arguments, model, _questions(root, model, questions), documents)
    _compare(root, model, experiment, questions)
    minutes, seconds = divmod(time.perf_counter() - started, 60)
    say(f"\nAll of this took {minutes:.0f} min {seconds:.0f} s.\n")
    if not arguments.serve:
        say(f"\nTalk to it:  fst chat {experiment}\n")
        return 0
    return _serve(experiment, port)


def _documents(root: Path, model: Path, source: str) -> Path:
    """The dataset of a source of documents, in the tokens of the model."""
    documents, name = root / "documents" / source, f"{source}_for_{_MODEL}"
    if not documents.is_dir():
        run("collect_documents", source, "--documents_root", str(root / "documents"))
    if not versions(root / "datasets", name):
        run(
            "prepare_dataset",
            *("--documents_train_file", str(documents / "train.txt")),
            *("--documents_valid_file", str(documents / "valid.txt")),
            *("--tokenizer_path", str(model)),
            *("--datasets_root", str(root / "datasets"), "--dataset_name", name),
        )
    return versions(root / "datasets", name)[-1]


def _questions(root: Path, model: Path, questions: Path) -> Path:
    """The dataset of questions; the held-out ones are for validation."""
    if not versions(root / "datasets", _NAME):
        run(
            "prepare_dataset",
            *("--conversations", str(questions / "train.jsonl")),
            *("--documents_valid_file", str(questions / "valid.jsonl")),
            *("--tokenizer_path", str(model)),
            *("--datasets_root", str(root / "datasets"), "--dataset_name", _NAME),
        )
    return versions(root / "datasets", _NAME)[-1]


def _train(arguments: DemoArguments, model: Path, dataset: Path, documents: Path) -> Path:
    root = arguments.root / "experiments"
    finished = [path for path in versions(root, _NAME) if (path / _SUMMARY_FILE_NAME).is_file()]
    if finished and not arguments.fresh:
        say(f"\n{finished[-1]} is trained already (to train again: fst demo --chat --fresh)\n")
        return finished[-1]
    run(
        "train",
        *("--model_path", str(model), "--dataset_dir", str(dataset)),
        *("--experiments_root", str(root), "--experiment_name", _NAME),
        *("--replay", f"{documents}:{_REPLAY}", *_TRAINING),
        *("--max_minutes", f"{arguments.minutes:g}"),
    )
    return versions(root, _NAME)[-1]


def _compare(root: Path, model: Path, experiment: Path, questions: Path) -> None:
    """Ask both models the held-out questions, let both predict general text, and show what changed."""
    place, compare = root / "answers", ("--compare", str(model))
    figures = run_for_json(
        *("evaluate", str(experiment), *compare),
        *("--conversations", str(questions / "valid.jsonl"), "--output_dir", str(place)),
        *("--max_new_tokens", _MAX_NEW_TOKENS, "--num_resamples", "0"),
    )
    general = str(_documents(root, model, _GENERAL_TEXT))
    [text] = run_for_json("evaluate", str(experiment), general, *compare)["comparisons"]
    say(f"\nSome answers to held-out questions, {_MODEL} before and after:\n")
    before, after = (_read(place / name) for name in _ANSWERS_FILE_NAMES)
    for index in range(0, len(before), max(1, len(before) // _NUM_SHOWN)):
        say(_pair(before[index], after[index]))
    say(f"\n{_table(figures, text)}")


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _pair(before: dict[str, Any], after: dict[str, Any]) -> str:
    return (
        f"\n  {before['messages'][-2]['content']}\n"
        f"    before  {_shown(before)}\n"
        f"    after   {_shown(after)}{'' if after['is_right'] else '   (wrong)'}\n"
        f"    right   {before['expected']}\n"
    )


def _shown(answer: dict[str, Any]) -> str:
    text = " ".join(answer["messages"][-1]["content"].split())
    if len(text) <= _MAX_SHOWN_CHARACTERS:
        return text if answer["ended"] else f"{text} …"
    return f"{text[:_MAX_SHOWN_CHARACTERS].rstrip()} …"


def _table(figures: dict[str, Any], text: dict[str, Any]) -> str:
    """What changed, in a few lines."""
    both = [figures[side] for side in _SIDES]
    lines = [("", "before", "after", "")]
    for key, name in _SHARES.items():
        old, new = (100 * one[key] for one in both)
        lines.append((name, f"{old:.1f} %", f"{new:.1f} %", f"{new - old:+.1f} points"))
    old, new = (text[side]["perplexity"] for side in _SIDES)
    change = f"{100 * (new / old - 1):+.1f} %"
    lines.append(("perplexity of general text", f"{old:.2f}", f"{new:.2f}", change))
    return "".join(f"  {a:<40}{b:>10}{c:>10}{d:>16}\n" for a, b, c, d in lines)


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
