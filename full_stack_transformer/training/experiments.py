"""The experiment directory of a training: a new version, or an existing one to resume.

EXPERIMENTS_ROOT/NAME/VERSION/
    arguments.json               every option, readable again by --config
    dataset.json                 description of the dataset that training started with
    checkpoints/                 last.ckpt, previous.ckpt and best.ckpt, resumable
    model/                       the best model so far, always complete
    tokenizer/                   for labelled rows and masked language models
    generated.jsonl              text samples of each validation
    text_generator_params.json   how they are sampled; may be edited during training
    events.out.…                 curves, for TensorBoard
    profile.json                 with --profile: where the time of a step goes
    summary.json                 the results; only if the training finished
"""

import contextlib
import dataclasses
import fcntl
import logging
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning_fabric.utilities.rank_zero import rank_zero_only

from full_stack_transformer.arguments.familiar_options import RENAMED
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.errors import (
    DatasetError,
    FullStackTransformerError,
    InputError,
    UsageError,
)
from full_stack_transformer.storage import (
    claim_version,
    read_json,
    sync_directory,
    versions,
    write_json,
)
from full_stack_transformer.training.callbacks.progress import SUMMARY_FILE_NAME
from full_stack_transformer.training.callbacks.text_samples import (
    GENERATED_FILE_NAME,
    drop_lines_after,
)
from full_stack_transformer.training.checkpoints import (
    LAST_FILE_NAME,
    FoundCheckpoint,
    find_checkpoint,
    link_checkpoint,
)

logger = logging.getLogger(__name__)

ARGUMENTS_FILE_NAME = "arguments.json"
DATASET_FILE_NAME = "dataset.json"
CHECKPOINTS_DIRECTORY_NAME = "checkpoints"
TOKENIZER_DIRECTORY_NAME = "tokenizer"
RESUME_LAST = "last"

_LIMITS = {"max_epochs", "max_steps", "max_minutes", "early_stopping_patience"}
# Options that a resumed training may change; the others decide what its weights become.
_CHANGEABLE = _LIMITS | {
    *("checkpoint_every_n_minutes", "accelerator", "devices", "strategy", "num_nodes", "compile"),
    *("log_every_n_steps", "num_generated_samples", "histograms", "profile", "enable_progress_bar"),
}
_PATHS = {"dataset_dir", "experiments_root", "train_file", "validation_file", "test_file"}
# Each run has its own; their content is compared by the description of the data.
_INPUTS = {
    *("dataset_dir", "train_file", "validation_file", "test_file"),
    *("do_train", "do_eval", "do_predict"),
}
# They say where the training is, not what it does, or were only needed at its start.
_NOT_COMPARED = {
    *("resume", "experiments_root", "experiment_name"),
    *("find_learning_rate", "find_batch_size"),
    *_INPUTS,
}


