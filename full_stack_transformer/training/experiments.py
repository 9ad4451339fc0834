"""The experiment directory of a training: a new version, or an existing one to resume.

EXPERIMENTS_ROOT/NAME/VERSION/
    arguments.json               every option, readable again by --config
    experiment.json              the id that its checkpoints carry, and where relative paths begin
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
import json
import logging
import math
import os
import shlex
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from full_stack_transformer.arguments.familiar_options import RENAMED
from full_stack_transformer.arguments.fine_tuning import parsed_replay
from full_stack_transformer.arguments.training import (
    ARGUMENTS_FILE_NAME,
    RESUME_AUTO,
    RunExperimentArguments,
    TrainArguments,
)
from full_stack_transformer.arguments.typed import given_options
from full_stack_transformer.errors import DatasetError, InputError, UsageError
from full_stack_transformer.own_classes import check_trusted, trust_options
from full_stack_transformer.processes import agreed, is_main_process, launch
from full_stack_transformer.storage import (
    claim_version,
    read_json,
    remove_path,
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
    ROWS_PER_BATCH_KEY,
    FoundCheckpoint,
    find_checkpoint,
    link_checkpoint,
    remove_partial,
)

logger = logging.getLogger(__name__)

EXPERIMENT_FILE_NAME = "experiment.json"
DATASET_FILE_NAME = "dataset.json"
CHECKPOINTS_DIRECTORY_NAME = "checkpoints"
TOKENIZER_DIRECTORY_NAME = "tokenizer"

_LIMITS = {"max_epochs", "max_steps", "max_minutes", "early_stopping_patience"}
# Options that a resumed training may change; the others decide what its weights become.
_CHANGEABLE = _LIMITS | {
    *("checkpoint_every_n_minutes", "checkpoints"),
    *("accelerator", "devices", "strategy", "num_nodes", "compile"),
    "batch_size",  # as long as all processes together read the same: `with_same_batches`
    *("data_cache", "data_cache_bytes"),
    *("log_every_n_steps", "num_generated_samples", "histograms", "profile", "enable_progress_bar"),
}
# Where the processes run; decided by each command line, and not saved.
_CLUSTER = {"ray_address", "ray_workers", "max_restarts"}
# Where the data are. Each run may name them anew, as those of --replay; their content is compared by the
# description of the data.
_INPUTS = {"dataset_dir", "train_file", "validation_file", "test_file"}
# What to do after the training; each run may decide anew.
_ACTIONS = {"do_train", "do_eval", "do_predict"}
_PATHS = _INPUTS | {"experiments_root", "data_cache"}
# A path or a name: of a model or tokenizer on the hub, or of a preset.
_PATHS_OR_NAMES = {"model_path", "tokenizer_path", "model_config", "teacher"}
# Options that name a class.
_CLASSES = ("task", "data_class", "model_class")
# They say where the training is, not what it does, or were only needed at its start.
_NOT_COMPARED = {
    *_CLUSTER,
    *("resume", "experiments_root", "experiment_name", "allow_code_from"),
    *("find_learning_rate", "find_batch_size"),
    *_INPUTS,
    "replay",
    *_ACTIONS,
}


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
    id: str = ""
    """What its checkpoints carry, so that those of another training are recognized."""
    checkpoint: FoundCheckpoint | None = None
    """None for a new training."""
    is_resumed: bool = False
    """Whether an earlier run wrote into the directory."""
    is_finished: bool = False
    """Whether there is nothing left to do."""
    saved_batch_size: int | None = None
    """--batch_size of the run before; None for a new training."""

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
        """The command that resumes this training, to be pasted in any directory.

        Options are those of the run, so it names the directory, and classes, whose code runs only if a
        command line names them.
        """
        arguments, launched = self.arguments, launch()
        words = ["fst"]
        if launched is not None and launched.ray_address is not None:
            pass  # the options say it
        elif launched is not None and launched.is_torchrun:
            words = ["torchrun", "--nproc_per_node", str(launched.num_on_this_machine)]
            if launched.num_machines > 1:
                words += ["--nnodes", str(launched.num_machines), "--rdzv_backend", "c10d"]
                words += ["--rdzv_endpoint", "HOST:29400"]
            words += ["-m", "full_stack_transformer"]
        elif launched is not None:
            words = ["srun", "--ntasks-per-node", str(launched.num_on_this_machine), "fst"]
        words.append("run_experiment" if is_own_experiment(arguments) else "train")
        if launched is not None and launched.ray_address is not None:
            words += ["--ray_address", launched.ray_address]
            words += ["--ray_workers", str(launched.num_processes)]
        modules = [module.split(".")[0] for module in arguments.allow_code_from]
        for name in _CLASSES:
            value = getattr(arguments, name, "")
            if "." in value:
                words += [f"--{name}", value]
                modules.append(value.split(".")[0])
        for module in arguments.allow_code_from:
            words += ["--allow_code_from", module]
        words += ["--resume", str(self.directory.absolute())]
        here = Path.cwd()
        is_here = any(
            (here / name).exists() for module in modules for name in (module, f"{module}.py")
        )
        return (
            f"cd {shlex.quote(str(here))} && {shlex.join(words)}" if is_here else shlex.join(words)
        )


def is_own_experiment(arguments: TrainArguments) -> bool:
    """Whether `fst run_experiment` takes these options."""
    return isinstance(arguments, RunExperimentArguments)


def with_found_run(given: TrainArguments) -> TrainArguments:
    """With --resume auto, and where torchrun has started the processes anew: what they go on with.

    That is the newest run of --experiment_name unless it is finished; `resume` is None for a new one.
    """
    launched = launch()
    is_restarted = launched is not None and launched.num_restarts > 0
    if given.resume != RESUME_AUTO and not (is_restarted and given.resume is None):
        return given
    return dataclasses.replace(given, resume=agreed("run", lambda: _unfinished(given)) or None)


def _unfinished(given: TrainArguments) -> str:
    found = versions(given.experiments_root, given.experiment_name)
    if not found or not (found[-1] / ARGUMENTS_FILE_NAME).is_file():
        return ""
    return "" if (found[-1] / SUMMARY_FILE_NAME).is_file() else str(found[-1])


def with_saved_options(given: TrainArguments) -> TrainArguments:
    """With --resume: the options of that run, and of the given ones those that it may change.

    Raises:
        UsageError: there is nothing to resume, or the options differ from those at the start.
    """
    if given.resume is None:
        return given
    directory = given.directory_to_resume()
    if not (directory / ARGUMENTS_FILE_NAME).is_file():  # killed before it started
        return given
    merged = _merged(given, _read_arguments(directory, given), directory)
    return dataclasses.replace(merged, resume=str(directory))


@contextlib.contextmanager
def open_experiment(arguments: TrainArguments, work: ExperimentData) -> Iterator[Experiment]:
    """A new experiment directory, or with --resume that of an interrupted training.

    The directory is locked inside the `with`. Only the main process writes.

    Raises:
        UsageError: there is nothing to resume, or the options differ from those at the start.
        DatasetError: the dataset differs from the one at the start.
        TrainingError: none of its checkpoints can be read.
    """
    is_new = arguments.resume is None
    if is_new:
        root, name = arguments.experiments_root, arguments.experiment_name
        directory = Path(
            agreed("directory", lambda: str(claim_version(root, name)), otherwise=str(root / name))
        )
    else:
        directory = arguments.directory_to_resume()
        arguments = dataclasses.replace(arguments, resume=None)
    if not is_main_process():
        yield Experiment(directory, arguments) if is_new else _resumed(directory, arguments, work)
        return
    with _locked(directory):
        found = _found if is_new else _resumed
        experiment = found(directory, arguments, work)
        try:
            if not experiment.is_finished:
                _write_start(experiment, work)
            yield experiment
        except (Exception, KeyboardInterrupt):
            if not experiment.is_resumed:
                _remove_if_nothing_was_learned(directory)
            raise


def _write_start(experiment: Experiment, work: ExperimentData) -> None:
    if experiment.is_resumed:
        _remove_repeated(experiment)
    facts: dict[str, Any] = {"id": experiment.id, "working_directory": str(Path.cwd())}
    if experiment.checkpoint is not None and experiment.checkpoint.rows_per_batch is not None:
        # Known to a run that is killed before its first checkpoint, and after --batch_size changed.
        facts[ROWS_PER_BATCH_KEY] = experiment.checkpoint.rows_per_batch
    write_json(experiment.directory / EXPERIMENT_FILE_NAME, facts)
    write_arguments(experiment)
    write_json(experiment.directory / DATASET_FILE_NAME, work.description)
    for path in (experiment.directory.parent, experiment.directory.parent.parent):
        sync_directory(path)


def write_arguments(experiment: Experiment) -> None:
    """Write arguments.json: every option as --config reads it; unset ones are left out."""
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(experiment.arguments).items()
        # Whose code runs, and where, is decided by each command line.
        if value is not None and name not in {"allow_code_from", *_CLUSTER}
    }
    assert all(not isinstance(value, float) or math.isfinite(value) for value in options.values())
    write_json(experiment.directory / ARGUMENTS_FILE_NAME, options)


def _resumed(directory: Path, given: TrainArguments, work: ExperimentData) -> Experiment:
    """What the main process finds in the directory, in each of them: meanwhile it changes the files."""
    found: list[Experiment] = []

    def decide() -> str:
        found.append(_found(directory, given, work))
        facts = {
            field.name: getattr(found[0], field.name) for field in dataclasses.fields(Experiment)
        }
        checkpoint = found[0].checkpoint
        facts["checkpoint"] = None if checkpoint is None else dataclasses.asdict(checkpoint)
        return json.dumps({**facts, "directory": None, "arguments": None}, default=str)

    told = agreed("experiment", decide)
    if found or not told:
        return found[0] if found else _found(directory, given, work)
    facts = json.loads(told)
    if facts["checkpoint"] is not None:
        path = Path(facts["checkpoint"]["path"])
        facts["checkpoint"] = FoundCheckpoint(**{**facts["checkpoint"], "path": path})
    arguments = given
    if facts["is_resumed"]:
        _check_dataset(directory, work)
        arguments = _merged(given, _read_arguments(directory, given), directory)
    return Experiment(**{**facts, "directory": directory, "arguments": arguments})


def _found(directory: Path, given: TrainArguments, work: ExperimentData) -> Experiment:
    """The experiment in the directory; changes nothing."""
    own_id = str(_facts(directory).get("id") or "")
    if not (directory / ARGUMENTS_FILE_NAME).is_file():  # new, or killed before it started
        return Experiment(directory, given, id=uuid.uuid4().hex)
    saved = _read_arguments(directory, given)
    _check_dataset(directory, work)
    arguments = _merged(given, saved, directory)
    if is_main_process():
        for name in sorted(_CHANGEABLE):
            if getattr(arguments, name) != getattr(saved, name):
                values = (name, getattr(arguments, name), getattr(saved, name))
                logger.info("--%s is now %s; it was %s", *values)
    limits_are_the_same = all(getattr(arguments, name) == getattr(saved, name) for name in _LIMITS)
    if (directory / SUMMARY_FILE_NAME).is_file() and limits_are_the_same:
        return Experiment(directory, arguments, own_id, is_resumed=True, is_finished=True)
    checkpoint, skipped = find_checkpoint(directory / CHECKPOINTS_DIRECTORY_NAME, own_id)
    for path, reason in skipped.items():
        logger.warning("%s cannot be used (%s): resuming from an earlier one", path, reason)
    found = Experiment(
        directory, arguments, own_id or uuid.uuid4().hex, checkpoint, is_resumed=True
    )
    if checkpoint is not None and checkpoint.rows_per_batch is None:  # of an older version
        rows_per_batch = _facts(directory).get(ROWS_PER_BATCH_KEY)
        rows_per_batch = rows_per_batch or checkpoint.world_size * saved.batch_size
        checkpoint = dataclasses.replace(checkpoint, rows_per_batch=rows_per_batch)
    return dataclasses.replace(found, checkpoint=checkpoint, saved_batch_size=saved.batch_size)


def with_same_batches(experiment: Experiment, num_processes: int) -> Experiment:
    """With the --batch_size by which so many processes go on with the batches of the checkpoint.

    Raises:
        UsageError: another one was given, or they cannot share them evenly.
    """
    checkpoint, arguments = experiment.checkpoint, experiment.arguments
    if checkpoint is None or checkpoint.rows_per_batch is None:
        return experiment
    needed, rest = divmod(checkpoint.rows_per_batch, num_processes)
    given = arguments.batch_size
    if rest or given not in (needed, experiment.saved_batch_size):
        remedy = (
            f"train with a number of processes that divides {checkpoint.rows_per_batch}"
            if rest
            else f"pass --batch_size {needed}, or leave it out"
        )
        raise UsageError(
            f"all processes of the training in {experiment.directory} together read "
            f"{checkpoint.rows_per_batch} samples a batch; {num_processes} with --batch_size {given} would "
            f"read {num_processes * given}: {remedy}"
        )
    if needed == given:
        return experiment
    if is_main_process():
        logger.info(
            "--batch_size is now %s: the batches of %s processes for %s",
            *(needed, checkpoint.world_size, num_processes),
        )
    return dataclasses.replace(
        experiment, arguments=dataclasses.replace(arguments, batch_size=needed)
    )


def _facts(directory: Path) -> dict[str, Any]:
    """The content of experiment.json; empty for an experiment from before there was one."""
    file = directory / EXPERIMENT_FILE_NAME
    return read_json(file) if file.is_file() else {}


def _read_arguments(directory: Path, given: TrainArguments) -> TrainArguments:
    """The options of the run; relative paths begin where it was started.

    Raises:
        UsageError: the other command started it.
        InputError: another version wrote them.
    """
    path = directory / ARGUMENTS_FILE_NAME
    content: dict[str, Any] = {
        RENAMED.get(name, name): value for name, value in read_json(path).items()
    }
    is_own = "data_class" in content or "model_class" in content
    if is_own != is_own_experiment(given):
        command = "run_experiment" if is_own else "train"
        raise UsageError(
            f"fst {command} started the training in {directory}; resume it with fst {command} too"
        )
    start = Path(str(_facts(directory).get("working_directory", ".")))
    for name in (_INPUTS | _PATHS_OR_NAMES) & content.keys():
        value = Path(str(content[name]))
        if start != Path.cwd() and not value.is_absolute() and (start / value).exists():
            content[name] = str(start / value)
    content["replay"] = tuple(
        f"{start / place if start != Path.cwd() and (start / place).exists() else place}:{share}"
        for place, share in parsed_replay(content.get("replay", ()))
    )
    for name in _PATHS & content.keys():
        content[name] = Path(content[name])
    try:
        return type(given)(**content)
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
    """The options of the run, with the given ones that may change.

    Raises:
        UsageError: another one was given, or a class of the run was not.
    """
    chosen = given_options(given)
    differing = {
        name: getattr(given, name)
        for name in chosen - _NOT_COMPARED
        if not _means_the_same(name, getattr(given, name), getattr(saved, name))
    }
    for flag, name in (
        (given.find_learning_rate, "learning_rate"),
        (given.find_batch_size, "batch_size"),
    ):
        if flag:  # the same command again: the value that it found is saved
            differing.pop(name, None)
    refused = sorted(differing.keys() - _CHANGEABLE)
    if refused:
        differences = "; ".join(
            f"--{name} {differing[name]} (was {getattr(saved, name)})" for name in refused
        )
        raise UsageError(
            f"--resume uses the options in {directory / ARGUMENTS_FILE_NAME}; these cannot change: "
            f"{differences}; leave them out, or start a new training without --resume"
        )
    trust_options(given)
    for name in _CLASSES:
        check_trusted(getattr(saved, name, ""), name, directory / ARGUMENTS_FILE_NAME)
    kept = {name for names in (_INPUTS, _ACTIONS) if not names & chosen for name in names}
    return dataclasses.replace(
        saved,
        **differing,
        **{name: getattr(given, name) for name in (_INPUTS | _ACTIONS) - kept},
        replay=(given if "replay" in chosen else saved).replay,
        allow_code_from=given.allow_code_from,
        experiments_root=directory.parent.parent,
        experiment_name=directory.parent.name,
    )


def _means_the_same(name: str, value: Any, saved: Any) -> bool:
    if name not in _PATHS_OR_NAMES or value is None or saved is None:
        return bool(value == saved)
    return value == saved or Path(value).resolve() == Path(saved).resolve()


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


def _remove_if_nothing_was_learned(directory: Path) -> None:
    """Remove the version of a training that was refused or failed before its first checkpoint."""
    if not any((directory / CHECKPOINTS_DIRECTORY_NAME).glob("*.ckpt")):
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # there are other versions
            directory.parent.rmdir()


def _remove_repeated(experiment: Experiment) -> None:
    """Remove unfinished files of killed runs, and what was written after the checkpoint."""
    directory = experiment.directory
    checkpoints = directory / CHECKPOINTS_DIRECTORY_NAME
    for parent in (directory, checkpoints):
        remove_partial(parent)
    (directory / SUMMARY_FILE_NAME).unlink(missing_ok=True)
    drop_lines_after(directory / GENERATED_FILE_NAME, experiment.first_repeated_step - 1)
    checkpoint = experiment.checkpoint
    if checkpoint is not None and checkpoint.path.name != LAST_FILE_NAME:
        # A damaged last.ckpt must not replace an intact previous.ckpt.
        damaged = checkpoints / LAST_FILE_NAME
        if damaged.exists():
            aside = damaged.with_name(f"{LAST_FILE_NAME}.damaged")
            remove_path(aside)
            damaged.rename(aside)
        link_checkpoint(checkpoint.path, damaged)
