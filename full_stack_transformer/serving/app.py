"""The HTTP application: its routes, the page that talks to the models, and one handler for all errors."""

import asyncio
import contextlib
import gzip
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from full_stack_transformer import __version__
from full_stack_transformer.errors import (
    AccessError,
    AdminAccessError,
    BodyEncodingError,
    BodyTooLargeError,
    ContextLengthError,
    FullStackTransformerError,
    MissingExtraError,
    RequestError,
    ServiceBusyError,
    ServiceUnavailableError,
    UnknownModelError,
)
from full_stack_transformer.serving.http.bodies import InvalidBodyError, UnknownFields
from full_stack_transformer.serving.http.guard import (
    AllowedHosts,
    Guard,
    HttpMetrics,
    RequestFacts,
    error_response,
)
from full_stack_transformer.serving.http.keys import ApiKeys
from full_stack_transformer.serving.routes.adapters import add_adapter_routes
from full_stack_transformer.serving.routes.answering import ClientGoneError
from full_stack_transformer.serving.routes.chats import add_chat_route
from full_stack_transformer.serving.routes.completions import (
    add_completion_route,
    make_native_router,
)
from full_stack_transformer.serving.routes.embeddings import add_embedding_route
from full_stack_transformer.serving.routes.tasks import make_task_router
from full_stack_transformer.serving.schemas import (
    Health,
    Readiness,
    Version,
)
from full_stack_transformer.serving.workers.adapters import Adapters
from full_stack_transformer.serving.workers.engine_worker import EngineWorker, describe
from full_stack_transformer.serving.workers.grammars import Grammars
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.prometheus import WorkerMetrics
from full_stack_transformer.serving.workers.served import AnyServed
from full_stack_transformer.serving.workers.task_worker import TaskWorker

# Every class of error that a request can end with, the most special first.
STATUS_OF_ERROR: tuple[tuple[type[FullStackTransformerError], int, str], ...] = (
    (AdminAccessError, 403, "permission_error"),
    (AccessError, 401, "authentication_error"),
    (UnknownModelError, 404, "not_found_error"),
    (BodyTooLargeError, 413, "invalid_request_error"),
    (BodyEncodingError, 415, "invalid_request_error"),
    (RequestError, 400, "invalid_request_error"),
    (MissingExtraError, 400, "invalid_request_error"),
    (ServiceBusyError, 429, "rate_limit_error"),
    (ServiceUnavailableError, 503, "server_error"),
    (FullStackTransformerError, 500, "server_error"),
)
_CODE_OF_STATUS = {403: "admin_key_required", 404: "model_not_found", 429: "queue_full"}
# Which field is too long for the context.
_TEXT_OF_ROUTE = {
    "/v1/completions": "prompt",
    "/v1/chat/completions": "messages",
    "/v1/embeddings": "input",
    "/generated_texts/": "seed_text",
}
_CLIENT_HAS_GONE = 499  # nginx's number; nobody reads it


