"""Several processes that train together: which one writes, and a value that all agree on."""

import os

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only


def is_main_process() -> bool:
    """Whether this process writes; known before Lightning has connected the processes."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return bool(rank_zero_only.rank == 0 and node == "0")  # type: ignore[attr-defined]


def greatest(trainer: pl.Trainer, value: float) -> float:
    """The largest `value` of all processes; all of them must call this."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(tensor, reduce_op="max"))
