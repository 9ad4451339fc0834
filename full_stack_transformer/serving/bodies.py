"""Request bodies, read with a bound and parsed strictly.

FastAPI's own parsing answers 500 to NaN or a lone surrogate, because its 422 repeats the input, and it
reads a body of any size. So a route takes the raw request and parses here.
"""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from full_stack_transformer.errors import RequestError

MAX_BODY_BYTES = 2 << 20

_Body = TypeVar("_Body", bound=BaseModel)


async def parse_body(request: Request, schema: type[_Body]) -> _Body:
    """The body of a request.

    Raises:
        RequestError: it is too large, no JSON, or not of the schema; the message never repeats it.
    """
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise RequestError(f"the body must not be larger than {MAX_BODY_BYTES:,} bytes")
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False, include_url=False)[0]
        where = ".".join(str(part)[:50] for part in first["loc"][:4]) or "body"
        raise RequestError(f"{where}: {first['msg'][:300]}") from None


def body_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that parses its own body."""
    json_schema = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": json_schema}}}
    }
