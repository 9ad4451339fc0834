"""What a benchmark ran on, and which state of the code: the head of its report."""

import os
import subprocess
from pathlib import Path

_HERE = Path(__file__).resolve().parent
NUM_CORES = (
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
)


def commit() -> str:
    """Of the repository that this file lies in."""
    name = _git("rev-parse", "--short", "HEAD") or "unknown"
    return name + (" and uncommitted changes" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=_HERE, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()