def is_main_process() -> bool:
    """Whether this process writes; known before Lightning has connected the processes."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return bool(rank_zero_only.rank == 0 and node == "0")  # type: ignore[attr-defined]


class ExperimentData(Protocol):
    """The training data, as an experiment sees it."""

    @property
    def description(self) -> dict[str, Any]:
        """A resumed training must find the same."""
        ...

    @property
    def data_place(self) -> str:
        """Where it is, for error messages."""
        ...


@dataclass(frozen=True)
class Experiment:
    """Where a training writes, its options, and the checkpoint that it resumes from."""

    directory: Path
    arguments: TrainArguments
    checkpoint: FoundCheckpoint | None = None
    """None for a new training."""
    is_resumed: bool = False
    """Whether an earlier run wrote into the directory."""
    is_finished: bool = False
    """Whether there is nothing left to do."""

    @property
    def name(self) -> str:
        """NAME/VERSION."""
        return f"{self.directory.parent.name}/{self.directory.name}"

    @property
    def first_repeated_step(self) -> int:
        """The first optimizer step whose validation or update is done again."""
        if self.checkpoint is None:
            return 0
        return self.checkpoint.step + (not self.checkpoint.validation_is_due)

    def resume_command(self) -> str:
        """The command that resumes this training, to be pasted."""
        arguments = self.arguments
        words = ["fst", "train"]
        for name in ("data_class", "model_class"):
            if getattr(arguments, name, ""):
                words[1:] = ["run_experiment", *words[2:], f"--{name}", getattr(arguments, name)]
        if arguments.task != TrainArguments.task:
            words += ["--task", arguments.task]
        for name in ("dataset_dir", "train_file", "validation_file"):
            if getattr(arguments, name) is not None:
                words += [f"--{name}", str(getattr(arguments, name))]
        if arguments.experiments_root != TrainArguments.experiments_root:
            words += ["--experiments_root", str(arguments.experiments_root)]
        words += ["--experiment_name", arguments.experiment_name, "--resume"]
        newest = versions(arguments.experiments_root, arguments.experiment_name)[-1:]
        words.append(RESUME_LAST if newest == [self.directory] else str(self.directory))
        return shlex.join(words)


@contextlib.contextmanager
def open_experiment(arguments: TrainArguments, work: ExperimentData) -> Iterator[Experiment]:
    """A new experiment directory, or with --resume that of an interrupted training.

    The directory is locked inside the `with`. Only the main process writes; the others learn the name of a
    new directory later.

    Raises:
        UsageError: there is nothing to resume, or the options differ from those at the start.
        DatasetError: the dataset differs from the one at the start.
        TrainingError: none of its checkpoints can be read.
    """
    resume = arguments.resume
    arguments = dataclasses.replace(arguments, resume=None)
    if resume is not None:
        directory = _directory_to_resume(resume, arguments)
    elif is_main_process():
        directory = claim_version(arguments.experiments_root, arguments.experiment_name)
    else:
        directory = arguments.experiments_root / arguments.experiment_name
    if not is_main_process():
        yield _found(directory, arguments, work)
        return
    with _locked(directory):
        experiment = _found(directory, arguments, work)
        if not experiment.is_finished:
            _write_start(experiment, work)
        try:
            yield experiment
        except FullStackTransformerError:
            _remove_if_not_started(directory)
            raise


def _write_start(experiment: Experiment, work: ExperimentData) -> None:
    if experiment.is_resumed:
        _remove_repeated(experiment)
    write_arguments(experiment)
    write_json(experiment.directory / DATASET_FILE_NAME, work.description)
    for path in (experiment.directory.parent, experiment.directory.parent.parent):
        sync_directory(path)


def write_arguments(experiment: Experiment) -> None:
    """Write arguments.json: every option as --config reads it; unset ones are left out."""
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(experiment.arguments).items()
        if value is not None
    }
    assert all(not isinstance(value, float) or math.isfinite(value) for value in options.values())
    write_json(experiment.directory / ARGUMENTS_FILE_NAME, options)


def _directory_to_resume(resume: str, arguments: TrainArguments) -> Path:
    if resume != RESUME_LAST:
        directory = Path(resume)
        if len(directory.parts) < 3:  # its parents are the name and the root
            directory = directory.resolve()
        if not (directory / ARGUMENTS_FILE_NAME).is_file():
            raise UsageError(
                f"--resume must be {RESUME_LAST} or an experiment directory; {directory} has no "
                f"{ARGUMENTS_FILE_NAME}"
            )
        return directory
    found = versions(arguments.experiments_root, arguments.experiment_name)
    if not found:
        raise UsageError(
            f"--resume {RESUME_LAST}: there is no experiment in "
            f"{arguments.experiments_root / arguments.experiment_name}; start one without --resume"
        )
    return found[-1]


def _found(directory: Path, given: TrainArguments, work: ExperimentData) -> Experiment:
    """The experiment in the directory; changes nothing."""
    if not (directory / ARGUMENTS_FILE_NAME).is_file():
        return Experiment(directory, given)  # new, or killed before it started
    saved = _read_arguments(directory / ARGUMENTS_FILE_NAME, type(given))
    _check_dataset(directory, work)
    arguments = _merged(given, saved, directory)
    limits_are_the_same = all(getattr(arguments, name) == getattr(saved, name) for name in _LIMITS)
    if (directory / SUMMARY_FILE_NAME).is_file() and limits_are_the_same:
        return Experiment(directory, arguments, is_resumed=True, is_finished=True)
    checkpoint, skipped = find_checkpoint(directory / CHECKPOINTS_DIRECTORY_NAME)
    for path, reason in skipped.items():
        logger.warning("%s cannot be read (%s): resuming from an earlier one", path, reason)
    return Experiment(directory, arguments, checkpoint, is_resumed=True)


def _read_arguments(path: Path, kind: type[TrainArguments]) -> TrainArguments:
    content: dict[str, Any] = {
        RENAMED.get(name, name): value for name, value in read_json(path).items()
    }
    for name in _PATHS & content.keys():
        content[name] = Path(content[name])
    try:
        return kind(**content)
    except TypeError as error:
        raise InputError(f"{path} was written by another version of fst: {error}") from error


def _check_dataset(directory: Path, work: ExperimentData) -> None:
    file = directory / DATASET_FILE_NAME
    if file.is_file() and read_json(file) != work.description:
        raise DatasetError(
            f"{work.data_place} is not the dataset that {directory} was trained on, which {file} "
            "describes; pass that one, or start a new training without --resume"
        )


def _merged(given: TrainArguments, saved: TrainArguments, directory: Path) -> TrainArguments:
    """The saved options with the changes that are allowed. A given default counts as not given."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        is_given = value not in (field.default, getattr(saved, field.name))
        if is_given and field.name not in _NOT_COMPARED:
            changed[field.name] = value
    for flag, name in (
        (given.find_learning_rate, "learning_rate"),
        (given.find_batch_size, "batch_size"),
    ):
        if flag:  # the same command again: the value that it found is saved
            changed.pop(name, None)
    refused = sorted(changed.keys() - _CHANGEABLE)
    if refused:
        differences = "; ".join(
            f"--{name} {changed[name]} (was {getattr(saved, name)})" for name in refused
        )
        raise UsageError(
            f"--resume uses the options in {directory / ARGUMENTS_FILE_NAME}; these cannot change: "
            f"{differences}; leave them out, or start a new training without --resume"
        )
    for name, value in changed.items():
        if is_main_process():
            logger.info("--%s is now %s; it was %s", name, value, getattr(saved, name))
    return dataclasses.replace(
        saved,
        **changed,
        **{name: getattr(given, name) for name in _INPUTS},
        experiments_root=directory.parent.parent,
        experiment_name=directory.parent.name,
    )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock the directory; the lock ends with this process at the latest."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another process is training in {directory}; wait until it ends, or start a new "
                "training without --resume"
            ) from error
        except OSError:  # a file system without locks
            logger.debug("%s cannot be locked", directory)
        yield
    finally:
        os.close(descriptor)


