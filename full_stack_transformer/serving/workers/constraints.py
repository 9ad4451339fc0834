"""Texts that must be JSON, of a schema, or match a regular expression: which tokens may come next.

llguidance (MIT; what vLLM, SGLang and llama.cpp use) computes for each state which tokens the grammar
allows; the engine asks here before it takes a token. Belongs to the extra `constraints`. Knows nothing of
HTTP.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from full_stack_transformer.errors import MissingExtraError, RequestError, install_command
from full_stack_transformer.serving.schemas import ResponseFormat
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

logger = logging.getLogger(__name__)

_MAX_SCHEMA_BYTES = 100_000
# Without white space between the parts: a small model would fill its answer with it.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

Forbids = Callable[[Sequence[int]], bool]


def grammar_of(wanted: ResponseFormat) -> str:
    """The grammar of what a body wants, for `Constraint`.

    Raises:
        RequestError: the schema or the expression is no such thing.
        MissingExtraError: llguidance is not installed.
    """
    matcher = _llguidance().LLMatcher
    if wanted.type == "regex":
        if wanted.regex is None:
            raise RequestError("response_format: the type regex needs the field regex")
        grammar = matcher.grammar_from_regex(wanted.regex)
    else:
        schema: Any = {"type": "object"}
        if wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise RequestError(
                    "response_format: the type json_schema needs the field json_schema"
                )
            schema = wanted.json_schema.json_schema
        text = json.dumps(schema)
        if len(text) > _MAX_SCHEMA_BYTES:
            raise RequestError(f"response_format: a schema may have {_MAX_SCHEMA_BYTES:,} bytes")
        grammar = matcher.grammar_from_json_schema(text, defaults=_JSON_OPTIONS)
    if matcher.validate_grammar(grammar):
        # Without llguidance's own message: it repeats the schema.
        raise RequestError("response_format: the schema or regular expression cannot be followed")
    return str(grammar)


class Constraint:
    """Follows one text and says which tokens may not come next.

    Args:
        grammar: of `grammar_of`.
        vocabulary: of `make_vocabulary`.
        stop_ids: allowed where the text may end.
    """

    def __init__(self, grammar: str, vocabulary: Any, stop_ids: frozenset[int]) -> None:
        self._matcher = _llguidance().LLMatcher(vocabulary, grammar, log_level=0)
        self._stop_ids = stop_ids
        self._num_consumed = 0
        self._mask: bytes | None = None
        self._may_end = False

    def forbids(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of the new tokens may not follow the others.

        Called by the engine in the order of the text; a text that cannot go on may only end.
        """
        *before, candidate = token_ids
        if len(before) > self._num_consumed or self._mask is None:
            self._matcher.consume_tokens(list(before[self._num_consumed :]))
            self._num_consumed = len(before)
            self._may_end = self._matcher.is_accepting() or self._matcher.is_stopped()
            self._mask = b"" if self._matcher.is_stopped() else self._matcher.compute_bitmask()
        if candidate in self._stop_ids:
            return not self._may_end
        place, bit = divmod(candidate, 8)
        return place >= len(self._mask) or not self._mask[place] >> bit & 1


def any_of(first: Forbids | None, second: Forbids) -> Forbids:
    """What either forbids."""
    if first is None:
        return second
    return lambda token_ids: first(token_ids) or second(token_ids)


@lru_cache(maxsize=8)
def make_vocabulary(tokenizer: DocumentTokenizer) -> Any:
    """llguidance's view of a vocabulary; takes a moment, so it is made once for each.

    Raises:
        RequestError: llguidance cannot read this kind of vocabulary.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "tokenizer.json"
        tokenizer.backend.save(str(file))
        try:
            return _llguidance().LLTokenizer(
                str(file), n_vocab=tokenizer.vocab_size, eos_token=tokenizer.end_id
            )
        except ValueError as error:
            logger.warning("response_format cannot be had with this tokenizer: %s", error)
            raise RequestError(
                "response_format: this model's tokenizer cannot be constrained; ask for plain text"
            ) from error


def _llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "response_format needs the package llguidance on the service's machine; install it with: "
            f"{install_command('constraints')}"
        ) from error
    return llguidance
