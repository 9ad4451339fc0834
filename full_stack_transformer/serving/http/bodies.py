"""Request bodies, read with a bound and parsed strictly.

FastAPI's own parsing answers 500 to NaN or a lone surrogate, because its 422 repeats the input, and it
reads a body of any size. So a route takes the raw request and parses here. The deadline for a body's
arrival is in connections.py.
"""

import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from full_stack_transformer.errors import BodyTooLargeError, RequestError

_Body = TypeVar("_Body", bound=BaseModel)

_MAX_ERRORS = 1000
_NAME = re.compile(r"[A-Za-z0-9_]{1,40}")
# What to say of fields that may be several things: pydantic names the first kind only.
_EXPECTED = {
    "prompt": "should be a text, a list of token ids, or a list of texts or of such lists, within bounds",
    "input": "should be a text, a list of token ids, or a list of texts or of such lists, not empty",
    "stop": "should be a text or a list of up to 16, each of 1 to 200 characters",
    "content": "should be a text, or a list of parts of the type text",
}
# Fields that other services know: better than "unknown".
_NOT_SUPPORTED = frozenset(
    (
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "audio",
        "prediction",
        "web_search_options",
    )
)


class InvalidBodyError(RequestError):
    """A body that does not fit the route's schema; the message never repeats it."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


async def parse_body(request: Request, schema: type[_Body]) -> _Body:
    """The body of a request.

    Raises:
        BodyTooLargeError: it has more bytes than the service reads.
        InvalidBodyError: it is not JSON, or does not fit the schema.
    """
    raw = await _read(request, request.app.state.max_body_bytes)
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        if error.error_count() > _MAX_ERRORS:  # listing them would take longer than finding them
            raise InvalidBodyError("body: has too many errors to name one") from None
        errors = error.errors(include_input=False, include_context=False, include_url=False)
        raise _as_invalid_body(errors[0], len(errors)) from None
    except ValueError:  # an integer of thousands of digits, among others
        raise InvalidBodyError("body: a number or a text is too long") from None


async def _read(request: Request, max_bytes: int) -> bytes:
    message = f"the body must not be larger than {max_bytes:,} bytes"
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdecimal() and int(announced[:15]) > max_bytes:
        raise BodyTooLargeError(message)
    chunks, num_bytes = [], 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise BodyTooLargeError(message)
            chunks.append(chunk)
    except ClientDisconnect:
        raise RequestError("the body did not arrive") from None
    return b"".join(chunks)


def _as_invalid_body(first: Any, num_errors: int) -> InvalidBodyError:
    names = [str(part) for part in first["loc"] if isinstance(part, str)]
    field = names[0] if names else None
    # The name of an unknown field is the sender's own text; a plain word is safe to say back.
    if field is None or not all(_NAME.fullmatch(name) for name in names[:1]):
        if first["type"] == "extra_forbidden":
            return InvalidBodyError("body: has a field that this route does not know")
        return InvalidBodyError(f"body: {first['msg'][:200]}")
    if field in _NOT_SUPPORTED and first["type"] == "extra_forbidden":
        return InvalidBodyError(f"{field}: not supported by this service; leave it out", field)
    expected = next((_EXPECTED[name] for name in reversed(names) if name in _EXPECTED), None)
    if expected is not None and num_errors > 1:
        return InvalidBodyError(f"{field}: {expected}", field)
    where = [str(part) for part in first["loc"][:4]]
    place = ".".join(part for part in where if _NAME.fullmatch(part))
    return InvalidBodyError(f"{place}: {first['msg'][:200]}", field)


def body_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that parses its own body."""
    json_schema = _inlined(schema.model_json_schema())
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": json_schema}}}
    }


def _inlined(schema: dict[str, Any]) -> Any:
    """The schema with its definitions in the places that refer to them."""
    definitions = schema.pop("$defs", {})

    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return replaced(definitions[part["$ref"].rpartition("/")[2]])
            return {key: replaced(value) for key, value in part.items()}
        return [replaced(one) for one in part] if isinstance(part, list) else part

    return replaced(schema)
