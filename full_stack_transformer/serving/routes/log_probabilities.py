"""Log-probabilities of tokens in the two forms that OpenAI's routes have."""

from collections.abc import Sequence
from typing import Any

from full_stack_transformer.generation.sampling import ScoredToken
from full_stack_transformer.serving.routes.token_texts import TokenTexts
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer, TextStream


class CompletionLogprobsWriter:
    """The form of completions, piece by piece; offsets count characters of the choice's text.

    Args:
        tokenizer: of the model.
        texts: of its tokens.
        offset: characters before the first token.
    """

    def __init__(self, tokenizer: DocumentTokenizer, texts: TokenTexts, offset: int = 0) -> None:
        self._texts = texts
        self._stream = TextStream(tokenizer)
        self._offset = offset

    def unscored(self, token_id: int) -> dict[str, list[Any]]:
        """A first token: nothing comes before it that could make it likely."""
        return self._lists([(token_id, None, None)])

    def scored(self, tokens: Sequence[ScoredToken]) -> dict[str, list[Any]]:
        """The next tokens."""
        return self._lists(
            [(one.token_id, one.log_probability, self._alternatives(one)) for one in tokens]
        )

    def _alternatives(self, token: ScoredToken) -> dict[str, float]:
        found: dict[str, float] = {}
        # From the likeliest down: of several tokens with one text the first counts.
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
    return {name: [one for part in parts for one in part[name]] for name in names}


def cut_at(length: int, lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Without the tokens that begin behind a text of `length` characters, which a stop text cut off."""
    num_kept = sum(1 for offset in lists["text_offset"] if offset < length)
    return {name: values[:num_kept] for name, values in lists.items()}


def chat_logprobs(tokens: Sequence[ScoredToken], texts: TokenTexts) -> dict[str, Any]:
    """The form of chats."""

    def entry(token_id: int, log_probability: float) -> dict[str, Any]:
        return {
            "token": texts.text(token_id),
            "logprob": log_probability,
            "bytes": texts.bytes_of(token_id),
        }

    return {
        "content": [
            entry(one.token_id, one.log_probability)
            | {"top_logprobs": [entry(*alternative) for alternative in one.alternatives]}
            for one in tokens
        ]
    }
