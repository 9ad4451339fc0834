"""Wrong paths, files, ports and options are told in milliseconds: without torch, in one sentence."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from full_stack_transformer.arguments.training import MODEL_PRESETS
from full_stack_transformer.modelling.backbones import DECODER_PRESETS, GPT2_PRESET
from full_stack_transformer.tasks.catalogue import CORPUS_TASKS, TASKS
from full_stack_transformer.tasks.opening import task_class
from full_stack_transformer.tasks.task import CorpusTask

# Runs command lines in one process; prints for each its exit code, its errors, and what it imported.
_SCRIPT = """
import contextlib, io, json, sys
from full_stack_transformer.command_line import run
for words in json.load(sys.stdin):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = run(words)
    heavy = [name for name in ("torch", "transformers", "aiogram", "uvicorn") if name in sys.modules]
    print(json.dumps([code, errors.getvalue(), heavy]))
"""
_ROWS = ("train", "--task", "sequence_classification")
# What is typed -> the sentence has it. PORT is taken, MODEL complete, CONFIG a directory without weights.
_MISTAKES = {
    "generate nowhere --prompt a": "nowhere should be a model directory",
    "generate CONFIG --prompt a": "has config.json, but no weights that are read here",
    "generate MODEL --prompt_file nowhere": "--prompt_file nowhere: No such file",
    "generate MODEL --prompt_file .": "--prompt_file .: Is a directory; expected a file",
    "generate MODEL --prompt a --device gpu": "--device must be auto, cpu, cuda",
    "serve nowhere": "nowhere should be a model directory",
    "serve MODEL --more_models a=nowhere": "nowhere should be a model directory",
    "serve MODEL --api_keys_file nowhere": "--api_keys_file nowhere: No such file",
    "serve MODEL --port PORT": "Address already in use; stop what uses it, or pass --port",
    "serve MODEL --host 192.0.2.1": "check the address and --port",
    "evaluate nowhere DATASET": "nowhere should be a model directory",
    "evaluate MODEL nowhere": "nowhere does not exist; expected a dataset directory",
    "evaluate MODEL --harness nowhere.yaml": "--harness nowhere.yaml: No such file",
    "evaluate MODEL DATASET --output_dir FILE/a": "is a file; name a directory",
    "whiten nowhere FILE --output_dir new": "nowhere should be a model directory",
    "whiten MODEL nowhere.txt --output_dir new": "TEXTS nowhere.txt does not exist",
    "whiten MODEL FILE --output_dir MODEL": "exists; name a directory that does not",
    "quantize nowhere": "nowhere should be a model directory",
    "quantize MODEL --dtype int3": "Choose from",
    "quantize MODEL --calibration nowhere": "--calibration nowhere does not exist; expected a text file",
    "quantize MODEL --output MODEL": "exists; name a directory that does not",
    "average_checkpoints MODEL nowhere --output_dir new": "nowhere should be a model directory",
    "tensorboard nowhere": "nowhere does not exist; expected the directory of experiments",
    "tensorboard . --port PORT": "Address already in use",
    "telegram_bot --checkpoint nowhere": "nowhere should be a model directory",
    "telegram_bot --monitoring_port PORT": "or pass --monitoring_port",
    "telegram_bot --database FILE/bot.sqlite3": "is a file; name a directory",
    "telegram_bot --token_file nowhere": "--token_file nowhere cannot be read",
    "demo --root FILE/demo": "is a file; name a directory",
    "demo --port PORT": "Address already in use",
    "collect_documents python_docs --documents_root FILE/a": "is a file; name a directory",
    "prepare_dataset --documents_train_file nowhere --validation_fraction 0.1 --dataset_name a": (
        "nowhere does not exist; expected a file of documents"
    ),
    "train": "--task causal_lm needs --dataset_dir",
    "train --dataset_dir nowhere": "nowhere is not a dataset directory",
    "train --dataset_dir DATASET --experiments_root FILE": "is a file; name a directory",
    "train --dataset_dir DATASET --model_config giant": "--model_config must be one of tiny, micro, mini",
    "train --dataset_dir DATASET --model_path ./nowhere": "nowhere should be a model directory",
    "train --dataset_dir DATASET --accelerator fast": "--accelerator must be auto, cpu, gpu",
    "train --dataset_dir DATASET --devices all": "--devices must be auto, a number",
    "train --resume last --experiments_root .": "--resume last: there is no experiment",
    "train --resume nowhere": "nowhere has no arguments.json",
    "train --optimizer sgd": "Choose from",
    "run_experiment --data_class a.B --train_file nowhere": "--train_file nowhere does not exist",
}


def test_a_mistake_is_told_before_torch_is_imported(
    model_dir: Path, dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", "1:a")
    (tmp_path / "file").write_text("a")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text('{"model_type": "llama"}')
    mistakes = _MISTAKES | {
        " ".join((*_ROWS, *words.split())): sentence
        for words, sentence in (
            ("--train_file nowhere.csv", "nowhere.csv does not exist"),
            ("--train_file FILE --test_file nowhere.csv", "--test_file nowhere.csv does not exist"),
            ("--dataset_dir a/b/nowhere", "a/b/nowhere does not exist"),
            ("--dataset_dir CONFIG", "should have a file train"),
            ("--tokenizer_path /nowhere --train_file FILE", "--tokenizer_path /nowhere does not"),
        )
    }
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {
            "PORT": str(taken.getsockname()[1]),
            "MODEL": str(model_dir),
            "DATASET": str(dataset_dir),
            "CONFIG": str(tmp_path / "config"),
            "FILE": str(tmp_path / "file"),
        }
        lines = []
        for words in mistakes:
            for name, place in places.items():
                words = words.replace(name, place)
            lines.append(words.split())
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            input=json.dumps(lines),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=True,
        )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    for (words, sentence), (code, errors, heavy) in zip(mistakes.items(), outcomes, strict=True):
        assert sentence in errors, words
        assert (code in (1, 2), errors.count("\n"), heavy) == (True, 1, []), words


def test_a_pipe_and_standard_input_are_left_unread(model_dir: Path, tmp_path: Path) -> None:
    from full_stack_transformer.arguments.models import GenerateArguments, WhitenArguments
    from full_stack_transformer.first_checks import check_first

    check_first(GenerateArguments(model_dir, prompt_file=Path("-")))
    check_first(WhitenArguments(model_dir, (Path("-"),), output_dir=tmp_path / "new"))


def test_the_names_known_without_torch_are_those_of_the_code() -> None:
    assert {*MODEL_PRESETS} == {*DECODER_PRESETS, GPT2_PRESET}
    corpus_tasks = {name for name in TASKS if issubclass(task_class(name), CorpusTask)}
    assert {*CORPUS_TASKS} == corpus_tasks
