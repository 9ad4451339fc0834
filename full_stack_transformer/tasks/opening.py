"""The class of a task by its name, the task of a saved model, and opening one with the head of its task."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.modelling.adapters import merge_adapter
from full_stack_transformer.modelling.backbones import convert, describe
from full_stack_transformer.modelling.model_directory import (
    backbone_of_checkpoint,
    moved,
    resolve_device,
)
from full_stack_transformer.modelling.places import find_model
from full_stack_transformer.modelling.pretrained import load_backbone, open_config
from full_stack_transformer.own_classes import class_of_file, class_of_option, trust
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME
from full_stack_transformer.tasks.catalogue import TASKS
from full_stack_transformer.tasks.task import RowTask, Task

_DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class OpenedTask:
    """A model with its task, in evaluation mode."""

    directory: Path
    task: Task
    backbone: Backbone
    description: dict[str, Any]

    @property
    def name(self) -> str:
        """That of the task."""
        return self.task.name

    def predict(self, rows: Any, *, batch_size: int = 32) -> list[Any]:
        """JSON for each row.

        Raises:
            ModelError: the task has no rows.
            RowError: a row does not fit the task.
        """
        return self.row_task.predict(rows, self.backbone, batch_size=batch_size)

    @property
    def row_task(self) -> RowTask:
        """The task, which takes rows.

        Raises:
            ModelError: it does not.
        """
        if not isinstance(self.task, RowTask):
            raise ModelError(f"{self.directory}: a model for {self.name} takes no labelled rows")
        return self.task


def task_class(name: str, place: Path | None = None) -> type[Task]:
    """The class of a task: one of the catalogue by its name, or my_module.MyTask.

    Args:
        name: what --task names.
        place: the file that names it instead.

    Raises:
        UsageError: there is none.
        InputError: the file names a class of a module that is not trusted.
    """
    if name in TASKS:
        module, _, class_name = TASKS[name].partition(":")
        found = getattr(importlib.import_module(f"{__package__}.{module}"), class_name)
    elif place is None:
        found = class_of_option(name, "task", "a task")
    else:
        found = class_of_file(name, place, "a task")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UsageError(
            f"{name} is no task; expected one of {', '.join(TASKS)} or my_module.MyTask"
        )
    return found


def row_task_class(name: str) -> type[RowTask]:
    """The same of a task that takes labelled rows.

    Raises:
        UsageError: it takes none.
    """
    found = task_class(name)
    if not issubclass(found, RowTask):
        raise UsageError(f"--task {name} takes no labelled rows")
    return found


def path_of(cls: type) -> str:
    """How an option or a description names a class: my_module.MyClass."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_own(cls: type) -> bool:
    """Whether a class is of another package than this one."""
    return cls.__module__.split(".")[0] != __package__.split(".")[0]


def task_class_of(directory: Path, adapter: Path | None = None) -> type[Task]:
    """The task of a model: what its description names, or what fits its files and architecture.

    Args:
        directory: of the model.
        adapter: that is added to it, with a description of its own.

    Raises:
        ModelError: nothing fits.
    """
    file = (adapter or directory) / DESCRIPTION_FILE_NAME
    description = _read(file)
    if "task_class" in description:
        return task_class(str(description["task_class"]), file)
    classes = {name: task_class(name) for name in TASKS}
    for cls in classes.values():
        if cls.marker_file and (directory / cls.marker_file).is_file():
            return cls
    architecture = _architecture(directory)
    # Several tasks may use one head: then the description decides.
    named = classes.get(str(description.get("task")))
    for cls in (*([named] if named else []), *classes.values()):
        if architecture.endswith(cls.heads):
            return cls
    raise ModelError(
        f"{directory / 'config.json'} names the class {architecture!r}, which has a head of no task here: "
        f"{', '.join(TASKS)}"
    )


def row_task_class_of(directory: Path) -> type[RowTask]:
    """The task that a model does with labelled rows: its own, or the first one that can use its head.

    Raises:
        ModelError: nothing fits.
    """
    own = task_class_of(directory)
    if issubclass(own, RowTask):
        return own
    architecture = _architecture(directory)
    for name in TASKS:
        cls = task_class(name)
        if issubclass(cls, RowTask) and architecture.endswith(cls.heads):
            return cls
    raise ModelError(f"{directory}: a model for {own.name} takes no labelled rows")


