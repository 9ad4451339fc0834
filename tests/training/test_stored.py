"""A training that reads from object storage is, bit for bit, one that reads the same files from a disk."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer import object_storage
from full_stack_transformer.storage import files_below
from tests.datasets.test_stored import prepare_in_shards, upload
from tests.object_store import BUCKET, S3Server
from tests.training.training_here import TrainingHere, curve_of

URL = f"s3://{BUCKET}/datasets/tiny"
WEIGHTS = "model/model.safetensors"
CACHE_BYTES = 40_000


@pytest.fixture(scope="module")
def on_disk(documents_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in about 20 shards, larger than the cache."""
    directory = prepare_in_shards(documents_dir, tmp_path_factory.mktemp("shards"))
    assert sum(path.stat().st_size for path in files_below(directory / "train")) > 1.5 * CACHE_BYTES
    return directory


@pytest.mark.parametrize(
    "batching",
    [
        "packed",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("length", "concatenated")),
    ],
)
def test_weights_equal_those_from_a_disk(
    batching: str, on_disk: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through errors of the store, and interrupted twice."""
    monkeypatch.setattr(object_storage, "_FIRST_WAIT_SECONDS", 0.001)
    upload(on_disk, f"{URL}/0")
    s3.faults.probability, s3.faults.kinds = 0.1, ("500", "503", "cut")
    for name in ("disk", "stored"):
        (tmp_path / name).mkdir()
    options: dict[str, Any] = {"batching": batching, "max_steps": 8, "val_check_interval": 3.0}
    whole = TrainingHere(on_disk, tmp_path / "disk").to_the_end(**options, experiment_name="whole")
    options |= {"data_cache": tmp_path / "cache", "data_cache_bytes": str(CACHE_BYTES)}
    training = TrainingHere(Path(URL), tmp_path / "stored")
    resume: dict[str, Any] = {}
    for crash in ({"in_batch": 2}, {"in_batch": 6}):
        training.crash(**crash, **options, **resume, experiment_name="stored")
        resume = {"resume": "last"}
    stored = training.to_the_end(**options, **resume, experiment_name="stored")
    assert (whole / WEIGHTS).read_bytes() == (stored / WEIGHTS).read_bytes()
    assert curve_of(whole) == curve_of(stored)
    assert f'"dataset_dir": "{URL}/0"' in (stored / "arguments.json").read_text()
    assert s3.faults.failed


@pytest.mark.slow
def test_a_killed_process_goes_on_from_the_store(
    on_disk: Path, s3: S3Server, tmp_path: Path
) -> None:
    upload(on_disk, f"{URL}/0")
    s3.faults.probability, s3.faults.kinds = 0.1, ("500", "503", "cut", "slow")
    words = [
        *("--model_config", "tiny", "--batch_size", "4", "--max_steps", "60", "--seed", "3"),
        *("--checkpoint_every_n_minutes", "0", "--val_check_interval", "20", "--devices", "1"),
        *("--limit_val_batches", "2", "--accelerator", "cpu"),
    ]
    cache = ["--data_cache", str(tmp_path / "cache"), "--data_cache_bytes", str(CACHE_BYTES)]
    environment = {**os.environ, **s3.environment, "OMP_NUM_THREADS": "1"}

    def start(place: str, name: str, *more: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "full_stack_transformer", "train", "--dataset_dir", place]
        command += ["--experiment_name", name, "--experiments_root", str(tmp_path), *words, *more]
        return subprocess.Popen(command, env=environment, start_new_session=True)

    assert start(str(on_disk), "disk").wait(timeout=300) == 0
    killed = start(URL, "stored", *cache)
    checkpoints = tmp_path / "stored" / "0" / "checkpoints"
    deadline = time.monotonic() + 200
    while not any(checkpoints.glob("*step=*.ckpt")) and not any(checkpoints.glob("*.ckpt")):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert start(URL, "stored", *cache, "--resume", "last").wait(timeout=300) == 0
    weights = [(tmp_path / name / "0" / WEIGHTS).read_bytes() for name in ("disk", "stored")]
    assert weights[0] == weights[1]
