"""lm-evaluation-harness asks the service over HTTP, and finds what it finds on the model itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunFst
from tests.evaluation.test_harness import KINDS, accuracy_by_hand, write_task
from tests.logged_process import running_service

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none-is-needed"}


def test_the_harness_finds_the_same_over_http(
    model_dir: Path, run_fst: RunFst, tmp_path: Path
) -> None:
    files = {kind: write_task(tmp_path, kind) for kind in KINDS}
    with running_service(model_dir, "--weights_dtype", "float32") as (url, _):
        found = _ask(url, model_dir, list(files.values()))
    assert found["multiple_choice"]["acc,none"] == pytest.approx(accuracy_by_hand(model_dir))
    assert 0 <= found["generate_until"]["exact_match,none"] <= 1
    kind = "loglikelihood_rolling"
    done = run_fst("evaluate", model_dir, "--harness", files[kind], "--device", "cpu")
    expected = json.loads(done.stdout)[kind]["bits_per_byte,none"]
    assert found[kind]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def _ask(url: str, model_dir: Path, files: list[Path]) -> dict[str, Any]:
    """What the command prints of each task."""
    directory = files[0].parent
    arguments = {
        "model": "tiny-model",
        "base_url": f"{url}/v1/completions",
        "tokenizer": model_dir,
        "num_concurrent": 2,
        "max_length": 128,
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", *(f"{name}={value}" for name, value in arguments.items())]
    command += ["--tasks", *map(str, files), "--output_path", str(directory / "found")]
    done = subprocess.run(
        command,
        cwd=directory,  # the rows are named relative to it
        env={**os.environ, **_OFFLINE, "HF_HOME": str(directory)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [results] = (directory / "found").rglob("results_*.json")
    content: dict[str, Any] = json.loads(results.read_text("utf-8"))
    return dict(content["results"])
