"""Samples -> a batch of tensors. Knows nothing of models."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Positions with this label do not count: PyTorch's default `ignore_index`.
IGNORED_LABEL = -100


class CausalCollator:
    """Pads samples on the right.

    A causal model never looks to the right, so the padding changes nothing and needs no attention mask.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, samples: Sequence[NDArray[np.int64]]) -> dict[str, Tensor]:
        """`input_ids` and `labels`, both (batch, tokens); labels are not shifted yet."""
        shape = (len(samples), max(len(sample) for sample in samples))
        input_ids = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample)] = sample
            labels[row, : len(sample)] = sample
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
