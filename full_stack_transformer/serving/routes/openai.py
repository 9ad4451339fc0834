"""OpenAI-compatible routes: `/v1/models`, `/v1/completions`, `/v1/chat/completions`, `/v1/embeddings`."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from full_stack_transformer.serving.http.bodies import body_schema, parse_body
from full_stack_transformer.serving.routes.answers import (
    ChatCompletionResponse,
    CompletionResponse,
    EmbeddingResponse,
    ModelCard,
    ModelList,
)
from full_stack_transformer.serving.routes.chats import answer_chat
from full_stack_transformer.serving.routes.completions import answer_completion
from full_stack_transformer.serving.routes.embeddings import answer_embeddings, find_embedding
from full_stack_transformer.serving.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from full_stack_transformer.serving.workers.models import AnyServed, ServedModels


def make_openai_router(models: ServedModels) -> APIRouter:
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

    @router.post(
        "/completions",
        response_model=CompletionResponse,
        openapi_extra=body_schema(CompletionRequest),
    )
    async def complete(request: Request) -> Response:
        """Continue a text; with `stream` as server-sent events."""
        body = await parse_body(request, CompletionRequest)
        return await answer_completion(request, body, models.find(body.model))

    @router.post(
        "/chat/completions",
        response_model=ChatCompletionResponse,
        openapi_extra=body_schema(ChatCompletionRequest),
    )
    async def chat(request: Request) -> Response:
        """The model's next turn in a chat; with `stream` as server-sent events."""
        body = await parse_body(request, ChatCompletionRequest)
        return await answer_chat(request, body, models.find(body.model))

    @router.post(
        "/embeddings",
        response_model=EmbeddingResponse,
        openapi_extra=body_schema(EmbeddingRequest),
    )
    async def embed(request: Request) -> Response:
        """A vector of length one for each text: the model's own, or the mean of its last states."""
        body = await parse_body(request, EmbeddingRequest)
        return await answer_embeddings(request, body, find_embedding(models, body.model))

    return router


def _card(model: AnyServed) -> ModelCard:
    return ModelCard(id=model.name, created=model.loaded_at)
