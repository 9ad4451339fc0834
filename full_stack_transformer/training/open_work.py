"""Which work the options name: that of a task, or one with classes of one's own."""

import dataclasses
from typing import Any

from full_stack_transformer.arguments.training import (
    CORPUS_TASKS,
    RunExperimentArguments,
    TrainArguments,
)
from full_stack_transformer.errors import UsageError
from full_stack_transformer.tasks.catalogue import TASKS, head_of, import_by_path, task_class
from full_stack_transformer.tasks.task import Task
from full_stack_transformer.training.corpus_work import LanguageModelWork
from full_stack_transformer.training.data.rows import BaseDataModule, FileRows
from full_stack_transformer.training.rows_work import RowsWork
from full_stack_transformer.training.work import Work


def open_work(arguments: TrainArguments) -> Work:
    """The work that the options name."""
    if arguments.task in CORPUS_TASKS:
        return LanguageModelWork(arguments)
    return RowsWork(arguments, FileRows(arguments), task_class(arguments.task))


def open_own_work(arguments: RunExperimentArguments) -> Work:
    """The work that classes of one's own make.

    Raises:
        UsageError: a class cannot be imported, or is none of what is expected.
    """
    data_class: Any = FileRows
    if arguments.data_class:
        data_class = import_by_path(arguments.data_class, "a data set")
        if not (isinstance(data_class, type) and issubclass(data_class, BaseDataModule)):
            raise UsageError(
                f"--data_class {arguments.data_class} should derive from {BaseDataModule.__module__}."
                f"{BaseDataModule.__name__}"
            )
    task: type[Task] | None = None
    model_class: Any = None
    if arguments.model_class:
        found = import_by_path(arguments.model_class, "a model or a task")
        if isinstance(found, type) and issubclass(found, Task):
            task = found
        elif hasattr(found, "from_pretrained"):
            model_class = found
        else:
            raise UsageError(
                f"--model_class {arguments.model_class} should be a model class of transformers, or derive "
                f"from {Task.__module__}.{Task.__name__}"
            )
    data = data_class(arguments)
    name = data.task_name if task is None or task.name not in TASKS else task.name
    head = head_of(model_class.__name__) if model_class is not None else None
    if head not in (None, name):
        raise UsageError(
            f"--model_class {arguments.model_class} has the head of {head}, but the rows are for {name}"
        )
    arguments = dataclasses.replace(arguments, task=name)  # type: ignore[arg-type]
    return RowsWork(arguments, data, task or task_class(name), model_class=model_class)
