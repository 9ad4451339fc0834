"""What texts must look like: JSON, a schema's JSON, or what matches a regular expression.

llguidance (MIT; what vLLM, SGLang and llama.cpp use) computes for each state which tokens the grammar
allows; the engine asks here before it takes a token. Belongs to the extra `constraints`. Knows nothing of
HTTP, and `grammars` knows where the answers come from.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from full_stack_transformer.errors import RequestError
from full_stack_transformer.serving.schemas import ResponseFormat

_MAX_SCHEMA_BYTES = 100_000

Forbids = Callable[[Sequence[int]], bool]
Step = Callable[[Sequence[int]], tuple[bool, bytes]]


@dataclass(frozen=True)
class Wanted:
    """A grammar that a body asks for."""

    kind: str
    """regex or json_schema."""
    text: str

    @property
    def name(self) -> str:
        """For people."""
        return "the regular expression" if self.kind == "regex" else "the schema"


def grammar_of(wanted: ResponseFormat) -> Wanted:
    """The grammar that a body asks for, not yet compiled.

    Raises:
        RequestError: the body lacks it, or it is too long.
    """
    if wanted.type == "regex":
        if wanted.regex is None:
            raise RequestError("response_format: the type regex needs the field regex")
        return Wanted("regex", wanted.regex)
    schema: Any = {"type": "object"}
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise RequestError("response_format: the type json_schema needs the field json_schema")
        schema = wanted.json_schema.json_schema
    text = json.dumps(schema)
    if len(text) > _MAX_SCHEMA_BYTES:
        raise RequestError(
            f"response_format: the schema has {len(text):,} bytes; at most {_MAX_SCHEMA_BYTES:,} are allowed"
        )
    return Wanted("json_schema", text)


class Constraint:
    """Follows one text and says which tokens may not come next.

    Args:
        step: told of some more tokens of the text, says whether it may end there, and in a bit for each token
            whether that may come next.
        stop_ids: allowed where the text may end.
    """

    def __init__(self, step: Step, stop_ids: frozenset[int]) -> None:
        self._step = step
        self._stop_ids = stop_ids
        self._num_consumed = 0
        self._mask: bytes | None = None
        self._may_end = False

    def forbids(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of the new tokens may not follow the others.

        Called by the engine in the order of the text; a text that cannot go on may only end.

        Raises:
            RequestError: the grammar takes too much time or memory here.
            ServiceUnavailableError: its process has ended.
        """
        *before, candidate = token_ids
        if len(before) > self._num_consumed or self._mask is None:
            new_ids = before[self._num_consumed :]
            self._num_consumed = len(before)
            self._may_end, self._mask = self._step(new_ids)
        if candidate in self._stop_ids:
            return not self._may_end
        place, bit = divmod(candidate, 8)
        return place >= len(self._mask) or not self._mask[place] >> bit & 1


def any_of(first: Forbids | None, second: Forbids) -> Forbids:
    """What either forbids."""
    if first is None:
        return second
    return lambda token_ids: first(token_ids) or second(token_ids)
