"""Scaling efficiency of a training: two processes of one thread each against one, with the same global batch.

    python -m tests.benchmarks.scaling [--short] [--strategy ddp|fsdp]

Runs of one and of two processes take turns (A B A B), tokens/s are those of summary.json, without start and
validation; the last line is JSON with the part of twice the speed that is reached, and the aims. It needs two
cores that nothing else uses: other load slows two processes twice, since each waits for the other. --short
has a tiny model, in which the processes wait for each other most of the time.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.machine import processor_name
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from tests.benchmarks.machine import commit
from tests.conftest import write_documents
from tests.training.together import torchrun, words_of

# Of twice the tokens/s of one process.
_AIMS = {"ddp": 0.85, "fsdp": 0.7}


def main() -> None:
    """Measure, and print a line for each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="a tiny model, one run of each")
    parser.add_argument("--strategy", choices=[*_AIMS, "both"], default="both")
    given = parser.parse_args()
    strategies = [*_AIMS] if given.strategy == "both" else [given.strategy]
    with tempfile.TemporaryDirectory(prefix="fst-scaling-") as place:
        root = Path(place)
        dataset = _dataset(root, num_documents=400 if given.short else 20_000)
        rates: dict[str, list[float]] = {name: [] for name in ("one", *strategies)}
        for _ in range(1 if given.short else 3):
            for name, found in rates.items():
                found.append(_tokens_per_second(root, dataset, name, is_short=given.short))
                print(f"{name}: {found[-1]:,.0f} tokens/s", flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(f"{processor_name()}, torch {torch.__version__}, commit {commit()}")
    for name in strategies:
        print(f"{name}: {medians[name] / medians['one']:.2f} times the tokens/s of one process")
    efficiency = {name: round(medians[name] / medians["one"] / 2, 3) for name in strategies}
    aims = {name: _AIMS[name] for name in strategies}
    print(json.dumps({"benchmark": "scaling", "ratios": efficiency, "aims": aims}))


def _dataset(root: Path, *, num_documents: int) -> Path:
    return prepare_dataset(
        PrepareDatasetArguments(
            documents_train_file=(
                write_documents(root / "train.txt", num_documents=num_documents),
            ),
            documents_valid_file=(
                write_documents(root / "valid.txt", num_documents=8, first=10**6),
            ),
            datasets_root=root / "datasets",
            dataset_name="scaling",
            vocab_size=300,
            max_sample_length=128,
        )
    )


def _tokens_per_second(root: Path, dataset: Path, name: str, *, is_short: bool) -> float:
    num_processes = 1 if name == "one" else 2
    num_steps = 6 if is_short else 60
    options: dict[str, Any] = {
        "dataset_dir": dataset,
        "experiments_root": root,
        "experiment_name": name,
        "strategy": "auto" if name == "one" else name,
        "model_config": "tiny" if is_short else "mini",
        "batching": "packed",
        "batch_size": 16 // num_processes,
        "max_epochs": -1,
        "max_steps": num_steps,
        "val_check_interval": 10**6,
        "num_generated_samples": 0,
        "accelerator": "cpu",
        "precision": "32",
        "compile": "never",
    }
    done = torchrun(
        *("full_stack_transformer", "train", *words_of(options)),
        num_processes=num_processes,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    experiment = Path(done.stdout.splitlines()[-1])
    rate = float(json.loads((experiment / "summary.json").read_text())["tokens_per_second"])
    shutil.rmtree(experiment)
    return rate


if __name__ == "__main__":
    main()
