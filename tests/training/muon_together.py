"""Run by torchrun: Muon of processes that deal matrices out equals that of one, and how long a step takes.

torchrun --nproc_per_node 2 -m tests.training.muon_together [seconds]
"""

import statistics
import sys
import time
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from full_stack_transformer.training import optimization
from full_stack_transformer.training.optimization import BatchedMuon

# Odd sides, more columns than rows, and fewer rows than processes.
_SHAPES = [(7, 5), (5, 7), (12, 4), (1, 8), (12, 4), (16, 16)]
# Those of 4 layers of the preset mini.
_LAYERS = [(192, 192), (192, 192), (192, 192), (192, 192), (512, 192), (512, 192), (192, 512)] * 4


def _muon(kind: str, shapes: list[tuple[int, int]]) -> tuple[BatchedMuon, list[nn.Parameter]]:
    torch.manual_seed(3)
    values = [torch.randn(shape) for shape in shapes]
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        values = [distribute_tensor(value, mesh, [Shard(0)]) for value in values]
    parameters = [nn.Parameter(value) for value in values]
    muon = BatchedMuon(parameters, lr=0.1, weight_decay=0.1, is_shared=kind == "ddp")
    return muon, parameters


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _steps(kind: str, shapes: list[tuple[int, int]], count: int) -> list[Tensor]:
    muon, parameters = _muon(kind, shapes)
    for number in range(count):
        torch.manual_seed(number)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        muon.step()
    return [_whole(parameter.detach()) for parameter in parameters]


def _seconds(kind: str) -> str:
    muon, parameters = _muon(kind, _LAYERS)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    taken, worked = [], []
    for _ in range(30):
        dist.barrier()
        started, began = time.perf_counter(), time.process_time()
        muon.step()
        taken.append(time.perf_counter() - started)
        worked.append(time.process_time() - began)
    return f"{kind}: {1e3 * statistics.median(taken):.1f} ms, {1e3 * statistics.median(worked):.1f} of work"


def main() -> None:
    """Compare, or measure."""
    dist.init_process_group("gloo")
    if sys.argv[1:]:
        lines = [_seconds(kind) for kind in ("one", "ddp", "fsdp")]
        if dist.get_rank() == 0:
            print("\n".join(lines))
    with mock.patch.object(optimization, "multiplies_bfloat16", lambda device: False):
        expected = _steps("one", _SHAPES, 3)
        for kind in ("ddp", "fsdp"):
            for found, wanted in zip(_steps(kind, _SHAPES, 3), expected, strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
