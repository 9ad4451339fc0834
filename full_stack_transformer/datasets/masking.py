"""Hide tokens of samples, to be guessed from both sides: masked language modelling.

Of the tokens that are chosen 80 % become the mask token, 10 % another token, 10 % stay (Devlin et al. 2018,
arXiv 1810.04805, appendix C.2). What is chosen depends on seed, epoch and sample alone, not on the batch; how
much, on the sample's length alone, so that the targets of a step are known before its batches are made.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from full_stack_transformer.datasets.batches import BatchSpans
from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.datasets.order import ShardLayout
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL, DocumentTokenizer

_PART_MASKED, _PART_REPLACED = 0.8, 0.1
# How byte-level BPE spells a space, an end of line, a tab and a carriage return: as letters.
_BYTE_LEVEL_SPACES = "ĠĊĉč"


@dataclass(frozen=True)
class Masking:
    """What is hidden, and by what."""

    mask_id: int
    vocab_size: int
    special_ids: frozenset[int]
    """Never chosen, as long as there is another token."""
    probability: float = 0.15
    """Part of a sample's tokens that is chosen."""
    continues_word: NDArray[np.bool_] | None = None
    """(vocabulary,) whether a token goes on with the word before it; with it whole words are chosen."""
    seed: int = 0

    def num_chosen(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens of samples of these lengths are chosen: one at least."""
        counts: NDArray[np.int64] = np.rint(self.probability * lengths).astype(np.int64)
        return np.maximum(counts, 1)


@dataclass(frozen=True)
class MaskedSamples:
    """The samples of a corpus, of which the hidden tokens are the targets."""

    corpus: Corpus
    masking: Masking

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples together."""
        return self.corpus.num_tokens

    @property
    def layout(self) -> ShardLayout | None:
        """Those of the corpus."""
        return self.corpus.layout

    def __len__(self) -> int:
        return len(self.corpus)

    def spans(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start in the corpus and tokens of each of the samples."""
        return self.corpus.spans(numbers)

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The tokens that are hidden."""
        return self.masking.num_chosen(lengths)


class MaskedCollator:
    """A sample a row: `input_ids`, `attention_mask`, and `labels`, -100 where nothing was chosen."""

    def __init__(self, corpus: Corpus, masking: Masking, *, pad_id: int) -> None:
        self._corpus = corpus
        self._masking = masking
        self._pad_id = pad_id

    def __call__(self, spans: BatchSpans) -> dict[str, Tensor]:
        """Tensors (batch, tokens), int64."""
        width = int(spans.lengths.max())
        input_ids = self._corpus.windows(spans.starts, width)
        is_token = np.arange(width) < spans.lengths[:, None]
        input_ids[~is_token] = self._pad_id
        labels = np.full_like(input_ids, IGNORED_LABEL)
        for row, (start, length) in enumerate(zip(spans.starts, spans.lengths, strict=True)):
            if spans.is_filler:
                continue
            draws = np.random.default_rng((self._masking.seed, spans.epoch, int(start)))
            tokens = input_ids[row, :length]
            chosen = choose(tokens, self._masking, draws)
            labels[row, chosen] = tokens[chosen]
            tokens[chosen] = hide(tokens[chosen], self._masking, draws)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(is_token.astype(np.int64)),
            "labels": torch.from_numpy(labels),
        }


def choose(
    token_ids: NDArray[np.int64], masking: Masking, draws: np.random.Generator
) -> NDArray[np.int64]:
    """Positions (chosen,) in the sample of `token_ids` (tokens,).

    Whole words are taken in a random order, passing over one that is too long for what is left; what no
    word fills is taken token by token.
    """
    num_chosen = int(masking.num_chosen(np.array(len(token_ids))))
    order = draws.permutation(len(token_ids))
    is_special = np.isin(token_ids, list(masking.special_ids))
    order = np.concatenate((order[~is_special[order]], order[is_special[order]]))
    if masking.continues_word is None:
        return order[:num_chosen]
    words = np.cumsum(~masking.continues_word[token_ids] | is_special)
    chosen: list[int] = []
    seen: set[int] = set()
    for position in order:
        word = int(words[position])
        if word in seen or is_special[position]:
            continue
        seen.add(word)
        positions = np.flatnonzero((words == word) & ~is_special)
        if len(chosen) + len(positions) <= num_chosen:
            chosen += positions.tolist()
    taken = set(chosen)
    rest = [int(position) for position in order if int(position) not in taken]
    return np.array([*chosen, *rest[: num_chosen - len(chosen)]], dtype=np.int64)


def hide(
    token_ids: NDArray[np.int64], masking: Masking, draws: np.random.Generator
) -> NDArray[np.int64]:
    """What stands in the place of chosen tokens (chosen,)."""
    fate = draws.random(len(token_ids))
    others = draws.integers(masking.vocab_size, size=len(token_ids))
    is_replaced = (fate >= _PART_MASKED) & (fate < _PART_MASKED + _PART_REPLACED)
    return np.where(
        fate < _PART_MASKED, masking.mask_id, np.where(is_replaced, others, token_ids)
    ).astype(np.int64)


def make_masking(
    tokenizer: DocumentTokenizer,
    *,
    mask_id: int,
    vocab_size: int,
    probability: float,
    whole_words: bool,
    seed: int = 0,
) -> Masking:
    """The masking of a corpus that was made with a tokenizer.

    Args:
        tokenizer: that of the corpus; its tokens that frame a document are never chosen.
        mask_id: the model's mask token, which the corpus need not know.
        vocab_size: the model's.
        probability: part of a sample's tokens that is hidden.
        whole_words: hide whole words.
        seed: decides which.
    """
    special_ids = {tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id, mask_id}
    return Masking(
        mask_id=mask_id,
        vocab_size=vocab_size,
        special_ids=frozenset(special_ids),
        probability=probability,
        continues_word=word_continuations(tokenizer, vocab_size) if whole_words else None,
        seed=seed,
    )


def word_continuations(tokenizer: DocumentTokenizer, vocab_size: int) -> NDArray[np.bool_]:
    """(vocabulary,) whether each token goes on with a word, by the marks of its kind of tokenizer.

    WordPiece marks what goes on (`##`), SentencePiece and byte-level BPE what begins (a space, spelled `▁`
    or `Ġ`); there a token that is no letter or digit, such as the end of a line, begins one too.
    """
    tokens = [tokenizer.backend.id_to_token(number) or "" for number in range(vocab_size)]
    # Another tokenizer may know `##` too: it begins headings and comments.
    if type(tokenizer.backend.model).__name__ == "WordPiece":
        return np.array([token.startswith("##") for token in tokens])
    marks = _BYTE_LEVEL_SPACES if _BYTE_LEVEL_SPACES[0] in tokens else "▁"
    return np.array([token[:1].isalnum() and token[:1] not in marks for token in tokens])
