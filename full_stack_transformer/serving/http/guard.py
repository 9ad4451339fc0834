"""What stands around the whole application: hosts, keys, pages of other sites, headers, the log of requests.

    request -> id -> one of our names? -> page of another site? -> key? -> application -> security headers
      -> log line, metrics

Denies by default: what is open without a key is a list of exact paths. Logs sizes, times and outcomes, never
texts. Pure ASGI, so that streams pass through it piece by piece.
"""

import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from full_stack_transformer.errors import AccessError
from full_stack_transformer.serving.http.keys import ApiKeys
from full_stack_transformer.serving.schemas import ErrorDetail, ErrorResponse

logger = logging.getLogger(__name__)

# What probes and balancers ask, who have no key.
OPEN_PATHS = frozenset(("/health", "/ready"))
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PREFLIGHT_SECONDS = b"600"
_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]{2,45})\]|(?P<name>[a-z0-9._-]{1,253}))(?::[0-9]{0,5})?")
# http://host/path in place of the path, as clients of proxies write it.
_ABSOLUTE = re.compile(rb"(?i:https?)://(?P<host>[^/?#@]+)(?P<path>/[^?#]*)?")
# What pages of allowed sites may send; OpenAI's JavaScript client has many headers of its own.
_HEADERS_OF_PAGES = ("authorization", "content-type", "x-request-id")
_PREFIXES_OF_PAGES = ("x-stainless-", "openai-")
_MAX_HEADERS_OF_PAGES = 64
_PAGES = ("/docs", "/redoc")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
# The documentation page has a script of its own inside it.
_PAGE_POLICY = (
    b"content-security-policy",
    b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data:; frame-ancestors 'none'",
)


class AllowedHosts:
    """The names under which the service may be asked.

    A page of a stranger can let the name of its own site lead to this machine (DNS rebinding); the browser
    then takes the service for a part of that site, and only the Host header tells. Loopback names always
    pass, and so does the address that the service listens on. One that listens on all interfaces is also
    asked by any address, which cannot be rebound, and by the machine's own name.

    Args:
        bound: the host that the service listens on.
        names: further names, *.example.org for all below it, * for all.
        origins: sites whose pages may ask: their hosts are names of the service too.
    """

    def __init__(self, bound: str, names: Iterable[str] = (), origins: Iterable[str] = ()) -> None:
        here = bound.strip("[]").lower()
        self._is_wild = here in ("", "0.0.0.0", "::")  # noqa: S104 (only compared)
        own = socket.gethostname().lower()
        given = {name.lower().rstrip(".") for name in names} | {here}
        given |= {"*" if one == "*" else _name_of(one.partition("://")[2]) or "" for one in origins}
        given |= {own, f"{own}.local"} if self._is_wild else set()
        self._allows_all = "*" in given
        self._names = frozenset(given - {""})
        self._endings = tuple(one[1:] for one in given if one.startswith("*."))

    def allows(self, host: str) -> bool:
        """Whether a Host header names this service."""
        name = _name_of(host)
        if self._allows_all or name is None:
            return self._allows_all
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            is_local = name == "localhost" or name.endswith(".localhost")
            return is_local or name in self._names or name.endswith(self._endings)
        if isinstance(address, ipaddress.IPv6Address):
            address = address.ipv4_mapped or address
        return address.is_loopback or self._is_wild or str(address) in self._names


def _name_of(host: str) -> str | None:
    """The name or address in a Host header, without port and brackets; none where it has another form."""
    found = _HOST.fullmatch(host.lower())
    return (found["v6"] or found["name"].rstrip(".")) if found else None


@dataclass
class RequestFacts:
    """What is known of one request; handlers add to it."""

    request_id: str
    started: float
    address: str = ""
    """Of the client; of all in its network, where that is IPv6."""
    key: str | None = None
    is_admin: bool = False
    """Whether it has an admin key."""
    status: int = 0
    num_bytes: int = 0
    error_kind: str | None = None
    ignored_fields: str = ""
    """Names of the body's unknown fields."""
    tickets: list[Any] = field(default_factory=list)
    """What the application computes for it; the guard only hands it on."""

    @property
    def client(self) -> str:
        """Who shares the queues with others: a key, or an address where there are no keys."""
        return self.key or self.address