_PAGE_DIRECTORY = Path(__file__).with_name("playground")
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inside the markup, no page around it.
_PAGE_POLICY = "; ".join(
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
class AppOptions:
    """Options of the application."""

    keys: ApiKeys
    admin_keys: ApiKeys = field(default_factory=lambda: ApiKeys(frozenset()))
    host: str = "127.0.0.1"
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    request_timeout_seconds: float = 600.0
    max_body_bytes: int = 1 << 20
    strict_fields: bool = False
    prefix_cache: Literal["shared", "per_key", "off"] = "per_key"
    watches: bool = False
    adapters_root: Path | None = None
    max_adapters: int = 0
    is_leaving: Callable[[], bool] = lambda: False
    """Whether balancers should send no more requests, though they are still taken."""


def make_app(
    models: ServedModels,
    worker: EngineWorker,
    task_worker: TaskWorker,
    grammars: Grammars,
    metrics: WorkerMetrics,
    registry: CollectorRegistry,
    options: AppOptions,
) -> ASGIApp:
    """The application around models and their workers; the server that runs it stops the workers."""

    adapters = Adapters(models, worker, root=options.adapters_root, most=options.max_adapters)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(models.watch(adapters.follow)) if options.watches else None
        yield
        if watching is not None:
            watching.cancel()
        grammars.close()

    # The offline variant ships the assets of the documentation page: no other host is asked for them.
    app: FastAPI = FastAPIOffline(
        title=f"full_stack_transformer: {models.first.name}",
        description="Continue texts with this model; also speaks OpenAI's API under /v1.",
        version=__version__,
        lifespan=lifespan,
        # A redirect would repeat the sender's Host header.
        redirect_slashes=False,
    )
    app.state.worker = worker
    app.state.task_worker = task_worker
    app.state.grammars = grammars
    app.state.max_body_bytes = options.max_body_bytes
    app.state.unknown_fields = UnknownFields(refuses=options.strict_fields)
    app.state.request_timeout_seconds = options.request_timeout_seconds
    app.state.prefix_cache = options.prefix_cache
    metrics.watch_blocks(models)
    metrics.watch_guesses(models)
    metrics.watch_worker(worker, models)
    app.add_exception_handler(FullStackTransformerError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientGoneError, _answer_nobody)
    app.add_exception_handler(Exception, _answer_surprise)
    _add_operating_routes(app, models, registry, options)
    task_router = make_task_router(models)
    routers = [make_native_router(models), task_router, _make_openai_router(models, adapters)]
    for router in (*routers, _make_playground_router()):
        app.include_router(router)
    task_paths = frozenset(route.path for route in task_router.routes if isinstance(route, Route))

    def at_end(tickets: list[Any]) -> dict[str, Any]:
        metrics.forget(tickets)
        return describe(tickets)

    return Guard(
        app,
        keys=options.keys,
        admin_keys=options.admin_keys,
        hosts=AllowedHosts(options.host, options.allowed_hosts, options.allowed_origins),
        allowed_origins=options.allowed_origins,
        open_paths=playground_files(),
        metrics=HttpMetrics(registry),
        at_end=at_end,
        early_answer=_make_early_answer(models, worker, task_worker, task_paths),
        known_path=_make_known_path([app.router, *routers]),
        is_leaving=options.is_leaving,
    )


def _make_known_path(routers: Sequence[Router]) -> Callable[[str], str]:
    """Clients write paths with or without a slash at the end; the page's files have one spelling only."""
    routes = [route for router in routers for route in router.routes]
    known = {route.path for route in routes if isinstance(route, Route)}
    names = "/v1/models/"

    def known_path(path: str) -> str:
        if path in known:
            return path
        other = path.removesuffix("/") if path.endswith("/") else f"{path}/"
        is_model = path.endswith("/") and path.startswith(names)
        return other if other in known or is_model else path

    return known_path


def _make_early_answer(
    models: ServedModels, worker: EngineWorker, task_worker: TaskWorker, task_paths: frozenset[str]
) -> Callable[[str, RequestFacts], Response | None]:
    def early_answer(path: str, facts: RequestFacts) -> Response | None:
        """While every queue that a path may lead to is full: known before a body is read."""
        checks: list[Callable[[], None]] = []
        if path not in task_paths and not path.endswith("load_lora_adapter"):
            checks += [
                partial(worker.check_room, one.engine, 1, facts.client) for one in models.bases
            ]
        # Vectors come from models of either kind.
        if path in task_paths or (path == "/v1/embeddings" and models.of_tasks):
            checks.append(partial(task_worker.check_room, facts.client))
        error: Exception | None = None
        for check in checks:
            try:
                check()
            except ServiceUnavailableError as refusal:
                error = refusal
            else:
                return None
        return None if error is None else _as_response(facts, error)

    return early_answer


class ModelCard(BaseModel):
    """One entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "full_stack_transformer"
    parent: str | None = None
    """The base of an adapter, as vLLM names it."""


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def _make_openai_router(models: ServedModels, adapters: Adapters) -> APIRouter:
    """The routes below `/v1`."""
    router = APIRouter(prefix="/v1", tags=["OpenAI-compatible"])

    @router.get("/models")
    async def list_models() -> ModelList:
        """The models that are served."""
        return ModelList(data=[_card(model) for model in models.all])

    @router.get("/models/{name:path}")
    async def retrieve_model(name: str) -> ModelCard:
        """One of the models."""
        return _card(models.find_any(name))

    add_completion_route(router, models)
    add_chat_route(router, models)
    add_embedding_route(router, models)
    add_adapter_routes(router, adapters)
    return router


def _card(model: AnyServed) -> ModelCard:
    return ModelCard(id=model.name, created=model.loaded_at, parent=model.parent)


def _add_operating_routes(
    app: FastAPI,
    models: ServedModels,
    registry: CollectorRegistry,
    options: AppOptions,
) -> None:
    worker: EngineWorker = app.state.worker
    task_worker: TaskWorker = app.state.task_worker

    @app.get("/health", tags=["operations"])
    @app.get("/health_check/", tags=["operations"])
    async def health() -> Health:
        """Whether the service answers; needs no key."""
        return Health()

    @app.get("/ready", tags=["operations"], response_model_exclude_none=True)
    async def ready(request: Request, response: Response) -> Readiness:
        """Whether new requests should be sent here; 503 while the service stops. How many texts there are
        is for who has a key; the status needs none.
        """
        is_stopping = worker.is_stopping or options.is_leaving()
        response.status_code = 503 if is_stopping else 200
        status: Literal["ready", "stopping"] = "stopping" if is_stopping else "ready"
        if not options.keys.is_open and request.state.facts.key is None:
            return Readiness(status=status)
        return Readiness(
            status=status,
            num_running=worker.num_running + task_worker.num_running,
            num_waiting=worker.num_waiting + task_worker.num_waiting,
        )

    @app.get("/version", tags=["operations"])
    async def version() -> Version:
        """Which package serves which models: checkpoint, step, validation loss, dataset."""
        return Version(
            package_version=__version__,
            model=models.first.name,
            description=models.first.description,
            models=[model.facts for model in models.all],
        )

    @app.get("/metrics", tags=["operations"], response_class=Response)
    async def show_metrics() -> Response:
        """Metrics for Prometheus, under the names of vLLM and TGI."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


async def _answer_error(request: Request, error: Exception) -> Response:
    return _as_response(
        request.state.facts, error, getattr(request.scope.get("route"), "path", "/v1/")
    )


def _as_response(facts: RequestFacts, error: Exception, route: str = "/v1/") -> Response:
    status, kind = next(
        (status, kind) for cls, status, kind in STATUS_OF_ERROR if isinstance(error, cls)
    )
    # The ancestor's clients know 422 for a body that does not fit; OpenAI's know 400.
    if isinstance(error, InvalidBodyError) and not route.startswith("/v1/"):
        status = 422
    facts.error_kind = kind
    headers = {}
    if isinstance(error, ServiceBusyError):
        headers["retry-after"] = str(error.retry_after_seconds)
    code, parameter = _CODE_OF_STATUS.get(status), getattr(error, "parameter", None)
    if isinstance(error, ContextLengthError):
        code, parameter = "context_length_exceeded", _TEXT_OF_ROUTE.get(route)
    return error_response(status, kind, error, code=code, parameter=parameter, headers=headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """A route or method that does not exist."""
    assert isinstance(error, HTTPException)
    request.state.facts.error_kind = "not_found_error"
    message = {404: "no such route; see /docs", 405: "this route has other methods"}
    said = RequestError(message.get(error.status_code, "the request cannot be served"))
    return error_response(
        error.status_code, "not_found_error", said, headers=dict(error.headers or {})
    )


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_HAS_GONE)


async def _answer_surprise(request: Request, error: Exception) -> Response:
    """A bug of ours: the log has the traceback, the client a sentence."""
    request.state.facts.error_kind = "server_error"
    return error_response(500, "server_error", RequestError("the service failed on this request"))


# ---------------------------------------------------------------------- the page


@dataclass(frozen=True)
class PageFile:
    """One file of the page that talks to the models, as it is sent."""

    body: bytes
    zipped: bytes
    media_type: str
    tag: str


@cache
def playground_files() -> Mapping[str, PageFile]:
    """Files by their paths; a path that is not here does not exist, so none can leave the directory."""
    found = {}
    for path in sorted(_PAGE_DIRECTORY.iterdir()):
        if path.suffix not in _MEDIA_TYPES:
            continue
        body = path.read_bytes()
        # Weak: the zipped body is another one.
        tag = f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'
        file = PageFile(body, gzip.compress(body, mtime=0), _MEDIA_TYPES[path.suffix], tag)
        found["/" if path.name == "index.html" else f"/playground/{path.name}"] = file
    return found


def _make_playground_router() -> APIRouter:
    """A route for each file of the page.

    The page holds no data and needs no key; what it asks for does. Everything that it shows comes from the
    routes that other clients use too.
    """
    router = APIRouter(include_in_schema=False)
    for path, file in playground_files().items():
        router.add_api_route(path, _sender(file), methods=["GET"])
    return router


def _sender(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    async def send_file(request: Request) -> Response:
        headers = {
            "etag": file.tag,
            # Kept by the browser, but asked for each time: a new service has a new page.
            "cache-control": "no-cache",
            "content-security-policy": _PAGE_POLICY,
            "vary": "accept-encoding",
        }
        if file.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        body = file.body
        if "gzip" in request.headers.get("accept-encoding", ""):
            body, headers["content-encoding"] = file.zipped, "gzip"
        return Response(body, headers=headers, media_type=file.media_type)

    return send_file
