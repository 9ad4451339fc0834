"""Where a conversation that is longer than a context ends: after the last answer that fits.

Never imports torch.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.datasets.corpus import Corpus

# Tokens that are looked at together.
_TOKENS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class LeftOut:
    """What a length leaves out of a corpus."""

    num_samples: int = 0
    """Conversations (or pairs) without an answer that fits."""
    num_cut_samples: int = 0
    """Conversations of which the end is left out."""
    num_answers: int = 0
    """Answers left out, with those of whole conversations."""
    num_learned_tokens: int = 0
    """Tokens of these answers."""

    def __str__(self) -> str:
        """For a log line; empty if nothing is left out."""
        if not self.num_answers:
            return ""
        return (
            f"{self.num_answers:,} answers ({self.num_learned_tokens:,} tokens) do not fit: "
            f"{self.num_cut_samples:,} conversations end earlier, {self.num_samples:,} are left out"
        )


def cut_after_answers(
    corpus: Corpus, max_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], LeftOut]:
    """Tokens (samples,) and learned ones (samples,) of each conversation up to its cut; what is left out."""
    assert corpus.learned is not None, "a corpus of conversations"
    starts, lengths = np.asarray(corpus.start_positions), corpus.lengths()
    cut_lengths, num_targets = np.zeros_like(lengths), np.zeros_like(lengths)
    num_cut = num_answers = num_tokens = 0
    for first, end in _parts(lengths):
        offset = int(starts[first])
        learned = corpus.learned[offset : int(starts[end - 1] + lengths[end - 1])].astype(bool)
        begins = starts[first:end] - offset
        learned[begins] = False  # nothing comes before it
        # An answer ends at a learned token behind which none is; also at the end of its sample.
        is_end = learned.copy()
        is_end[:-1] &= ~learned[1:]
        ends = np.flatnonzero(is_end)
        sample_of_end = np.searchsorted(begins, ends, side="right") - 1
        fits = ends - begins[sample_of_end] < max_length
        np.maximum.at(
            cut_lengths, first + sample_of_end[fits], (ends - begins[sample_of_end] + 1)[fits]
        )
        # A short conversation stays whole, also what comes after its last answer.
        whole = first + np.flatnonzero(lengths[first:end] <= max_length)
        cut_lengths[whole] = lengths[whole]
        before = np.concatenate([[0], np.cumsum(learned)])
        num_targets[first:end] = before[begins + cut_lengths[first:end]] - before[begins]
        left = ends[~fits]
        num_answers += len(left)
        num_tokens += int(before[-1] - num_targets[first:end].sum())
        num_cut += int(
            np.count_nonzero(
                (cut_lengths[first:end] > 0) & (cut_lengths[first:end] < lengths[first:end])
            )
        )
    left_out = LeftOut(int(np.count_nonzero(cut_lengths == 0)), num_cut, num_answers, num_tokens)
    return cut_lengths, num_targets, left_out


def _parts(lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Consecutive samples that are looked at together, as [first, end)."""
    groups = np.cumsum(lengths) // _TOKENS_AT_ONCE
    borders = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(lengths)]
    return [(first, end) for first, end in itertools.pairwise(borders) if end > first]
