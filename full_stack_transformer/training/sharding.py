"""FSDP2: each process keeps a part of every weight, gradient and optimizer state (Zhao et al. 2023, arXiv
2304.11277).

    whole model ──shard──> parts ──layer by layer, gathered for forward and backward──> parts of the gradient
                             ├──whole_weights──> model directory, the same as of one process
                             └──> sharded checkpoint, or gathered the file of one process

Lightning's `ModelParallelStrategy` (2.6.6) names optimizer states by the order of the model's parameters, a
file of one process by that of the optimizer's groups; what one writes the other would read in a wrong order,
in silence. Here both are numbered as by one process, so that a training goes on with any number of processes.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel as Backbone
from transformers.modeling_layers import GradientCheckpointingLayer

from full_stack_transformer.modelling.checkpoint_parts import read_parts, read_values

STRATEGY_NAMES = ("fsdp", "fsdp2")


class ShardedStrategy(ModelParallelStrategy):
    """All processes share one model; no tensor parallelism."""

    checkpoint_io: CheckpointIO
    gathers_checkpoints = True
    """Whether the main process gets whole tensors to save; else each process its parts."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning calls `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Connect the processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights to save; all processes must call it."""
        assert self.lightning_module is not None
        if not self.gathers_checkpoints:
            return dict(self.lightning_module.state_dict())
        weights = whole_weights(self.lightning_module)
        return weights if self.is_global_zero else {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The same of an optimizer."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        content = optimizer.state_dict()
        content["state"] = {
            number: {name: self._to_save(value) for name, value in state.items()}
            for number, state in content["state"].items()
        }
        return content if self.is_global_zero or not self.gathers_checkpoints else {}

    def _to_save(self, value: Any) -> Any:
        is_part = isinstance(value, DTensor) and value.ndim > 0 and not self.gathers_checkpoints
        return value if is_part else _whole(value)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a file of one process."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """A file of one process, or this process's parts of a directory."""
        if Path(checkpoint_path).is_dir():
            return read_parts(Path(checkpoint_path), like=self._sharded_alike(checkpoint_path))
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def _sharded_alike(self, directory: Any) -> Callable[[list[str | int]], Tensor | None]:
        """For the path of a tensor in a checkpoint the parameter whose parts are those of this process."""
        assert self.lightning_module is not None
        alike: dict[tuple[Any, ...], Tensor] = {
            ("state_dict", name): value
            for name, value in self.lightning_module.state_dict(keep_vars=True).items()
        }
        for index, content in enumerate(read_values(Path(directory))["optimizer_states"]):
            for number, parameter in _numbered(content, self.optimizers[index]).items():
                alike["optimizer_states", index, "state", number] = parameter
        return lambda path: alike.get(tuple(path), alike.get(tuple(path[:-1])))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's parts."""
        assert self.lightning_module is not None
        current = self.lightning_module.state_dict(keep_vars=True)
        parts = {
            name: _part(value, current[name]) if name in current else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The same of the optimizers."""
        for optimizer, content in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            like = _numbered(content, optimizer)
            parts = {
                number: {name: _part(value, like[number]) for name, value in state.items()}
                for number, state in content["state"].items()
            }
            optimizer.load_state_dict({**content, "state": parts})


def _numbered(
    content: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> dict[int, nn.Parameter]:
    """The parameters of an optimizer by the numbers that its saved state gives them."""
    numbers = [n for group in content["param_groups"] for n in group["params"]]
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    return dict(zip(numbers, parameters, strict=True))


def shard(backbone: Backbone, mesh: DeviceMesh) -> Backbone:
    """Keep this process's part of each parameter; layers are gathered one by one.

    Returns:
        A copy without weights, to fill with whole ones.
    """
    skeleton = _without_weights(backbone)
    for layer in backbone.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, mesh=mesh)
    fully_shard(backbone, mesh=mesh)
    return skeleton


def _without_weights(backbone: Backbone) -> Backbone:
    # What a deep copy finds in its memo it does not copy.
    memo: dict[int, Any] = {
        id(one): nn.Parameter(one.detach().to("meta"), requires_grad=one.requires_grad)
        for one in backbone.parameters()
    }
    return copy.deepcopy(backbone, memo)


def whole_weights(module: nn.Module) -> dict[str, Any]:
    """Parameters and buffers by name, whole and on the processor; all processes must call it.

    Two names of one parameter have one tensor.
    """
    found: dict[int, Any] = {}
    weights = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in found:
            found[id(value)] = _whole(value)
        weights[name] = found[id(value)]
    return weights


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether each process has but a part of the weights."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def filled(skeleton: Backbone, weights: Mapping[str, Tensor]) -> Backbone:
    """The copy that `shard` made, with whole weights."""
    missing = skeleton.load_state_dict(dict(weights), strict=False, assign=True)
    assert not missing.unexpected_keys and not any(one.is_meta for one in skeleton.parameters())
    return skeleton


def whole_norm(norm: Tensor) -> Tensor:
    """A norm of parts as a plain number."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        whole: Tensor = value.full_tensor()
        return whole.detach().cpu()
    return value.detach() if isinstance(value, Tensor) else value


def _part(value: Any, like: Any) -> Any:
    """What this process keeps of a whole value for a parameter."""
    is_whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not (is_whole and isinstance(like, DTensor) and value.shape == like.shape):
        return value
    on_device = value.to(like.device, like.dtype) if value.is_floating_point() else value
    # Each process has read the whole: none sends.
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def strategy_of(name: str, *, is_alone: bool) -> str | Strategy:
    """What Lightning takes for --strategy; a process that is alone has nobody to share with."""
    if is_alone and name in ("ddp", *STRATEGY_NAMES):
        return "auto"
    return ShardedStrategy() if name in STRATEGY_NAMES else name
