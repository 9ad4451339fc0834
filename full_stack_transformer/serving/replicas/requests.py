"""A request as it travels from a front to a replica, and how it begins.

Requests with the same beginning should meet the same prefix cache. So a front cuts the text of a request into
blocks and hashes each with all before it, as the cache does with tokens. Knows neither HTTP server nor Ray.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

# About as many characters as a block of the cache has tokens, times the characters of a token.
BLOCK_CHARACTERS = 64
# Of a longer text the first 32,768 characters decide.
_MAX_BLOCKS = 512
_HASH_BYTES = 8
# What of an ASGI scope a replica needs; the rest belongs to the front's server.
_SCOPE_KEYS = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string"),
    *("root_path", "headers", "client", "server"),
)


@dataclass(frozen=True)
class ForwardedRequest:
    """One HTTP request, with the whole of its body."""

    scope: dict[str, Any]
    body: bytes
    beginning: tuple[bytes, ...] = ()
    """Hashes of its text's first block, its first two blocks …; none for a short text."""


def forwarded(scope: Scope, body: bytes, request_id: str) -> ForwardedRequest:
    """What a replica gets; its log shall name the request as the front's does."""
    kept = {key: scope[key] for key in _SCOPE_KEYS if key in scope}
    headers = [header for header in scope["headers"] if header[0] != b"x-request-id"]
    kept["headers"] = [*headers, (b"x-request-id", request_id.encode())]
    authorization = b",".join(value for name, value in headers if name == b"authorization")
    beginning = beginning_of(body, authorization) if scope["method"] == "POST" else ()
    return ForwardedRequest(kept, body, beginning)


def beginning_of(body: bytes, key: bytes = b"") -> tuple[bytes, ...]:
    """Hashes of the beginnings of a request's text; of no other key's or model's requests.

    Args:
        body: of any route; what is not JSON, or has no text, has no beginning.
        key: who asks.
    """
    try:
        found = json.loads(body)
    except ValueError:
        return ()
    if not isinstance(found, dict):
        return ()
    text = _text_of(found)
    model = found.get("model")
    before = hashlib.blake2b(key + b"\0" + repr(model).encode("utf-8", "replace")).digest()
    hashes = []
    for index in range(min(len(text) // BLOCK_CHARACTERS, _MAX_BLOCKS)):
        block = text[index * BLOCK_CHARACTERS : (index + 1) * BLOCK_CHARACTERS]
        content = before + block.encode("utf-8", "replace")
        before = hashlib.blake2b(content, digest_size=_HASH_BYTES).digest()
        hashes.append(before)
    return tuple(hashes)


def _text_of(body: dict[str, Any]) -> str:
    """What a model reads first: prompts, or the messages of a conversation."""
    for name in ("prompt", "seed_text", "messages", "input", "texts", "text", "context"):
        if name in body:
            return _flat(body[name])
    return ""


def _flat(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\0".join(map(_flat, value))
    if isinstance(value, dict):
        # The order of a message's fields is the client's affair.
        return "\0".join(
            _flat(value[name]) for name in ("role", "content", "text") if name in value
        )
    return str(value)
