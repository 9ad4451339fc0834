"""The web page that talks to the model: its files, from memory, under exact paths.

The page holds no data and needs no key; what it asks for does. Knows nothing of models: everything that the
page shows comes from the routes that other clients use too.
"""

import gzip
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

_DIRECTORY = Path(__file__).parents[1] / "playground"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inside the markup, no page around it.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


@dataclass(frozen=True)
class PageFile:
    """One file of the page, as it is sent."""

    body: bytes
    zipped: bytes
    media_type: str
    tag: str


@cache
def playground_files() -> Mapping[str, PageFile]:
    """Files by their paths; a path that is not here does not exist, so none can leave the directory."""
    found = {}
    for path in sorted(_DIRECTORY.iterdir()):
        if path.suffix not in _MEDIA_TYPES:
            continue
        body = path.read_bytes()
        # Weak: the zipped body is another one.
        tag = f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'
        file = PageFile(body, gzip.compress(body, mtime=0), _MEDIA_TYPES[path.suffix], tag)
        found["/" if path.name == "index.html" else f"/playground/{path.name}"] = file
    return found


def make_playground_router() -> APIRouter:
    """A route for each file."""
    router = APIRouter(include_in_schema=False)
    for path, file in playground_files().items():
        router.add_api_route(path, _sender(file), methods=["GET", "HEAD"])
    return router


def _sender(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    async def send_file(request: Request) -> Response:
        headers = {
            "etag": file.tag,
            # Kept by the browser, but asked for each time: a new service has a new page.
            "cache-control": "no-cache",
            "content-security-policy": _POLICY,
            "vary": "accept-encoding",
        }
        if file.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        body = file.body
        if "gzip" in request.headers.get("accept-encoding", ""):
            body, headers["content-encoding"] = file.zipped, "gzip"
        return Response(body, headers=headers, media_type=file.media_type)

    return send_file
