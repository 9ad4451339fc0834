"""The smallest real objects: documents, a dataset directory, a model directory, all made here.

Everything is written once per test session and never changed; a test that writes uses its own tmp_path.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.datasets.corpus import DatasetDirectory, open_dataset
from full_stack_transformer.generation.runners.native import library
from full_stack_transformer.modelling.backbones import new_backbone
from full_stack_transformer.modelling.model_directory import save_model_directory
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer

if TYPE_CHECKING:
    from tests.object_store import S3Server

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Two threads cost twice the processor time of one on models this small.
torch.set_num_threads(1)

# What a shell starts in the background is deaf to Ctrl-C, and so would be the programs that are tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

RunFst = Callable[..., "subprocess.CompletedProcess[str]"]

_SUBJECTS = ("The reader", "A small model", "The corpus", "Every sample", "The tokenizer")
_VERBS = ("learns from", "is written to", "looks for", "never forgets", "begins with")
_OBJECTS = (
    "the documents",
    "a long sentence",
    "its neighbours",
    "the next token",
    "café and 日本語 🙂",
)


def write_documents(path: Path, *, num_documents: int, first: int = 0) -> Path:
    """Documents of one to four sentences, each another one, ended by the default delimiter."""
    lines = []
    for number in range(first, first + num_documents):
        for sentence in range(1 + number % 4):
            index = number * 7 + sentence * 3
            lines.append(
                f"{_SUBJECTS[index % 5]} {_VERBS[index // 5 % 5]} {_OBJECTS[index // 25 % 5]} {number}."
            )
        lines.append("[END_OF_DOCUMENT]")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def decoder() -> None:
    """The C++ decoder; skips the test where the machine cannot have it."""
    problem = library.why_not()
    if problem is not None:
        pytest.skip(f"no C++ decoder here: {problem}")


@pytest.fixture(scope="session")
def s3_server() -> Iterator["S3Server"]:
    """One server of S3 for all tests."""
    from tests.object_store import serve_s3  # moto takes a second to import

    with serve_s3() as server:
        yield server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, s3_server: "S3Server") -> Iterator["S3Server"]:
    """An empty bucket, without faults yet."""
    from tests.object_store import s3_of_test

    with s3_of_test(monkeypatch, s3_server) as server:
        yield server


@pytest.fixture(scope="session")
def documents_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.txt and valid.txt."""
    directory = tmp_path_factory.mktemp("documents")
    write_documents(directory / "train.txt", num_documents=200)
    write_documents(directory / "valid.txt", num_documents=20, first=1000)
    return directory


@pytest.fixture(scope="session")
def dataset_dir(documents_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset directory with a byte-level BPE of 300 tokens and samples of 8 to 64 tokens."""
    return prepare_dataset(
        PrepareDatasetArguments(
            documents_train_file=(documents_dir / "train.txt",),
            documents_valid_file=(documents_dir / "valid.txt",),
            datasets_root=tmp_path_factory.mktemp("datasets"),
            dataset_name="tiny",
            vocab_size=300,
            max_sample_length=64,
        )
    )


@pytest.fixture(scope="session")
def dataset(dataset_dir: Path) -> DatasetDirectory:
    """The dataset directory, opened."""
    return open_dataset(dataset_dir)


@pytest.fixture(scope="session")
def model_dir(dataset: DatasetDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: two layers, width 64, random weights, context of 128 tokens."""
    torch.manual_seed(0)
    backbone = new_backbone(
        "tiny",
        vocab_size=dataset.description["vocab_size"],
        max_length=128,
        special_token_ids=dataset.description["special_token_ids"],
    )
    # Fresh weights predict all tokens about alike; sharper ones make generated texts differ.
    with torch.no_grad():
        backbone.get_input_embeddings().weight.mul_(6)
    directory = tmp_path_factory.mktemp("models") / "tiny-model"
    save_model_directory(
        directory,
        backbone,
        tokenizer_directory=dataset.tokenizer_directory,
        description={"step": 0, "validation_loss": 5.5},
    )
    assert open_saved_tokenizer(directory).vocab_size == dataset.description["vocab_size"]
    return directory


@pytest.fixture(scope="session")
def run_fst() -> RunFst:
    """Runs the real command line in a process of its own: run_fst("train", "--seed", "1", cwd=…)."""

    def run(
        *words: str | Path,
        cwd: Path | None = None,
        stdin: str | None = None,
        env: dict[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "full_stack_transformer", *map(str, words)],
            cwd=cwd,
            input=stdin,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
