"""What can be told of a command before its module is imported: paths, files and ports that are wrong.

Importing torch takes seconds; these checks take milliseconds. The commands check again when they open what is
named here, since a file may disappear meanwhile.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from full_stack_transformer.arguments import data, models, serving, training
from full_stack_transformer.arguments.fine_tuning import parsed_replay
from full_stack_transformer.errors import (
    DatasetError,
    InputError,
    MachineError,
    ModelError,
    RowError,
    TokenizerError,
    UsageError,
)
from full_stack_transformer.machine import listen
from full_stack_transformer.modelling.model_files import (
    check_generates,
    check_model_files,
    find_model_directory,
    read_config,
    rounded_files,
    weight_files,
)
from full_stack_transformer.modelling.places import adapter_directory, check_models
from full_stack_transformer.object_storage import is_url
from full_stack_transformer.tasks.catalogue import CORPUS_TASKS, TASKS

_STANDARD_INPUT = "-"


def check_first(options: object) -> None:
    """Check the paths and ports of a command.

    Raises:
        UsageError: an option contradicts what is there.
        InputError: a file or directory does not exist.
        MachineError: a port is taken, or a directory cannot be written.
    """
    check_models(options)
    for options_class, check in _CHECKS.items():
        if isinstance(options, options_class):
            check(options)


def _check_training(options: training.TrainArguments) -> None:
    if options.resume not in (None, training.RESUME_AUTO):  # its saved options decide
        options.directory_to_resume()
        return
    _check_writable(options.experiments_root, "--experiments_root")
    for flag, path in (
        ("--train_file", options.train_file),
        ("--validation_file", options.validation_file),
        ("--test_file", options.test_file),
    ):
        _check_rows(path, flag)
    _check_tokenizer(options.tokenizer_path)
    if options.teacher is not None:
        check_model_files(find_model_directory(Path(options.teacher)))
    _check_model_config(options.model_config)
    has_own_data = bool(getattr(options, "data_class", "") or getattr(options, "model_class", ""))
    if options.task not in TASKS or has_own_data:
        return
    reads_datasets = options.task in CORPUS_TASKS
    options.check_data(reads_datasets=reads_datasets)
    if options.dataset_dir is None:
        return
    if reads_datasets:
        from full_stack_transformer.datasets.corpus import open_dataset

        for place in (options.dataset_dir, *(place for place, _ in parsed_replay(options.replay))):
            open_dataset(place, options)
    else:
        _check_directory_of_rows(options.dataset_dir)


def _check_directory_of_rows(path: Path) -> None:
    from full_stack_transformer.rows.splits import find_splits

    if path.is_dir():
        find_splits(path)
    elif not path.exists() and (_is_path(str(path)) or find_spec("datasets") is None):
        raise RowError(
            f"--dataset_dir {path} does not exist; expected a directory with train, valid and test rows, or "
            "a data set of the Hugging Face hub with the package datasets installed (pip install datasets)"
        )


def _check_model_config(name: str) -> None:
    is_preset = name.removeprefix("encoder-").removeprefix("decoder-") in training.MODEL_PRESETS
    if not is_preset and not Path(name).is_file():
        raise UsageError(
            f"--model_config must be one of {', '.join(training.MODEL_PRESETS)}, or a JSON file; found "
            f"{name!r}"
        )


def _check_evaluation(options: models.EvaluateArguments) -> None:
    _check_readable(options.harness, "--harness")
    _check_rows(options.train_file, "--train_file")
    for path in (options.dataset_dir, *options.more_datasets):
        if path is not None and not is_url(path) and not path.exists():
            raise DatasetError(
                f"{path} does not exist; expected a dataset directory, or a file or directory of labelled "
                "rows"
            )
    _check_writable(options.output_dir, "--output_dir")


def _check_generation(options: models.GenerateArguments) -> None:
    _check_readable(options.prompt_file, "--prompt_file")


def _check_averaging(options: models.AverageCheckpointsArguments) -> None:
    _check_new_directory(options.output_dir)


def _check_merging(options: models.MergeArguments) -> None:
    if not options.adapter.is_dir():
        raise ModelError(
            f"{options.adapter} does not exist; expected an adapter directory, or an experiment that trained "
            "one"
        )
    _check_writable(options.output_dir, "--output_dir")


def _check_whitening(options: models.WhitenArguments) -> None:
    _check_new_directory(options.output_dir)
    for path in options.texts:
        if str(path) != _STANDARD_INPUT and not path.exists():
            raise InputError(f"TEXTS {path} does not exist; expected a file or directory of texts")


def _check_quantizing(options: models.QuantizeArguments) -> None:
    directory = find_model_directory(options.model)
    check_generates(read_config(directory), directory)
    if not weight_files(directory):
        raise ModelError(
            f"{directory} holds rounded weights already ({rounded_files(directory)[0].name}); name the model "
            "that they were made from"
        )
    if options.calibration is not None and not options.calibration.exists():
        raise UsageError(
            f"--calibration {options.calibration} does not exist; expected a text file or a dataset directory"
        )
    if options.output is not None:
        if options.output.exists():
            raise UsageError(f"--output {options.output} exists; name a directory that does not")
        _check_writable(options.output, "--output")
    else:
        _check_writable(directory, "MODEL")


def _check_serving(options: serving.ServeArguments) -> None:
    _check_readable(options.api_keys_file, "--api_keys_file")
    _check_readable(options.admin_keys_file, "--admin_keys_file")
    for word in options.adapters:
        adapter_directory(Path(word.partition("=")[2]))
    if options.adapters_root is not None and not options.adapters_root.is_dir():
        raise UsageError(
            f"--adapters_root {options.adapters_root} is no directory; name the one that holds the adapters"
        )
    _check_port(options.host, options.port)


def _check_bot(options: serving.TelegramBotArguments) -> None:
    _check_writable(options.database.parent, "--database")
    if options.monitoring_port is not None:
        _check_port("127.0.0.1", options.monitoring_port, "--monitoring_port")
    if options.webhook_url is not None:
        _check_port(options.webhook_host, options.webhook_port, "--webhook_port")


def _check_tensorboard(options: training.TensorboardArguments) -> None:
    if not options.experiments_root.is_dir():
        raise InputError(
            f"{options.experiments_root} does not exist; expected the directory of experiments that "
            "fst train writes (--experiments_root)"
        )
    _check_port(options.host, options.port)


def _check_demo(options: data.DemoArguments) -> None:
    _check_writable(options.root, "--root")
    if options.serve:
        _check_port("127.0.0.1", options.port)
        if not options.chat:
            _check_port("127.0.0.1", options.tensorboard_port, "--tensorboard_port")


def _check_tokenizer(name: str | None) -> None:
    if name is not None and _is_path(name) and not Path(name).exists():
        raise TokenizerError(
            f"--tokenizer_path {name} does not exist; expected a directory, or a name on the hub"
        )


def _is_path(name: str) -> bool:
    """Whether it cannot be NAME or OWNER/NAME on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _check_rows(path: Path | None, flag: str) -> None:
    if path is not None and not path.exists():
        raise RowError(f"{flag} {path} does not exist; expected a file or folder of labelled rows")


