"""Adapters beside a backbone in PyTorch: rows of a batch with different ones, and with none, in one pass.

inputs (rows, tokens, inputs) ──linear layer──> outputs ──+──> outputs
                └── the rows of each adapter: down, up ──┘
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.machine import check_free_memory
from full_stack_transformer.modelling.adapter_weights import AdapterWeights, LowRank


class TorchAdapters:
    """Adapters of a backbone, which is left as it is between two passes.

    Args:
        backbone: where it computes.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._layers: dict[int, dict[str, LowRank]] = {}

    def add(self, number: int, adapter: AdapterWeights) -> None:
        """Copy an adapter to where the backbone computes.

        Raises:
            MachineError: memory is short.
        """
        device = next(self._backbone.parameters()).device
        check_free_memory(4 * adapter.num_weights, f"the adapter {adapter.directory}", device)
        self._layers[number] = {
            name: LowRank(one.down.to(device), one.up.to(device))
            for name, one in adapter.layers.items()
        }

    def remove(self, number: int) -> None:
        """Let go of an adapter."""
        del self._layers[number]

    @contextmanager
    def applied(self, numbers: Sequence[int]) -> Iterator[None]:
        """Inside, each row of a pass is computed with its adapter.

        Args:
            numbers: the adapter of each row; 0 for none.
        """
        added: dict[str, list[_Added]] = {}
        for number in sorted(set(numbers) - {0}):
            rows = [row for row, one in enumerate(numbers) if one == number]
            for name, matrices in self._layers[number].items():
                added.setdefault(name, []).append(_Added(rows, matrices))
        with ExitStack() as hooks:
            for name, some in added.items():
                hook = _Hook(some, num_rows=len(numbers))
                hooks.enter_context(self._backbone.get_submodule(name).register_forward_hook(hook))
            yield


@dataclass(frozen=True)
class _Added:
    """What is added to some rows of a layer's outputs."""

    rows: Sequence[int]
    matrices: LowRank


class _Hook:
    """Adds to the outputs of a linear layer, in fp32."""

    def __init__(self, added: Sequence[_Added], *, num_rows: int) -> None:
        self._added = added
        self._num_rows = num_rows

    def __call__(self, layer: nn.Module, arguments: Any, outputs: Tensor) -> Tensor:
        inputs: Tensor = arguments[0]
        for one in self._added:
            if len(one.rows) == self._num_rows:
                return (outputs + _product(inputs, one.matrices)).to(outputs.dtype)
            # Experts see tokens in an order of their own; the engine then computes request by request.
            assert inputs.dim() == 3 and len(inputs) == self._num_rows, "rows cannot be told apart"
            rows = torch.tensor(one.rows, device=outputs.device)
            sums = outputs[rows] + _product(inputs[rows], one.matrices)
            outputs[rows] = sums.to(outputs.dtype)
        return outputs


def _product(inputs: Tensor, matrices: LowRank) -> Tensor:
    return inputs.float() @ matrices.down.T @ matrices.up.T