def _remove_if_not_started(directory: Path) -> None:
    """Remove the version of a training that failed at its start, such as for a missing model."""
    names = {ARGUMENTS_FILE_NAME, DATASET_FILE_NAME, TOKENIZER_DIRECTORY_NAME}
    if {path.name for path in directory.iterdir()} <= names:
        shutil.rmtree(directory)


def _remove_repeated(experiment: Experiment) -> None:
    """Remove unfinished files of killed runs, and what was written after the checkpoint."""
    directory = experiment.directory
    checkpoints = directory / CHECKPOINTS_DIRECTORY_NAME
    for parent in (directory, checkpoints):
        for path in parent.glob(".*.partial-*"):
            path.unlink(missing_ok=True)
    (directory / SUMMARY_FILE_NAME).unlink(missing_ok=True)
    drop_lines_after(directory / GENERATED_FILE_NAME, experiment.first_repeated_step - 1)
    checkpoint = experiment.checkpoint
    if checkpoint is not None and checkpoint.path.name != LAST_FILE_NAME:
        # A damaged last.ckpt must not replace an intact previous.ckpt.
        damaged = checkpoints / LAST_FILE_NAME
        if damaged.exists():
            damaged.rename(damaged.with_name(f"{LAST_FILE_NAME}.damaged"))
        link_checkpoint(checkpoint.path, damaged)
