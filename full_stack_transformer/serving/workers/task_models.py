"""A model of another task than generating, as it is served."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from full_stack_transformer.errors import ModelError
from full_stack_transformer.modelling.model_directory import find_model_directory, name_of_model
from full_stack_transformer.serving.schemas import ServedModelFacts
from full_stack_transformer.serving.workers.facts import facts_of
from full_stack_transformer.tasks.catalogue import OpenedTask, open_task


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
    def facts(self) -> ServedModelFacts:
        """What people may know of it."""
        backbone, task = self.opened.backbone, self.opened.task
        weights = next(backbone.parameters())
        mask = task.tokenizer.mask_token if self.opened.name == "masked_lm" else None
        return facts_of(
            self,
            task=self.opened.name,
            context_tokens=task.options.max_length,
            computed_by=f"PyTorch, {str(weights.dtype).removeprefix('torch.')} on {weights.device}",
            control_tokens=[str(mask)] if mask else [],
        )


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
    return ServedTask(
        name=name or name_of_model(find_model_directory(path)),
        path=path,
        signature=signature,
        opened=opened,
        loaded_at=int(time.time()),
    )
