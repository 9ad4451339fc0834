"""Guesses of the next tokens, which a step checks all at once. Knows nothing of models."""

from torch import Tensor

_GUESSED_FROM_TOKENS = 3


def guess_from_text(token_ids: Tensor, max_guesses: int) -> list[int]:
    """What followed the newest tokens (tokens,) where they last occurred together before.

    Prompt lookup: Saxena 2023; Leviathan et al. 2023 for why checking guesses changes nothing.
    """
    num_tokens = len(token_ids)
    if max_guesses < 1 or num_tokens <= _GUESSED_FROM_TOKENS:
        return []
    newest = token_ids[-_GUESSED_FROM_TOKENS:]
    windows = token_ids[:-1].unfold(0, _GUESSED_FROM_TOKENS, 1)
    places = (windows == newest).all(dim=1).nonzero()
    if not len(places):
        return []
    after = int(places[-1]) + _GUESSED_FROM_TOKENS
    guesses: list[int] = token_ids[after : after + max_guesses].tolist()
    return guesses
