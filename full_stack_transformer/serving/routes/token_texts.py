"""The text of a single token, for log-probabilities: a token may be half a character."""

from functools import lru_cache

from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

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
    """Texts and bytes of the tokens of one vocabulary."""

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