class HttpMetrics:
    """Prometheus metrics of requests and answers."""

    def __init__(self, registry: CollectorRegistry, prefix: str = "fst") -> None:
        self.answers = Counter(
            f"{prefix}_http_requests",
            "Answers by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self.errors = Counter(
            f"{prefix}_errors",
            "Answers that were errors, by their kind.",
            ["kind"],
            registry=registry,
        )
        self.under_way = Gauge(
            f"{prefix}_http_tasks", "HTTP requests under way.", registry=registry
        )


class Guard:
    """Wraps an application.

    Args:
        app: the application.
        keys: what opens it.
        admin_keys: keys that open it too, and routes for who runs the service besides.
        hosts: names of the service.
        allowed_origins: sites whose pages may ask from a browser; "*" for all.
        open_paths: paths that need no key, in addition to /health and /ready.
        metrics: counts requests and answers.
        at_end: told of the tickets of each request at its end; returns what the log says of them.
        early_answer: an answer to a POST to a path while nothing can be taken there; what it costs decides
            how many requests too many the service stands.
        known_path: the spelling of a path that a route has, with or without a slash at its end.
        is_leaving: whether each connection ends with the answer, so that its client finds another service.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        admin_keys: ApiKeys,
        hosts: AllowedHosts,
        allowed_origins: Sequence[str],
        open_paths: Iterable[str],
        metrics: HttpMetrics,
        at_end: Callable[[list[Any]], dict[str, Any]],
        early_answer: Callable[[str, RequestFacts], Response | None],
        known_path: Callable[[str], str],
        is_leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys
        self._hosts = hosts
        self._open_paths = OPEN_PATHS.union(open_paths)
        self._origins = frozenset(allowed_origins)
        self._metrics = metrics
        self._at_end = at_end
        self._early_answer = early_answer
        self._known_path = known_path
        self._is_leaving = is_leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        scope = _in_origin_form(scope)
        headers = Headers(scope=scope)
        facts = RequestFacts(_request_id(headers), time.monotonic(), _address(scope))
        scope.setdefault("state", {})["facts"] = facts
        cross_origin = self._cross_origin_headers(headers)
        # HEAD is GET without the body, which the connection leaves out.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        inner = {**scope, "method": method, "path": self._known_path(scope["path"])}

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts.status = message["status"]
                own = message.get("headers", [])
                policy = _PAGE_POLICY if scope["path"].startswith(_PAGES) else _POLICY
                # What a route says of itself, such as the playground of its scripts, goes before.
                named = {name for name, _ in own}
                message["headers"] = [
                    *own,
                    *(header for header in (*_HEADERS, policy) if header[0] not in named),
                    (b"x-request-id", facts.request_id.encode()),
                    *cross_origin,
                ]
                if self._is_leaving():
                    message["headers"].append((b"connection", b"close"))
                if facts.ignored_fields:
                    ignored = facts.ignored_fields.encode()
                    message["headers"].append((b"x-ignored-fields", ignored))
            elif message["type"] == "http.response.body":
                facts.num_bytes += len(message.get("body", b""))
            await send(message)

        self._metrics.under_way.inc()
        try:
            answer = self._preflight(scope, headers) or self._refusal(scope, headers, facts)
            if answer is None and scope["method"] == "POST":
                answer = self._early_answer(inner["path"], facts)
            await (answer or self._app)(inner, receive, send_guarded)
        finally:
            self._metrics.under_way.dec()
            self._note(scope["method"], getattr(inner.get("route"), "path", "none"), facts)

    def _refusal(self, scope: Scope, headers: Headers, facts: RequestFacts) -> Response | None:
        """The answer to a request that may not pass."""
        if "transfer-encoding" in headers and "content-length" in headers:
            # Which of them counts, a proxy in front may see in another way: RFC 9112, section 6.3.
            facts.error_kind = "invalid_request_error"
            said = AccessError("a request has either content-length or transfer-encoding")
            return error_response(
                400, "invalid_request_error", said, headers={"connection": "close"}
            )
        # A client of HTTP/1.0 may send none; browsers always do.
        if "host" in headers and not self._hosts.allows(headers["host"]):
            facts.error_kind = "permission_error"
            said = AccessError(
                "the service does not know this name as its own; if it is, start it with --allowed_hosts NAME"
            )
            return error_response(403, "permission_error", said, code="host_not_allowed")
        if not self._is_from_allowed_page(scope, headers):
            facts.error_kind = "permission_error"
            return error_response(
                403, "permission_error", AccessError("pages of this site may not ask here")
            )
        # Several such headers are none: which of them counts would be a guess.
        given = headers.getlist("authorization")
        key = given[0].encode("latin-1") if len(given) == 1 else b""
        admin = self._admin_keys.find(key)
        facts.is_admin = admin is not None
        if self._keys.is_open:
            return None
        facts.key = self._keys.find(key) or admin
        is_open = scope["path"] in self._open_paths and scope["method"] in ("GET", "HEAD")
        if is_open or facts.key is not None:
            return None
        facts.error_kind = "authentication_error"
        response = error_response(
            401,
            "authentication_error",
            AccessError("this service needs a key: send it as `Authorization: Bearer KEY`"),
            code="invalid_api_key",
        )
        response.headers["www-authenticate"] = "Bearer"
        return response

    def _is_from_allowed_page(self, scope: Scope, headers: Headers) -> bool:
        """Browsers name the site of the page that asks; a page of another site must not, unless allowed."""
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return True
        return origin == f"{scope['scheme']}://{headers.get('host', '')}"

    def _cross_origin_headers(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        origin = headers.get("origin")
        if origin is None or not ("*" in self._origins or origin in self._origins):
            return []
        allowed = b"*" if "*" in self._origins else origin.encode("latin-1")
        return [
            (b"access-control-allow-origin", allowed),
            (b"access-control-expose-headers", b"x-request-id, x-ignored-fields, retry-after"),
            (b"vary", b"origin"),
        ]

    def _preflight(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a browser that asks whether it may ask."""
        if scope["method"] != "OPTIONS" or "access-control-request-method" not in headers:
            return None
        if not (
            self._cross_origin_headers(headers) and self._hosts.allows(headers.get("host", ""))
        ):
            return None
        wanted = headers.get("access-control-request-headers", "").lower().split(",")
        others = [one.strip() for one in wanted[:_MAX_HEADERS_OF_PAGES]]
        others = [
            one
            for one in dict.fromkeys(others)
            if one.startswith(_PREFIXES_OF_PAGES) and _REQUEST_ID.fullmatch(one)
        ]
        allowed = {
            "access-control-allow-methods": "GET, HEAD, POST",
            "access-control-allow-headers": ", ".join((*_HEADERS_OF_PAGES, *others)),
            "access-control-max-age": _PREFLIGHT_SECONDS.decode(),
        }
        return Response(status_code=204, headers=allowed)

    def _note(self, method: str, route: str, facts: RequestFacts) -> None:
        """One line and the counters; a request without an answer is one whose client went away."""
        status = facts.status or 499
        details = self._at_end(facts.tickets)
        self._metrics.answers.labels(route, str(status)).inc()
        if facts.error_kind is not None:
            self._metrics.errors.labels(facts.error_kind).inc()
        line = {
            "request_id": facts.request_id,
            "key": facts.key,
            "method": method if method.isalpha() else "other",
            "route": route,
            "status": status,
            "error": facts.error_kind,
            "seconds": round(time.monotonic() - facts.started, 6),
            **details,
            "answer_bytes": facts.num_bytes,
        }
        logger.debug("request", extra={"facts": line})


def _in_origin_form(scope: Scope) -> Scope:
    """The scope of a target such as http://host/path, with the path alone and this host: RFC 9112, 3.2.2."""
    found = _ABSOLUTE.fullmatch(scope["raw_path"])
    if found is None:
        return dict(scope)
    path = found["path"] or b"/"
    others = [header for header in scope["headers"] if header[0] != b"host"]
    return {
        **scope,
        "raw_path": path,
        "path": unquote(path.decode("ascii")),
        "headers": [(b"host", found["host"]), *others],
    }


def _address(scope: Scope) -> str:
    """Whom a request comes from; one network of IPv6 is one client, as it may have any address there."""
    host, _ = scope.get("client") or ("", 0)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # not a socket of the internet
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def error_response(
    status: int,
    kind: str,
    error: Exception,
    *,
    code: str | None = None,
    parameter: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An answer in OpenAI's shape."""
    detail = ErrorDetail(message=str(error), type=kind, code=code, param=parameter)
    body = ErrorResponse(error=detail).model_dump()
    return JSONResponse(body, status_code=status, headers=headers)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
