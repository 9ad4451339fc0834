"""The HTTP application: native routes, the OpenAI-compatible ones, and one handler for all errors."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from full_stack_transformer import __version__
from full_stack_transformer.errors import (
    AccessError,
    BodyTooLargeError,
    FullStackTransformerError,
    MissingExtraError,
    RequestError,
    ServiceBusyError,
    ServiceUnavailableError,
    UnknownModelError,
)
from full_stack_transformer.serving.http.bodies import InvalidBodyError, body_schema, parse_body
from full_stack_transformer.serving.http.guard import Guard, RequestFacts, error_response
from full_stack_transformer.serving.http.keys import ApiKeys
from full_stack_transformer.serving.http.prometheus import Metrics
from full_stack_transformer.serving.routes.generation import (
    ClientGoneError,
    Wanted,
    check_room,
    encode,
    options_of_texts,
    submitted,
    token_requests,
    wait_for_texts,
)
from full_stack_transformer.serving.routes.openai import make_openai_router
from full_stack_transformer.serving.routes.playground import make_playground_router
from full_stack_transformer.serving.routes.tasks import make_task_router
from full_stack_transformer.serving.schemas import (
    GeneratedTextsRequest,
    GeneratedTextsResponse,
    Health,
    Readiness,
    Version,
)
from full_stack_transformer.serving.workers.engine_worker import EngineWorker
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.task_worker import TaskWorker

# Every class of error that a request can end with, the most special first.
STATUS_OF_ERROR: tuple[tuple[type[FullStackTransformerError], int, str], ...] = (
    (AccessError, 401, "authentication_error"),
    (UnknownModelError, 404, "not_found_error"),
    (BodyTooLargeError, 413, "invalid_request_error"),
    (RequestError, 400, "invalid_request_error"),
    (MissingExtraError, 400, "invalid_request_error"),
    (ServiceBusyError, 429, "rate_limit_error"),
    (ServiceUnavailableError, 503, "server_error"),
    (FullStackTransformerError, 500, "server_error"),
)
_CODE_OF_STATUS = {404: "model_not_found", 429: "queue_full"}
_CLIENT_HAS_GONE = 499  # nginx's number; nobody reads it


@dataclass(frozen=True)
class AppOptions:
    """What the application is told beside its models."""

    keys: ApiKeys
    allowed_origins: Sequence[str] = ()
    request_timeout_seconds: float = 600.0
    max_body_bytes: int = 1 << 20
    watches: bool = False


def make_app(
    models: ServedModels,
    worker: EngineWorker,
    task_worker: TaskWorker,
    metrics: Metrics,
    options: AppOptions,
) -> ASGIApp:
    """The application around models and their workers; the server that runs it stops the workers."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(models.watch()) if options.watches else None
        yield
        if watching is not None:
            watching.cancel()

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
    app.state.max_body_bytes = options.max_body_bytes
    app.state.request_timeout_seconds = options.request_timeout_seconds
    metrics.watch_worker(worker, [model.name for model in models.generating])
    app.add_exception_handler(FullStackTransformerError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientGoneError, _answer_nobody)
    app.add_exception_handler(Exception, _answer_surprise)
    _add_native_routes(app, models)
    _add_operating_routes(app, models, metrics)
    task_router = make_task_router(models)
    app.include_router(task_router)
    app.include_router(make_openai_router(models))
    app.include_router(make_playground_router())
    task_paths = frozenset(route.path for route in task_router.routes if isinstance(route, Route))
    return Guard(
        app,
        keys=options.keys,
        allowed_origins=options.allowed_origins,
        metrics=metrics,
        early_answer=_make_early_answer(models, worker, task_worker, task_paths),
    )


def _make_early_answer(
    models: ServedModels, worker: EngineWorker, task_worker: TaskWorker, task_paths: frozenset[str]
) -> Callable[[str, RequestFacts], Response | None]:
    def early_answer(path: str, facts: RequestFacts) -> Response | None:
        """While every queue that a path may lead to is full: known before a body is read."""
        checks: list[Callable[[], None]] = []
        if path not in task_paths:
            checks += [partial(worker.check_room, one.engine, 1) for one in models.generating]
        # Vectors come from models of either kind.
        if path in task_paths or (path == "/v1/embeddings" and models.of_tasks):
            checks.append(task_worker.check_room)
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


def _add_native_routes(app: FastAPI, models: ServedModels) -> None:
    @app.post(
        "/generated_texts/",
        tags=["native"],
        response_model=GeneratedTextsResponse,
        openapi_extra=body_schema(GeneratedTextsRequest),
    )
    @app.post("/generated_texts", include_in_schema=False)
    async def generated_texts(request: Request) -> GeneratedTextsResponse:
        """Continue a text; fewer tokens than asked for where the context has less room."""
        body = await parse_body(request, GeneratedTextsRequest)
        model = models.find(body.model)
        check_room(request, model, body.num_return_sequences)
        prompt_ids = await encode(model, body.seed_text)
        options = options_of_texts(body)
        wanted = [
            Wanted(one)
            for one in token_requests(model, prompt_ids, options, body.num_return_sequences)
        ]
        with submitted(request, model, wanted) as exchange:
            texts = await wait_for_texts(exchange, request)
        restore = model.tokenizer.after_decoding
        return GeneratedTextsResponse(texts=[restore(text.text) for text in texts])


def _add_operating_routes(app: FastAPI, models: ServedModels, metrics: Metrics) -> None:
    worker: EngineWorker = app.state.worker
    task_worker: TaskWorker = app.state.task_worker

    @app.get("/health", tags=["operations"])
    @app.get("/health_check/", tags=["operations"])
    async def health() -> Health:
        """Whether the service answers; needs no key."""
        return Health()

    @app.get("/ready", tags=["operations"])
    async def ready(response: Response) -> Readiness:
        """Whether new requests are taken, and how many there are; 503 while the service stops."""
        response.status_code = 503 if worker.is_stopping else 200
        return Readiness(
            status="stopping" if worker.is_stopping else "ready",
            num_running=worker.num_running + task_worker.num_running,
            num_waiting=worker.num_waiting + task_worker.num_waiting,
        )

    @app.get("/version", tags=["operations"])
    @app.get("/version/", tags=["operations"], include_in_schema=False)
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
        """Figures for Prometheus, under the names of vLLM and TGI."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _answer_error(request: Request, error: Exception) -> Response:
    return _as_response(
        request.state.facts, error, is_native=not request.url.path.startswith("/v1/")
    )


def _as_response(facts: RequestFacts, error: Exception, *, is_native: bool = False) -> Response:
    status, kind = next(
        (status, kind) for cls, status, kind in STATUS_OF_ERROR if isinstance(error, cls)
    )
    # The ancestor's clients know 422 for a body that does not fit; OpenAI's know 400.
    if isinstance(error, InvalidBodyError) and is_native:
        status = 422
    facts.error_kind = kind
    headers = {}
    if isinstance(error, ServiceBusyError):
        headers["retry-after"] = str(error.retry_after_seconds)
    return error_response(status, kind, error, code=_CODE_OF_STATUS.get(status), headers=headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """A route or method that does not exist."""
    assert isinstance(error, HTTPException)
    request.state.facts.error_kind = "not_found_error"
    message = {404: "there is no such route; see /docs", 405: "this route knows other methods"}
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
