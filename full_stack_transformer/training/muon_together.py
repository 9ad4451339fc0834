"""Muon's matrices, dealt out among the processes that train together: one process orthogonalises each.

    parts of all matrices ──gather──> whole ones of this process ──(orthogonalise)──scatter──> parts of all

Where each process has whole matrices and equal gradients (DDP), nothing is gathered, and all get the results.
Each exchange is one for all matrices together: the latency of many small ones costs more than their bytes.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def own_part(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


class DealtMatrices:
    """Which process orthogonalises which matrix: each about the same work.

    Args:
        parameters: the same in all processes; all are sharded by rows (FSDP2), or none.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        first = parameters[0]
        self._is_sharded = isinstance(first, DTensor)
        self._group = first.device_mesh.get_group() if isinstance(first, DTensor) else None
        assert all(one.placements == (Shard(0),) for one in parameters if isinstance(one, DTensor))
        self._rank, self._num = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._shapes, self._like = [one.shape for one in parameters], own_part(first.detach())
        owners = _owners(self._shapes, self._num)
        self._dealt = [
            [number for number, owner in enumerate(owners) if owner == rank]
            for rank in range(self._num)
        ]

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """This process's share of the matrices, whole; of all matrices come the parts of this process."""
        own = self._dealt[self._rank]
        if not self._is_sharded:
            return [parts[number] for number in own]
        sent = torch.cat([parts[number].flatten() for dealt in self._dealt for number in dealt])
        received = self._exchanged(sent, self._sizes_of_parts(), self._sizes_of_own())
        # Of each process: its rows of the first matrix, of the second …
        pieces = iter(
            _split(received, [self._size(n, rank) for rank in range(self._num) for n in own])
        )
        rows = [[next(pieces) for _ in own] for _ in range(self._num)]
        return [
            torch.cat([of_rank[place] for of_rank in rows]).view(self._shapes[number])
            for place, number in enumerate(own)
        ]

    def scatter(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """What this process needs of all matrices, of those that `gather` dealt out."""
        flat = [whole.to(self._like.dtype).flatten() for whole in wholes]
        if not self._is_sharded:
            return self._all(flat)
        own = self._dealt[self._rank]
        cuts = [
            _split(whole, [self._size(number, rank) for rank in range(self._num)])
            for number, whole in zip(own, flat, strict=True)
        ]
        sent = [cut[rank] for rank in range(self._num) for cut in cuts]
        received = self._exchanged(
            torch.cat([self._like.new_empty(0), *sent]),
            self._sizes_of_own(),
            self._sizes_of_parts(),
        )
        numbers = [number for dealt in self._dealt for number in dealt]
        parts = _split(received, [self._size(number, self._rank) for number in numbers])
        found = {
            number: part.view(-1, self._shapes[number][1])
            for number, part in zip(numbers, parts, strict=True)
        }
        return [found[number] for number in range(len(self._shapes))]

    def _all(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """The matrices of all processes."""
        sizes = [sum(self._shapes[number].numel() for number in dealt) for dealt in self._dealt]
        sent = self._like.new_zeros(max(sizes))
        torch.cat([self._like.new_empty(0), *flat], out=sent[: sizes[self._rank]])
        received = [torch.empty_like(sent) for _ in sizes]
        dist.all_gather(received, sent)
        found = {}
        for dealt, size, part in zip(self._dealt, sizes, received, strict=True):
            lengths = [self._shapes[number].numel() for number in dealt]
            for number, matrix in zip(dealt, _split(part[:size], lengths), strict=True):
                found[number] = matrix.view(self._shapes[number])
        return [found[number] for number in range(len(self._shapes))]

    def _size(self, number: int, rank: int) -> int:
        """Numbers that a process holds of a matrix: FSDP2 gives each as many rows, the last ones fewer."""
        num_rows, num_columns = self._shapes[number]
        num_each = -(-num_rows // self._num)
        return min(max(0, num_rows - rank * num_each), num_each) * num_columns

    def _sizes_of_parts(self) -> list[int]:
        """For each process what this one holds of its matrices."""
        return [sum(self._size(number, self._rank) for number in dealt) for dealt in self._dealt]

    def _sizes_of_own(self) -> list[int]:
        """What each process holds of the matrices of this one."""
        own = self._dealt[self._rank]
        return [sum(self._size(number, rank) for number in own) for rank in range(self._num)]

    def _exchanged(self, sent: Tensor, sizes: list[int], received_sizes: list[int]) -> Tensor:
        """What all processes send to this one, which sends so much to each of them."""
        received = sent.new_empty(sum(received_sizes))
        dist.all_to_all_single(received, sent, received_sizes, sizes, group=self._group)
        return received


def _split(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    return [*flat.split(sizes)]  # type: ignore[no-untyped-call]


def _owners(shapes: Sequence[torch.Size], num_processes: int) -> list[int]:
    """The process of each matrix: the most work first, each to the one that has least."""
    work = [min(shape) ** 2 * max(shape) for shape in shapes]
    loads, owners = [0] * num_processes, [0] * len(shapes)
    for number in sorted(range(len(shapes)), key=lambda number: -work[number]):
        owners[number] = min(range(num_processes), key=lambda rank: loads[rank])
        loads[owners[number]] += work[number]
    return owners
