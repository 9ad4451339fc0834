"""`fst train` in this process: for tests of what a training leaves behind, and of how it ends."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch import Tensor

from full_stack_transformer import machine
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.checkpoints import DurableCheckpointIO
from full_stack_transformer.training.module import TrainingModule
from full_stack_transformer.training.run import main as train

# Dropout everywhere: what a step draws must not depend on the steps before.
GPT2_WITH_DROPOUT = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "resid_pdrop": 0.2,
    "embd_pdrop": 0.2,
    "attn_pdrop": 0.2,
}

_EVENT_FILE_NUMBERS = event_file_writer.AtomicCounter(10**6)  # all of one width


class CrashError(BaseException):
    """Stands for a kill: nothing that handles errors may notice it."""


class TrainingHere:
    """Trains on one dataset into one root; options are those of the command.

    Args:
        dataset_dir: a dataset directory.
        root: for experiments, and for the config of the model.
    """

    def __init__(self, dataset_dir: Path, root: Path) -> None:
        config = root / "gpt2.json"
        config.write_text(json.dumps(GPT2_WITH_DROPOUT))
        self._options: dict[str, Any] = {
            "dataset_dir": dataset_dir,
            "experiments_root": root,
            "model_config": str(config),
            "batch_size": 8,
            "num_warmup_steps": 2,
            "learning_rate": 5e-3,
            "max_epochs": -1,
            "accelerator": "cpu",
            "precision": "32",
            "compile": "never",
            "devices": "1",
            "num_generated_samples": 0,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
        }

    def __call__(self, **options: Any) -> Path | int:
        """Train; what the command returns."""
        with mock.patch.object(machine, "_SECONDS_PER_SIDE", 1e-3), _sorted_event_files():
            return train(TrainArguments(**{**self._options, **options}))

    def to_the_end(self, **options: Any) -> Path:
        """Train; the experiment directory."""
        directory = self(**options)
        assert isinstance(directory, Path)
        return directory

    def crash(self, *, in_batch: int = -1, in_validation: int = -1, **options: Any) -> None:
        """Train, and crash in the batch with this number or in the validation of this step."""
        with _crashing(in_batch, in_validation):
            try:
                self(**options)
            except CrashError:
                return
        raise AssertionError("the training ended before it crashed")


@contextlib.contextmanager
def _sorted_event_files() -> Iterator[None]:
    """The names of the event files of this process sort by age, also within one second.

    TensorBoard reads the files of a run in the order of their names: second, process, counter. Each
    command has a process of its own; here the counter decides, and "10" sorts before "9".
    """
    with mock.patch.object(event_file_writer, "_global_uid", _EVENT_FILE_NUMBERS):
        yield


@contextlib.contextmanager
def _crashing(in_batch: int, in_validation: int) -> Iterator[None]:
    training_step, validation_step = TrainingModule.training_step, TrainingModule.validation_step

    def train_or_crash(task: TrainingModule, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        if batch_index == in_batch:
            raise CrashError
        return training_step(task, batch, batch_index)

    def validate_or_crash(task: TrainingModule, batch: Batch, batch_index: int) -> None:
        if task.global_step == in_validation:
            raise CrashError
        validation_step(task, batch, batch_index)

    with mock.patch.multiple(
        TrainingModule, training_step=train_or_crash, validation_step=validate_or_crash
    ):
        yield


def checkpoint_of(experiment: Path, name: str = "last.ckpt") -> dict[str, Any]:
    """What a checkpoint holds."""
    return DurableCheckpointIO().load_checkpoint(experiment / "checkpoints" / name)


def curve_of(experiment: Path, name: str = metric_names.VALID_LOSS) -> list[tuple[int, float]]:
    """Steps and values, as TensorBoard shows them."""
    events = EventAccumulator(str(experiment))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(name)]
