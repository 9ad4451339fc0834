"""Log-probabilities in the forms of completions and of chats, with the text of each token alone."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

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


class LogprobsWriter:
    """Log-probabilities in the form of completions, piece by piece; offsets count the choice's characters."""

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self._texts = texts_of(tokenizer)
        self._stream = TextStream(tokenizer)
        self._offset = 0

    def unscored(self, token_id: int) -> dict[str, list[Any]]:
        """A first token: nothing comes before it that could make it likely."""
        return self._lists([(token_id, None, None)])

    def scored(self, tokens: Sequence[ScoredToken]) -> dict[str, list[Any]]:
        """The next tokens."""
        return self._lists(
            [(token.token_id, token.log_probability, self._alternatives(token)) for token in tokens]
        )

    def _alternatives(self, token: ScoredToken) -> dict[str, float]:
        found: dict[str, float] = {}
        # From the most likely down: of several tokens with one text the first counts.
        for token_id, log_probability in token.alternatives:
            found.setdefault(self._texts.text(token_id), log_probability)
        return found

    def _lists(
        self, tokens: list[tuple[int, float | None, dict[str, float] | None]]
    ) -> dict[str, list[Any]]:
        offsets = []
        for token_id, _, _ in tokens:
            offsets.append(self._offset)
            self._offset += len(self._stream.push(token_id))
        return {
            "tokens": [self._texts.text(token_id) for token_id, _, _ in tokens],
            "token_logprobs": [value for _, value, _ in tokens],
            "top_logprobs": [alternatives for _, _, alternatives in tokens],
            "text_offset": offsets,
        }


def joined(*parts: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Parts of one text's log-probabilities, one after the other."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry for part in parts for entry in part[name]] for name in names}


def cut_at(length: int, lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Without the tokens that begin after a text of `length` characters, which a stop text cut off."""
    num_kept = sum(1 for offset in lists["text_offset"] if offset < length)
    return {name: values[:num_kept] for name, values in lists.items()}


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
        ]
    }
