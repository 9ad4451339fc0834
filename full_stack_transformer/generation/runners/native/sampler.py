"""The steps of a draw that look at every score of the vocabulary, in C++; see sampler.h."""

import ctypes
from ctypes import POINTER, c_double, c_float, c_int32

import torch
from torch import Tensor

from full_stack_transformer.generation.runners.native.library import load_library, why_not


def is_here(scores: Tensor) -> bool:
    """Whether C++ runs here and can read these."""
    return scores.is_cpu and scores.dtype == torch.float32 and why_not() is None


def rank(scores: Tensor, temperature: float, wanted: int) -> tuple[Tensor, Tensor, float]:
    """The likeliest tokens, and how much all of them weigh.

    Args:
        scores: (vocabulary,) numbers, or -inf.
        temperature: they are divided by it, once the largest has been made 0.
        wanted: number of tokens.

    Returns:
        Scores (wanted,), falling, equal ones by their ids; ids (wanted,); sum of all e^score.
    """
    scores = scores.contiguous()
    values, ids, total = torch.zeros(wanted), torch.zeros(wanted, dtype=torch.int32), c_double()
    load_library().sampler_rank(
        *(_pointer(scores, c_float), len(scores), temperature, wanted),
        *(_pointer(values, c_float), _pointer(ids, c_int32), ctypes.byref(total)),
    )
    return values, ids.long(), total.value


def draw_among_all(scores: Tensor, temperature: float, uniform: float) -> int:
    """One id, each as probable as its score (vocabulary,), divided by the temperature, says."""
    scores = scores.contiguous()
    drawn: int = load_library().sampler_draw(
        _pointer(scores, c_float), len(scores), temperature, uniform
    )
    return drawn


def _pointer(tensor: Tensor, kind: type) -> "ctypes._Pointer[ctypes._SimpleCData[object]]":
    return ctypes.cast(tensor.data_ptr(), POINTER(kind))
