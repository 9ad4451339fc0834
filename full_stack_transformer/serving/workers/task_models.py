"""A model of another task than generating, as it is served."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from full_stack_transformer.errors import ModelError
from full_stack_transformer.modelling.model_directory import find_model_directory, name_of_model
from full_stack_transformer.serving.schemas import ServedModelFacts
from full_stack_transformer.serving.workers.facts import facts_of
from full_stack_transformer.tasks.opening import OpenedTask, open_task
from full_stack_transformer.tasks.task import RowTask


@dataclass(frozen=True, eq=False)
class ServedTask:
    """One model, ready to predict."""

    name: str
    path: Path
    signature: object
    """Tells one content of the directory from the next."""
    opened: OpenedTask
    loaded_at: int
    num_swaps: int = 0

    @property
    def description(self) -> dict[str, Any]:
        """That of the model directory."""
        return self.opened.description

    @property
    def task(self) -> RowTask:
        """What it does."""
        return self.opened.row_task

    @property
    def makes_vectors(self) -> bool:
        """Whether its predictions are vectors of texts."""
        return any(route.needs_vectors for route in self.task.routes)

    @property
    def facts(self) -> ServedModelFacts:
        """What people may know of it."""
        task = self.task
        weights = next(self.opened.backbone.parameters())
        return facts_of(
            self,
            task=task.name,
            context_tokens=task.options.max_length,
            computed_by=f"PyTorch, {str(weights.dtype).removeprefix('torch.')} on {weights.device}",
            control_tokens=task.control_tokens,
            form=_shown(task),
        )


def _shown(task: RowTask) -> dict[str, Any]:
    """The form of the task, whose hint names the mask of this model."""
    if task.form is None:
        return {}
    form = asdict(task.form)
    if task.control_tokens:
        form["hint"] = form["hint"].replace("MASK", task.control_tokens[0])
    return form


def open_served_task(
    name: str | None, path: Path, signature: object, *, device: str, weights_dtype: str
) -> ServedTask:
    """Open a model of another task than generating.

    Raises:
        ModelError: it cannot be opened, or not with weights of this type.
    """
    if weights_dtype == "int8":
        raise ModelError(f"{path}: int8 is for models that generate; pass --weights_dtype auto")
    dtype = torch.bfloat16 if weights_dtype == "bfloat16" else torch.float32
    opened = open_task(path, device=device, dtype=dtype)
    _ = opened.row_task  # a model without rows is refused now, not by its first request
    return ServedTask(
        name=name or name_of_model(find_model_directory(path)),
        path=path,
        signature=signature,
        opened=opened,
        loaded_at=int(time.time()),
    )