def task_of_head(class_name: str) -> str | None:
    """The task whose head the name of a model's class tells of; None for a body or an unknown head."""
    for name in TASKS:
        heads = [head for head in task_class(name).heads if head.startswith("For")]
        if class_name.endswith(tuple(heads)):
            return name
    return None


def open_task(
    path: Path,
    *,
    base: str | None = None,
    cls: type[Task] | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    allow_code_from: Sequence[str] = (),
) -> OpenedTask:
    """Open a model with its task; see `find_model` for what `path` may be.

    Args:
        path: where the model is.
        base: of an adapter, if it is not the one that it names.
        cls: a task that the model can do beside its own, such as choosing by a causal model.
        device: where to compute.
        dtype: of the weights.
        allow_code_from: modules whose classes the model may name.

    Raises:
        ModelError: there is none, it lacks tensors, or tokenizer and weights do not fit.
        InputError: it names a class of another module.
    """
    trust(allow_code_from)
    place = find_model(path, base)
    directory, file = place.directory, place.own / DESCRIPTION_FILE_NAME
    cls = cls or task_class_of(directory, place.adapter)
    description = _read(file)
    if "model_class" in description:
        _import_model_class(description["model_class"], file)
    config = open_config(directory)
    tokenizer = cls.open_tokenizer(place.tokenizer)
    # The model may have been saved by another task, with options that this one does not know.
    known = {field.name for field in fields(cls.options_class)}
    saved = {name: value for name, value in cls.options_of(description).items() if name in known}
    options = cls.options_class(**{**saved, "max_length": _max_length(tokenizer, config)})
    task = cls.open(config, tokenizer, options)
    model_class = cls.backbone_class(config)
    if place.adapter is not None:
        backbone = convert(_merged(place.adapter, directory, model_class), dtype)
    elif path.suffix == ".ckpt":
        backbone = backbone_of_checkpoint(path, directory, dtype, model_class)
    else:
        backbone = load_backbone(str(directory), dtype=dtype, model_class=model_class)
    num_embeddings = backbone.get_input_embeddings().num_embeddings
    if task.vocab_size > num_embeddings:
        raise ModelError(
            f"{place.own}: the tokenizer has {task.vocab_size:,} tokens, the model {num_embeddings:,} "
            "embeddings; they do not belong together"
        )
    where = resolve_device(device)
    task.read_directory(directory, where)
    return OpenedTask(place.own, task, moved(backbone, where).eval(), description)


def _merged(adapter: Path, base: Path, model_class: Any) -> Backbone:
    """An adapter of a causal language model added to its base; for vectors the body of that.

    Raises:
        ModelError: the task needs another head, or the adapter does not fit.
    """
    if model_class not in (AutoModelForCausalLM, AutoModel):
        raise ModelError(
            f"the adapter {adapter} is for a model that continues texts, and this task needs "
            f"{describe(model_class)}; name a model with such a head"
        )
    merged = merge_adapter(adapter, base=str(base))
    return cast(Backbone, merged.base_model) if model_class is AutoModel else merged


def _architecture(directory: Path) -> str:
    """The model class that config.json names, or an empty string."""
    named = _read(directory / "config.json").get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _import_model_class(name: object, place: Path) -> None:
    """Import one's own model class, whose module registers it with transformers, which knows its own."""
    if not (isinstance(name, str) and name.startswith("transformers.")):
        class_of_file(name, place, "a model class")


def _max_length(tokenizer: Any, config: PretrainedConfig) -> int:
    """What both allow; a tokenizer without a limit says 1e30, or nothing."""
    of_model = getattr(config, "max_position_embeddings", None) or _DEFAULT_MAX_LENGTH
    return int(min(getattr(tokenizer, "model_max_length", of_model), of_model))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} should hold JSON, but is damaged: {error}") from error
    return content if isinstance(content, dict) else {}
