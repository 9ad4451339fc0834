"""What a loss over a whole batch needs of the samples of the other processes; all of them must ask.

Knows no task. A loss per sample needs none of it: gradients add up by themselves.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def summed(value: Tensor) -> Tensor:
    """The sum of a value without a gradient over all processes."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def of_the_others(own: Tensor, *, num_used: int) -> Tensor:
    """(N, D) vectors of the other processes, with gradients that reach those who made them.

    Radford et al. 2021 (CLIP, arXiv 2103.00020) learn from the pairs of all devices in this way.

    Args:
        own: (B, D) those of this process; each may have another number.
        num_used: the first so many of them are there for the others; 0 for what fills up a batch.
    """
    size = torch.tensor([num_used, len(own)], device=own.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(found[1]) for found in sizes)
    padded = torch.cat([own, own.new_zeros(longest - len(own), own.shape[1])])
    gathered: Tensor = _Gathered.apply(padded)  # type: ignore[no-untyped-call]
    me = dist.get_rank()
    parts = [gathered[rank, : int(found[0])] for rank, found in enumerate(sizes) if rank != me]
    return torch.cat(parts)


class _Gathered(torch.autograd.Function):
    """(processes, B, D) of (B, D); what all processes learn of a vector is added up where it was made."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]
