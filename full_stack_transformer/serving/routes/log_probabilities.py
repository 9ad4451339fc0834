"""Log-probabilities in the forms of completions and of chats, with the text of each token alone."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from full_stack_transformer.generation.requests import Piece
from full_stack_transformer.generation.sampling import ScoredToken
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer, TextStream

_BROKEN = "\ufffd"


def _byte_of_character() -> dict[str, int]:
    """Which byte a character of a byte-level vocabulary stands for (Radford et al. 2019's byte encoder)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


@lru_cache(maxsize=8)
def texts_of(tokenizer: DocumentTokenizer) -> "TokenTexts":
    """Those of one vocabulary, which are remembered."""
    return TokenTexts(tokenizer)


class TokenTexts:
    """Texts and bytes of single tokens of one vocabulary; a token may be half a character."""

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self._tokenizer = tokenizer
        self.text = lru_cache(maxsize=65_536)(self._text)

    def _text(self, token_id: int) -> str:
        """The token's text; "bytes:\\xe2" where it is no whole character, its name where it is no text."""
        if self._tokenizer.leaves_out(token_id):
            return self._tokenizer.backend.id_to_token(token_id) or ""
        text = self._tokenizer.decode([token_id])
        if _BROKEN not in text:
            return text
        found = self._raw_bytes(token_id)
        return text if found is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def bytes_of(self, token_id: int) -> list[int] | None:
        """The bytes of a token; none for control tokens."""
        if self._tokenizer.leaves_out(token_id):
            return None
        text = self._tokenizer.decode([token_id])
        if _BROKEN in text and (found := self._raw_bytes(token_id)) is not None:
            return list(found)
        return list(text.encode())

    def _raw_bytes(self, token_id: int) -> bytes | None:
        name = self._tokenizer.backend.id_to_token(token_id) or ""
        if token_id in self._tokenizer.byte_ids:
            return bytes([int(name[3:5], 16)])
        if all(character in _BYTE_OF_CHARACTER for character in name):
            return bytes(_BYTE_OF_CHARACTER[character] for character in name)
        return None


class ShownTokens:
    """The scored tokens of one continuation whose text is shown, whole or piece by piece alike.

    A token waits while its text may be the beginning of a stop text, and is left out when it is.
    """

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self._starts = TokenStarts(tokenizer)
        self._waiting: list[tuple[int, ScoredToken]] = []
        self._num_decoded = self._num_shown = 0

    def push(self, piece: Piece) -> tuple[ScoredToken, ...]:
        """The tokens to show with a piece."""
        self._num_decoded += len(piece.decoded)
        self._num_shown += len(piece.text)
        waiting = [
            *self._waiting,
            *((self._starts.next(one.token_id), one) for one in piece.scored),
        ]
        is_whole = piece.finish_reason is not None and self._num_shown == self._num_decoded
        shown = [is_whole or start < self._num_shown for start, _ in waiting]
        self._waiting = [one for one, is_shown in zip(waiting, shown, strict=True) if not is_shown]
        return tuple(one[1] for one, is_shown in zip(waiting, shown, strict=True) if is_shown)


class TokenStarts:
    """At which character of a text its tokens begin; one inside a character begins where that does."""

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self._stream = TextStream(tokenizer)
        self._num_released = 0

    def next(self, token_id: int) -> int:
        """That of the next token."""
        before, held = self._num_released, self._stream.held_back
        text = self._stream.push(token_id)
        self._num_released += len(text)
        if not held:
            return before
        if text and self._stream.held_back:  # what was held back was complete
            return self._num_released
        # What was held back either stays as it is, broken for good, or its last character is completed.
        stays = text.startswith(held) and len(text) > len(held)
        return before + len(held if stays else held.rstrip(_BROKEN))


class LogprobsWriter:
    """Log-probabilities in the form of completions, piece by piece; offsets count the choice's characters."""

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self._texts = texts_of(tokenizer)
        self._starts = TokenStarts(tokenizer)

    def unscored(self, token_id: int) -> dict[str, list[Any]]:
        """A first token: nothing comes before it that could make it likely."""
        return self._lists([(token_id, None, None)])

    def scored(self, tokens: Sequence[ScoredToken]) -> dict[str, list[Any]]:
        """The next tokens."""
        return self._lists(
            [(token.token_id, token.log_probability, self._alternatives(token)) for token in tokens]
        )

    def _alternatives(self, token: ScoredToken) -> dict[str, float]:
        """The most likely tokens, and always the one that was taken."""
        found: dict[str, float] = {}
        # From the most likely down: of several tokens with one text the first counts.
        for token_id, value in (*token.alternatives, (token.token_id, token.log_probability)):
            found.setdefault(self._texts.text(token_id), value)
        return found

    def _lists(
        self, tokens: list[tuple[int, float | None, dict[str, float] | None]]
    ) -> dict[str, list[Any]]:
        return {
            "tokens": [self._texts.text(token_id) for token_id, _, _ in tokens],
            "token_logprobs": [value for _, value, _ in tokens],
            "top_logprobs": [alternatives for _, _, alternatives in tokens],
            "text_offset": [self._starts.next(token_id) for token_id, _, _ in tokens],
        }


def joined(*parts: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Parts of one text's log-probabilities, one after the other."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry for part in parts for entry in part[name]] for name in names}


def chat_logprobs(tokens: Sequence[ScoredToken], tokenizer: DocumentTokenizer) -> dict[str, Any]:
    """Log-probabilities in the form of chats."""
    texts = texts_of(tokenizer)

    def entry(token_id: int, log_probability: float) -> dict[str, Any]:
        return {
            "token": texts.text(token_id),
            "logprob": log_probability,
            "bytes": texts.bytes_of(token_id),
        }

    return {
        "content": [
            entry(token.token_id, token.log_probability)
            | {"top_logprobs": [entry(*alternative) for alternative in token.alternatives]}
            for token in tokens
        ],
        "refusal": None,
    }
