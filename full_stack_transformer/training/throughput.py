"""How fast the arithmetic is: the peak of a device, measured, and what a token costs a model.

Their ratio is the model FLOPs utilization (MFU), the part of the device's arithmetic that goes into the
model (Chowdhery et al. 2022, PaLM, appendix B). Knows nothing of batches and of clocks of a training.
"""

import time

import torch
from torch import nn
from transformers import PreTrainedModel as Backbone

# Sides of the square matrices that are tried. On two cores of an EPYC (Zen 4) bf16 is fastest at 512 and
# 1536 (420 GFLOP/s; 365 at 2048, where the second-level cache no longer helps); a GPU needs large ones.
_SIDES_ON_CPU = (512, 1024, 1536)
_SIDES_ON_ACCELERATOR = (4096, 8192)
_SECONDS_PER_SIDE = 0.12


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product on `device`: under half a second on two cores.

    The best of many repetitions, since anything else that runs can only slow one down.
    """
    sides = _SIDES_ON_CPU if device.type == "cpu" else _SIDES_ON_ACCELERATOR
    return max(_measure_matmul(side, device, dtype) for side in sides)


def _measure_matmul(side: int, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator(device).manual_seed(0)  # the training's own is left alone
    left, right = (
        torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2)
    )
    out = left @ right  # chooses the kernel, and allocates
    _wait_for(device)
    best, deadline = float("inf"), time.perf_counter() + _SECONDS_PER_SIDE
    while (started := time.perf_counter()) < deadline:
        torch.mm(left, right, out=out)
        _wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best if best < float("inf") else 0.0


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def flops_per_token(backbone: Backbone, num_context_tokens: int) -> float:
    """FLOPs of the forward and backward pass for one token, by PaLM's count: 6 N + 12 L H Q T.

    N are the matrices that multiply activations: all but embedding tables, and the output head also where
    it is tied to one. L layers, H heads, Q width of a head, T tokens of context: attention counts in full,
    though half of it is masked, and nothing that is computed twice counts twice.

    Args:
        backbone: a decoder with `num_hidden_layers`, `num_attention_heads` and `hidden_size` in its config.
        num_context_tokens: T, tokens that a token may attend to; for packed rows the length of a document.
    """
    config = backbone.config
    num_weights = sum(matrix.numel() for matrix in backbone.parameters() if matrix.ndim > 1)
    tables = {
        id(module.weight): module.weight.numel()
        for module in backbone.modules()
        if isinstance(module, nn.Embedding)
    }
    head = backbone.get_output_embeddings()
    tied = tables.get(id(head.weight), 0) if head is not None else 0
    head_width = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    attention_width = config.num_attention_heads * head_width
    attention = 12 * config.num_hidden_layers * attention_width * num_context_tokens
    return float(6 * (num_weights - sum(tables.values()) + tied) + attention)
