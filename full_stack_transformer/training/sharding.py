"""FSDP2: each process keeps a part of every weight, gradient and optimizer state (Zhao et al. 2023, arXiv
2304.11277).

    whole model ──shard──> parts ──layer by layer, gathered for forward and backward──> parts of the gradient
                             └──whole_weights──> checkpoint and model directory, the same as of one process

Lightning's `ModelParallelStrategy` (2.6.6) names optimizer states by the order of the model's parameters, a
file of one process by that of the optimizer's groups; what one writes the other would read in a wrong order,
in silence. Here both are files of one process, so that a training goes on with any number of processes.
"""

import copy
from collections.abc import Mapping
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

STRATEGY_NAMES = ("fsdp", "fsdp2")


class ShardedStrategy(ModelParallelStrategy):
    """All processes share one model; no tensor parallelism."""

    checkpoint_io: CheckpointIO

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
        """The whole weights, in the main process; all must call it."""
        assert self.lightning_module is not None
        weights = whole_weights(self.lightning_module)
        return weights if self.is_global_zero else {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The same of an optimizer."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        content = optimizer.state_dict()
        content["state"] = {
            number: {name: _whole(value) for name, value in state.items()}
            for number, state in content["state"].items()
        }
        return content if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """A file of one process."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

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
            numbers = [n for group in content["param_groups"] for n in group["params"]]
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            like = dict(zip(numbers, parameters, strict=True))
            parts = {
                number: {name: _part(value, like[number]) for name, value in state.items()}
                for number, state in content["state"].items()
            }
            optimizer.load_state_dict({**content, "state": parts})


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


def own_part(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        whole: Tensor = value.full_tensor()
        return whole.detach().cpu()
    return value.detach() if isinstance(value, Tensor) else value


def _part(value: Any, like: Any) -> Any:
    """What this process keeps of a whole value for a parameter."""
    if not (isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape):
        return value
    on_device = value.to(like.device, like.dtype) if value.is_floating_point() else value
    # Each process has read the whole: none sends.
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def strategy_of(name: str, *, is_alone: bool) -> str | Strategy:
    """What Lightning takes for --strategy; a process that is alone has nobody to share with."""
    if name not in STRATEGY_NAMES:
        return name
    return "auto" if is_alone else ShardedStrategy()
