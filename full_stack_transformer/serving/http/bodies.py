"""Request bodies, read with a bound and parsed strictly, but for fields that nobody knows.

FastAPI's own parsing answers 500 to NaN or a lone surrogate, because its 422 repeats the input, and it
reads a body of any size. So a route takes the raw request and parses here. The deadline for a body's
arrival is in connections.py.
"""

import logging
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from full_stack_transformer.errors import BodyEncodingError, BodyTooLargeError, RequestError
from full_stack_transformer.serving.schemas import TolerantBody

logger = logging.getLogger(__name__)

_Body = TypeVar("_Body", bound=BaseModel)

_MAX_ERRORS = 1000
_NAME = re.compile(r"[A-Za-z0-9_]{1,40}")
# What to say of fields that may be several things: pydantic names the first kind only.
_EXPECTED = {"stop": "should be a text or a list of up to 16, each of 1 to 200 characters"}
# Plainer than pydantic's words.
_PLAIN = {
    "missing": "is missing",
    "too_short": "must not be empty",
    "too_long": "must not have more than {max_length:,} items",
    "string_too_short": "must not be empty",
    "string_too_long": "must not have more than {max_length:,} characters",
    "extra_forbidden": "this route does not know this field; leave it out",
}
_NOT_SUPPORTED = "not supported by this service; leave it out"
_MAX_NAMES_IN_LOG, _MAX_NAMES_IN_HEADER = 256, 16


class UnknownFields:
    """What becomes of fields that no route knows: named once in the log, or refused.

    Args:
        refuses: whether a request with one is refused.
    """

    def __init__(self, *, refuses: bool) -> None:
        self.refuses = refuses
        self._logged: set[str] = set()

    def note(self, names: list[str], path: str) -> None:
        """Log the names that are new; as many as a person can read, whatever strangers send."""
        for name in names:
            if name in self._logged or len(self._logged) >= _MAX_NAMES_IN_LOG:
                continue
            self._logged.add(name)
            logger.warning(
                "%s: ignored the unknown field %s; --strict_fields refuses such requests",
                path,
                name,
            )


class InvalidBodyError(RequestError):
    """A body that does not fit the route's schema; the message never repeats it."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


async def parse_body(request: Request, schema: type[_Body]) -> _Body:
    """The body of a request; the names of unknown fields go to the log and into a header of the answer.

    Raises:
        BodyTooLargeError: it has more bytes than the service reads.
        BodyEncodingError: it is compressed.
        InvalidBodyError: it is not JSON, or does not fit the schema.
    """
    raw = await read_body(request, request.app.state.max_body_bytes)
    unknown: UnknownFields = request.app.state.unknown_fields
    try:
        body = schema.model_validate_json(raw, extra="forbid" if unknown.refuses else "allow")
    except ValidationError as error:
        if error.error_count() > _MAX_ERRORS:  # listing them would take longer than finding them
            raise InvalidBodyError("body: has too many errors to name one") from None
        errors = error.errors(include_input=False, include_url=False)
        raise _as_invalid_body(schema, errors[0], len(errors)) from None
    except ValueError:  # an integer of thousands of digits, among others
        raise InvalidBodyError("body: a number or a text is too long") from None
    if ignored := list(dict.fromkeys(_ignored(body))):
        unknown.note(ignored, request.url.path)
        more = ", ..." if len(ignored) > _MAX_NAMES_IN_HEADER else ""
        request.state.facts.ignored_fields = ", ".join(ignored[:_MAX_NAMES_IN_HEADER]) + more
    return body


def _ignored(part: BaseModel, place: str = "") -> Iterator[str]:
    """Names of fields that the schema does not have; elements of a list share theirs.

    Raises:
        InvalidBodyError: one would change the answer, as other services understand it.
    """
    refused = {**part.foreign, **part.aliases} if isinstance(part, TolerantBody) else {}
    for name in part.model_extra or {}:
        if name in refused:
            field = f"{place}{name}"
            raise InvalidBodyError(f"{field}: {_NOT_SUPPORTED}", field)
        shown = name if _NAME.fullmatch(name) else "(other)"
        yield re.sub(r"\[\d+\]", "", place) + shown
    for name in part.model_fields_set:
        value = getattr(part, name, None)
        if isinstance(value, BaseModel):
            yield from _ignored(value, f"{place}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for index, one in enumerate(value):
                yield from _ignored(one, f"{place}{name}[{index}].")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The bytes of a body.

    Raises:
        BodyTooLargeError: it has more.
        BodyEncodingError: it is compressed.
        RequestError: it did not arrive.
    """
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
    # Said when the body has been read, so that the connection can go on.
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise BodyEncodingError("the body must not be compressed; send it without content-encoding")
    return b"".join(chunks)


def _as_invalid_body(schema: type[BaseModel], first: Any, num_errors: int) -> InvalidBodyError:
    names = [str(part) for part in first["loc"] if isinstance(part, str)]
    field = names[0] if names else None
    plain = _PLAIN.get(first["type"])
    said = first["msg"][:200] if plain is None else plain.format(**first.get("ctx", {}))
    # The name of an unknown field is the sender's own text; a plain word is safe to say back.
    if field is None or not _NAME.fullmatch(field):
        if first["type"] == "extra_forbidden":
            return InvalidBodyError("body: has a field that this route does not know")
        return InvalidBodyError(f"body: {said}")
    if first["type"] == "extra_forbidden" and names[-1] in _known_elsewhere(schema):
        said = _NOT_SUPPORTED
    if field in _EXPECTED and num_errors > 1:
        return InvalidBodyError(f"{field}: {_EXPECTED[field]}", field)
    place = _place(first["loc"][:6])
    return InvalidBodyError(f"{place}: {said}", place)


def _known_elsewhere(schema: type[BaseModel]) -> frozenset[str]:
    """Fields of other services, of the body itself."""
    if not issubclass(schema, TolerantBody):
        return frozenset()
    return frozenset((*schema.foreign, *schema.aliases))


def _place(location: tuple[str | int, ...]) -> str:
    """Where in the body, such as messages[3].content; without pydantic's names of the kinds of a value."""
    place = ""
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif _NAME.fullmatch(part):
            place += f".{part}" if place else part
    return place


def body_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that parses its own body."""
    json_schema = _inlined(schema.model_json_schema())
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": json_schema}}}
    }


def _inlined(schema: dict[str, Any]) -> Any:
    """The schema with its definitions in the places that refer to them; unknown fields are let pass."""
    definitions = schema.pop("$defs", {})

    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return replaced(definitions[part["$ref"].rpartition("/")[2]])
            return {
                key: replaced(value)
                for key, value in part.items()
                if (key, value) != ("additionalProperties", False)
            }
        return [replaced(one) for one in part] if isinstance(part, list) else part

    return replaced(schema)
