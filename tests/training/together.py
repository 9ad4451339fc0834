"""Real processes of torchrun for tests: `python -m tests.training.together` trains inside of one of them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from full_stack_transformer import machine
from full_stack_transformer.command_line import run
from full_stack_transformer.processes import launch
from tests.training.training_here import checkpoint_of

# Rank of a process that ends as by kill -9, the first time, and the batch or save in which it does.
_KILL = "TOGETHER_KILL"


def torchrun(
    *words: str | Path,
    num_processes: int = 2,
    max_restarts: int = 0,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> "subprocess.CompletedProcess[str]":
    """Run a module and its arguments in so many processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max_restarts"]
    command += [str(max_restarts), "--nproc_per_node", str(num_processes), "-m"]
    own = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return subprocess.run(
        [*command, *map(str, words)],
        env={**os.environ, **own, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line has them."""
    words = []
    for name, value in options.items():
        words += [f"--{name}={value}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def train_command(options: Mapping[str, Any], *more: str) -> list[str]:
    """`fst train` with these options."""
    command = [sys.executable, "-m", "full_stack_transformer", "train"]
    return [*command, *words_of(options), *more]


def quiet_environment(home: Path) -> dict[str, str]:
    """Of a command that uses one thread, no network and another home."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(home)}
    return {**os.environ, **own}


def assert_same_bits(expected: Path, found: Path) -> None:
    """The last checkpoints of two experiments have the same weights."""
    states = [checkpoint_of(directory)["state_dict"] for directory in (expected, found)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key


def train_together(
    trainings: Sequence[Mapping[str, Any]],
    *,
    num_processes: int = 2,
    kill: tuple[int, str, int] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Train one after the other in the same processes, which spares their start.

    Args:
        trainings: options of each.
        num_processes: of torchrun.
        kill: rank, "batch" or "save", and its number, where a process is killed; torchrun then starts all of
            them once more.
    """
    return torchrun(
        "tests.training.together",
        json.dumps([words_of(options) for options in trainings]),
        num_processes=num_processes,
        max_restarts=int(kill is not None),
        env={} if kill is None else {_KILL: json.dumps(kill)},
    )


def _arm() -> None:
    found = launch()
    assert found is not None
    rank, place, number = json.loads(os.environ[_KILL])
    if found.rank == rank and not found.num_restarts:
        (_die_in_batch if place == "batch" else _die_while_saving)(number)


def _die_in_batch(number: int) -> None:
    from full_stack_transformer.training.module import TrainingModule

    training_step = TrainingModule.training_step

    def train_or_die(module: TrainingModule, given: Any, batch_index: int) -> Any:
        if batch_index == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(module, given, batch_index)

    mock.patch.object(TrainingModule, "training_step", train_or_die).start()


def _die_while_saving(number: int) -> None:
    """In the save with this number, from 1, when this process has written its part."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    write_data, saves = FileSystemWriter.write_data, []

    def write_and_die(writer: FileSystemWriter, *given: Any) -> Any:
        saves.append(write_data(writer, *given))
        if len(saves) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return saves[-1]

    mock.patch.object(FileSystemWriter, "write_data", write_and_die).start()


def main() -> int:
    """Train as the arguments say."""
    if _KILL in os.environ:
        _arm()
    with mock.patch.object(machine, "_SECONDS_PER_SIDE", 1e-3):
        for words in json.loads(sys.argv[1]):
            exit_code = run(["train", *words])
            if exit_code:
                return exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
