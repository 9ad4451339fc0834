"""Causal attention as matmul, softmax, matmul, where that is faster than torch's fused kernel.

A backbone selects it by name, like transformers' "sdpa" or "eager"; the name is not part of a saved config.
Documents in the same row do not see each other: transformers derives the mask from position ids that start
again at 0, if it gets neither an attention mask nor a cache. Knows nothing of compiling and training.

Legend: B batch, H heads, K heads of keys and values, T tokens, D width of a head.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import PreTrainedModel as Backbone
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "written_out"

# On a processor torch's kernel is slow in bf16. Milliseconds forward and backward on one core (EPYC, Zen 4)
# of this code, and of torch's without and with a document mask; 6 heads of width 64, 4,096 tokens:
#   T = 256    44,   91,  93
#   T = 1024  122,  190, 254
#   T = 2048  232,  303, 547
# The probabilities, B x H x T x T, are kept for the backward pass: too much memory above 1,024 tokens.
_MAX_TOKENS = 1024
# Keys that no query of a part can see are skipped: 2 parts save a quarter, 4 parts three eighths. Parts of
# fewer than 128 queries cost more than they save.
_MIN_TOKENS_FOR_2_PARTS, _MIN_TOKENS_FOR_4_PARTS = 256, 512


def use_written_out_attention(backbone: Backbone) -> bool:
    """Make a backbone that uses torch's attention use this one where it is faster; True if it does."""
    if backbone.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(ATTENTION_NAME, attend)
    # Masks as for sdpa: None if purely causal, else True where a token may attend.
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    backbone.set_attn_implementation(ATTENTION_NAME)
    return True


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (B, T, H, D), and no probabilities.

    Args:
        module: the attention layer.
        query: (B, H, T, D).
        key: (B, K, T, D), where K divides H.
        value: (B, K, T, D).
        attention_mask: (B, 1, T, T), True where a query may attend, within the past; None for all of it.
        dropout: of the probabilities.
        scaling: of the products; 1 / sqrt(D) if None.
        options: those of other attentions; if one changes the result, torch's kernel computes it.
    """
    if not _is_faster(module, key, value, attention_mask, options, num_queries=query.shape[2]):
        attended, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **options,
        )
        return attended, None
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    # Rotary positions are computed in the type of the residual stream, fp32.
    query, key = (query * scaling).to(value.dtype), key.to(value.dtype)
    return _attend_in_parts(query, key, value, attention_mask, dropout), None


def _is_faster(
    module: nn.Module,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
    *,
    num_queries: int,
) -> bool:
    is_usual = all(options.get(name) is None for name in ("is_causal", "softcap", "position_bias"))
    return (
        value.device.type == "cpu"
        and value.dtype == torch.bfloat16
        and num_queries == key.shape[2]  # no cache
        and num_queries <= _MAX_TOKENS
        and (attention_mask is None or attention_mask.dtype == torch.bool)
        and getattr(module, "is_causal", True)
        and is_usual
    )


def _attend_in_parts(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float
) -> Tensor:
    num_tokens = query.shape[2]
    num_parts = 1
    if num_tokens >= _MIN_TOKENS_FOR_2_PARTS:
        num_parts = 4 if num_tokens >= _MIN_TOKENS_FOR_4_PARTS else 2
    borders = [num_tokens * part // num_parts for part in range(num_parts + 1)]
    parts = []
    for start, end in itertools.pairwise(borders):
        if attention_mask is None:
            is_visible = query.new_ones(end - start, end, dtype=torch.bool).tril(start)
        else:
            is_visible = attention_mask[:, :, start:end, :end]
        parts.append(
            _attend_to_past(
                query[:, :, start:end], key[:, :, :end], value[:, :, :end], is_visible, dropout
            )
        )
    return torch.cat(parts, dim=1)


def _attend_to_past(
    query: Tensor, key: Tensor, value: Tensor, is_visible: Tensor, dropout: float
) -> Tensor:
    """(B, queries, H, D) of queries (B, H, queries, D); heads that share keys are rows of the same matrix."""
    num_samples, num_heads, num_queries, width = query.shape
    rows = (num_samples, key.shape[1], -1)
    scores = torch.matmul(query.reshape(*rows, width), key.transpose(2, 3))
    scores = scores.view(num_samples, num_heads, num_queries, -1)
    scores = scores.masked_fill_(~is_visible, float("-inf"))
    # A softmax of bf16 computes in fp32 and rounds at the end.
    probabilities = torch.softmax(scores, dim=-1).to(value.dtype)
    if dropout:
        probabilities = nn.functional.dropout(probabilities, dropout)
    attended = torch.matmul(probabilities.view(*rows, key.shape[2]), value)
    return attended.view(num_samples, num_heads, num_queries, width).transpose(1, 2)