def _check_readable(path: Path | None, flag: str) -> None:
    """Refuse a file that cannot be read; a pipe is not opened, which would take its content."""
    if path is None or str(path) == _STANDARD_INPUT:
        return
    if not path.exists():
        raise UsageError(f"{flag} {path}: No such file or directory")
    if path.is_dir() or not os.access(path, os.R_OK):
        reason = "Is a directory" if path.is_dir() else "Permission denied"
        raise UsageError(f"{flag} {path}: {reason}; expected a file that can be read")


def _check_new_directory(path: Path) -> None:
    if path.exists():
        raise UsageError(f"--output_dir {path} exists; name a directory that does not")
    _check_writable(path, "--output_dir")


def _check_writable(directory: Path | None, flag: str) -> None:
    """Refuse a directory that can neither be written nor made."""
    if directory is None:
        return
    nearest = directory
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UsageError(f"{flag} {directory}: {nearest} is a file; name a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise MachineError(f"{flag} {directory}: no permission to write in {nearest.absolute()}")


def _check_port(host: str, port: int, flag: str = "--port") -> None:
    listen(host, port, flag).close()


# Options of a command -> what is checked.
_CHECKS: dict[type, Callable[[Any], None]] = {
    data.CollectDocumentsArguments: lambda options: _check_writable(
        options.documents_root, "--documents_root"
    ),
    data.PrepareDatasetArguments: lambda options: (
        None
        if is_url(options.datasets_root)
        else _check_writable(options.datasets_root, "--datasets_root")
    ),
    training.TrainArguments: _check_training,
    models.AverageCheckpointsArguments: _check_averaging,
    models.MergeArguments: _check_merging,
    models.WhitenArguments: _check_whitening,
    models.QuantizeArguments: _check_quantizing,
    models.EvaluateArguments: _check_evaluation,
    models.GenerateArguments: _check_generation,
    serving.ServeArguments: _check_serving,
    serving.TelegramBotArguments: _check_bot,
    training.TensorboardArguments: _check_tensorboard,
    data.DemoArguments: _check_demo,
}
