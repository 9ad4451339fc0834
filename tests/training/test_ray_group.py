"""Trainings on two nodes of Ray: one that is killed, interrupted, or cannot begin."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.errors import UsageError
from tests.ray_nodes import RayNodes, ray_nodes
from tests.training.together import assert_same_bits, train_command, train_together

_SECONDS = 400.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ray_address": "nowhere"}, "--ray_address must be auto, local, or HOST:PORT"),
        ({"ray_address": "auto", "devices": "2"}, "leave out --devices and --num_nodes"),
        ({"ray_workers": 2}, "--ray_workers needs --ray_address"),
        ({"ray_address": "auto", "ray_workers": 0}, "--ray_workers must be at least 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        TrainArguments(dataset_dir=Path("dataset"), **options)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(2) as cluster:
        yield cluster


class Trainings:
    """Trainings of one data set on the cluster."""

    def __init__(self, root: Path, dataset_dir: Path, nodes: RayNodes) -> None:
        self.root = root
        self._dataset_dir, self._nodes = dataset_dir, nodes

    def options(self, name: str, **more: Any) -> dict[str, Any]:
        return {
            "dataset_dir": self._dataset_dir,
            "experiments_root": self.root,
            "experiment_name": name,
            "model_config": "tiny",
            "batch_size": 4,
            "max_epochs": -1,
            "max_steps": 150,
            "val_check_interval": 100.0,
            "num_warmup_steps": 2,
            "accelerator": "cpu",
            "precision": "32",
            "compile": "never",
            "num_generated_samples": 0,
            **more,
        }

    def start(self, name: str, *words: str, **more: Any) -> "subprocess.Popen[str]":
        command = train_command(
            self.options(name, **more), "--ray_address", self._nodes.address, *words
        )
        return subprocess.Popen(
            command,
            env={**self._nodes.environment, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_it_has_learned(self, name: str) -> None:
        checkpoint = self.root / name / "0" / "checkpoints" / "last.ckpt"
        wait_until(checkpoint.exists)

    def kill_process(self, name: str, rank: int) -> None:
        """Kill -9 of one process of the group."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words, environment = process.cmdline(), process.environ()
                if name in words and environment.get("RANK") == str(rank):
                    process.kill()
                    return
        raise AssertionError("the process does not run")


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + _SECONDS
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def trainings(
    nodes: RayNodes, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("on_ray"), dataset_dir, nodes)


@pytest.mark.slow
def test_a_killed_process_and_a_killed_node_change_no_bit(
    trainings: Trainings, nodes: RayNodes
) -> None:
    """Against two processes of torchrun that nobody disturbs."""
    expected = train_together([trainings.options("undisturbed")])
    assert expected.returncode == 0, expected.stderr
    running = trainings.start("disturbed", checkpoint_every_n_minutes=0.01)
    trainings.wait_until_it_has_learned("disturbed")
    trainings.kill_process("disturbed", 1)
    _, log = running.communicate(timeout=_SECONDS)
    assert running.returncode == 0, log
    assert "starting all again, 1 of 3 times" in log
    assert "resuming after step" in log
    assert_same_bits(trainings.root / "undisturbed" / "0", trainings.root / "disturbed" / "0")

    running = trainings.start("moved", checkpoint_every_n_minutes=0.01)
    trainings.wait_until_it_has_learned("moved")
    nodes.nodes[-1].kill()
    nodes.add()
    _, log = running.communicate(timeout=_SECONDS)
    assert running.returncode == 0, log
    assert "resuming after step" in log
    assert_same_bits(trainings.root / "undisturbed" / "0", trainings.root / "moved" / "0")
    assert not (trainings.root / "moved" / "1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_ends_all_processes_and_the_command_to_resume_is_told(
    trainings: Trainings, nodes: RayNodes, number: signal.Signals
) -> None:
    name = f"interrupted_by_{number.name}"
    running = trainings.start(name, checkpoint_every_n_minutes=0.01, max_steps=100_000)
    trainings.wait_until_it_has_learned(name)
    running.send_signal(number)
    _, log = running.communicate(timeout=_SECONDS)
    assert running.returncode == 128 + number
    assert f"{number.name}: stopped after step" in log
    directory = trainings.root / name / "0"
    words = f"fst train --ray_address {nodes.address} --ray_workers 2 --resume {directory}"
    assert log.endswith(f"resume with: {words}\n")
    assert "Traceback" not in log
    with pytest.raises(AssertionError):
        trainings.kill_process(name, 0)


@pytest.mark.slow
def test_a_training_that_cannot_begin_is_one_sentence(trainings: Trainings, tmp_path: Path) -> None:
    for words, expected in (
        (("--ray_workers", "3"), "the cluster has 2 nodes, 2 CPUs"),
        (("--task", "dpo", "--model_path", str(tmp_path)), "should be a model directory"),
    ):
        running = trainings.start("mistaken", *words)
        out, log = running.communicate(timeout=_SECONDS)
        told = [line for line in log.splitlines() if line.startswith("fst: ")]
        assert len(told) == 1, log
        assert expected in told[0]
        assert running.returncode == 1
        assert out == ""
        assert "Traceback" not in log
    assert not (trainings.root / "mistaken").exists()
    assert [*trainings.root.glob(".*")] == []
