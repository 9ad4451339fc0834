"""One vector for a text: pooling of token vectors, and the losses that teach which texts are alike.

Pure functions on tensors; knows nothing of models, tokenizers and files.

    B texts   T tokens   H width of the model   D width of an embedding
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

PoolingMode = Literal["cls", "mean", "max", "first_last_avg", "last"]
"""cls: the first token. last: the last one, which alone has seen the whole text in a causal model.
first_last_avg: the mean over tokens and over the outputs of the first and the last layer (Su et al. 2021)."""

POOLING_MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)


def needs_first_layer(mode: PoolingMode) -> bool:
    """Whether `pool` takes the output of the first layer too (`output_hidden_states`, number 1)."""
    return mode == "first_last_avg"


def pool(
    last: Tensor, attention_mask: Tensor, mode: PoolingMode, *, first: Tensor | None = None
) -> Tensor:
    """A vector for each text: (B, H).

    Args:
        last: (B, T, H) output of the last layer.
        attention_mask: (B, T) 1 where a token is, 0 where padding is, on whichever side.
        mode: how.
        first: (B, T, H) output of the first layer, where `needs_first_layer`.

    Raises:
        ValueError: `first` is missing.
    """
    mask = attention_mask.to(torch.bool)
    rows = torch.arange(len(last), device=last.device)
    if mode == "cls":
        return last[rows, mask.int().argmax(dim=1)]
    if mode == "last":
        return last[rows, mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)]
    if mode == "max":
        return last.masked_fill(~mask[..., None], float("-inf")).amax(dim=1)
    if mode == "first_last_avg":
        if first is None:
            raise ValueError("first_last_avg needs the output of the first layer too")
        last = (first + last) / 2
    weights = mask[..., None].to(last.dtype)
    return (last * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def simcse_losses(
    first: Tensor, second: Tensor, *, temperature: float, negatives: Tensor | None = None
) -> Tensor:
    """For each text how badly its partner is told from those of the others in the batch: (B,).

    Gao, Yao and Chen 2021, SimCSE (arXiv 2104.08821). Unsupervised, equation 1: `second` are the same
    texts, encoded again with other dropout. Supervised, equation 5: `second` are texts that mean the
    same, `negatives` texts that do not. The paper's temperature is 0.05.

    Args:
        first: (B, D).
        second: (B, D) row i is the partner of row i.
        temperature: of the softmax over cosines.
        negatives: (N, D) more texts that are nobody's partner.
    """
    candidates = second if negatives is None else torch.cat([second, negatives])
    cosines = cosine_similarity(first[:, None].float(), candidates[None].float(), dim=-1)
    targets = torch.arange(len(first), device=first.device)
    return cross_entropy(cosines / temperature, targets, reduction="none")


def cosine_losses(first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
    """Squared difference of each pair's cosine and its score: (B,).

    Reimers and Gurevych 2019, Sentence-BERT (arXiv 1908.10084), section 3, "regression objective".

    Args:
        first: (B, D).
        second: (B, D).
        scores: (B,) how alike, -1 to 1.
    """
    return (cosine_similarity(first.float(), second.float(), dim=-1) - scores.float()) ** 2
