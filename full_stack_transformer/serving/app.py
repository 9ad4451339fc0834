"""The HTTP application: native routes, the OpenAI-compatible ones, and one handler for all errors."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline

from full_stack_transformer import __version__
from full_stack_transformer.errors import (
    FullStackTransformerError,
    RequestError,
    ServiceUnavailableError,
)
from full_stack_transformer.serving.bodies import body_schema, parse_body
from full_stack_transformer.serving.engine_worker import EngineWorker
from full_stack_transformer.serving.generation import options_of, submitted, wait_for_texts
from full_stack_transformer.serving.openai import make_openai_router
from full_stack_transformer.serving.schemas import (
    ErrorDetail,
    ErrorResponse,
    GeneratedTextsRequest,
    GeneratedTextsResponse,
    Health,
    Version,
)

# Every class of error that a request can end with, the most special first.
STATUS_OF_ERROR: tuple[tuple[type[FullStackTransformerError], int, str], ...] = (
    (RequestError, 400, "invalid_request_error"),
    (ServiceUnavailableError, 429, "rate_limit_error"),
    (FullStackTransformerError, 500, "server_error"),
)


def make_app(worker: EngineWorker) -> FastAPI:
    """The application around a worker; stops it when the server ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.stop()

    # The offline variant ships the assets of the documentation page: no other host is asked for them.
    app: FastAPI = FastAPIOffline(
        title=f"full_stack_transformer: {worker.model.name}",
        description="Continue texts with this model; also speaks OpenAI's completions API under /v1.",
        version=__version__,
        lifespan=lifespan,
    )
    app.add_exception_handler(FullStackTransformerError, _answer_error)
    _add_native_routes(app, worker)
    app.include_router(make_openai_router(worker))
    return app


def _add_native_routes(app: FastAPI, worker: EngineWorker) -> None:
    @app.post(
        "/generated_texts/",
        tags=["native"],
        response_model=GeneratedTextsResponse,
        openapi_extra=body_schema(GeneratedTextsRequest),
    )
    async def generated_texts(request: Request) -> GeneratedTextsResponse:
        """Continue a text; fewer tokens than asked for where the context has less room."""
        body = await parse_body(request, GeneratedTextsRequest)
        with submitted(
            worker, body.seed_text, options_of(body), body.num_return_sequences
        ) as tickets:
            texts = await wait_for_texts(tickets, request)
        restore = worker.model.tokenizer.after_decoding
        return GeneratedTextsResponse(texts=[restore(text.text) for text in texts])

    @app.get("/health", tags=["native"])
    @app.get("/health_check/", tags=["native"])
    async def health() -> Health:
        """Whether the service answers."""
        return Health()

    @app.get("/version", tags=["native"])
    @app.get("/version/", tags=["native"], include_in_schema=False)
    async def version() -> Version:
        """Which package serves which model: step, validation loss, dataset."""
        return Version(
            package_version=__version__,
            model=worker.model.name,
            description=worker.model.description,
        )


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    status, kind = next(
        (status, kind) for cls, status, kind in STATUS_OF_ERROR if isinstance(error, cls)
    )
    body = ErrorResponse(error=ErrorDetail(message=str(error), type=kind))
    headers = {"retry-after": "1"} if status == 429 else None
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)
