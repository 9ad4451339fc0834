"""Words that must never appear in a text, whatever tokens spell them."""

from collections.abc import Sequence

from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer


class IgnoredWords:
    """Says of the new tokens of a request whether the newest one completes an ignored word.

    A word may have begun in the prompt. Only the tokens that can be part of it are decoded.

    Args:
        words: none of these may appear.
        prompt_ids: what the new tokens go on from.
        tokenizer: of the model.
    """

    def __init__(
        self, words: Sequence[str], prompt_ids: Sequence[int], tokenizer: DocumentTokenizer
    ) -> None:
        self._words = [word for word in words if word]
        self._tokenizer = tokenizer
        # A token that is seen spells a byte at least; one more, because decoders may treat the first one
        # in a special way.
        self._num_tokens = 1 + max((len(word.encode()) for word in self._words), default=0)
        self._before = self._end_of(prompt_ids)

    def forbid(self, new_ids: Sequence[int]) -> bool:
        """Whether the text of prompt and new tokens has an ignored word that ends in a new one."""
        newest = [one for one in new_ids if not self._tokenizer.leaves_out(one)]
        newest = newest[-self._num_tokens :]
        before = self._before[max(0, len(self._before) + len(newest) - self._num_tokens) :]
        text = self._tokenizer.decode([*before, *newest])
        num_before = len(self._tokenizer.decode(before))
        return any(text.find(word, max(0, num_before - len(word) + 1)) >= 0 for word in self._words)

    def _end_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, as far as its newest control token."""
        end: list[int] = []
        for token_id in reversed(prompt_ids[-self._num_tokens :]):
            if self._tokenizer.leaves_out(token_id):
                break
            end.append(token_id)
        return end[::-1]
