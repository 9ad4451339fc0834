"""Vectors of texts: `/v1/embeddings`, and what `/embed` and `/similarity` need.

A model for sentence embeddings gives its own. One that generates gives the mean of what it makes of a text's
tokens; the token that begins a document is the same in all texts, and counts where there is no other.
"""

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from torch import Tensor

from full_stack_transformer.errors import ContextLengthError, RequestError
from full_stack_transformer.serving.http.bodies import InvalidBodyError, body_schema, parse_body
from full_stack_transformer.serving.routes.answering import encode, naming, sharing, unless_gone
from full_stack_transformer.serving.schemas import EmbeddingRequest
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.served import AnyServed, ServedTask
from full_stack_transformer.tasks.catalogue import EMBEDDING_TASK

_MAX_NUMBERS_AT_ONCE = 32_768


class Embedding(BaseModel):
    """The vector of one text; base64 holds float32, little-endian."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """Answer of `POST /v1/embeddings`, for the documentation: the route writes the same without it."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def add_embedding_route(router: APIRouter, models: ServedModels) -> None:
    """OpenAI's route."""

    @router.post(
        "/embeddings",
        response_model=EmbeddingResponse,
        openapi_extra=body_schema(EmbeddingRequest),
    )
    async def embed_inputs(request: Request) -> Response:
        """A vector of length one for each text: the model's own, or the mean of its last states."""
        body = await parse_body(request, EmbeddingRequest)
        return await answer_embeddings(request, body, find_embedding(models, body.model))


def find_embedding(models: ServedModels, name: str | None) -> AnyServed:
    """The model of that name; without one the first for embeddings, else the first that generates.

    Raises:
        UnknownModelError: no model has this name.
        RequestError: it is for another task.
    """
    found = models.find_any(name)
    if name is None:
        those: list[AnyServed] = [model for model in models.of_tasks if model.makes_vectors]
        found = next(iter([*those, *models.generating]), found)
    if isinstance(found, ServedTask) and not found.makes_vectors:
        raise RequestError(
            f"{found.name} is a model for {found.task.name}; this route needs one for {EMBEDDING_TASK}"
        )
    return found


async def answer_embeddings(request: Request, body: EmbeddingRequest, model: AnyServed) -> Response:
    """A vector of length one for each text.

    Raises:
        RequestError: it can never be given.
        ServiceUnavailableError: not now.
    """
    vectors, num_tokens = await embed(request, model, _inputs(body))
    width = vectors.shape[-1]
    if body.dimensions not in (None, width):
        raise InvalidBodyError(f"dimensions: this model's vectors have {width}", "dimensions")

    def content() -> dict[str, Any]:
        normalized = torch.nn.functional.normalize(vectors, dim=-1)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _written(vector, body)}
                for index, vector in enumerate(normalized)
            ],
            "model": model.name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }

    if vectors.numel() <= _MAX_NUMBERS_AT_ONCE:
        return JSONResponse(content())
    # Thousands of vectors take a second to write: others must not wait for that.
    return await asyncio.to_thread(lambda: JSONResponse(content()))


async def embed(
    request: Request, model: AnyServed, inputs: Sequence[str | list[int]]
) -> tuple[Tensor, int]:
    """Vectors (texts, hidden) of any length, and the number of tokens that were read.

    Raises:
        RequestError: it can never be given.
        ServiceUnavailableError: not now.
    """
    deadline = time.monotonic() + request.app.state.request_timeout_seconds
    if isinstance(model, ServedTask):
        return await _embed_by_task(request, model, inputs, deadline)
    worker, client = request.app.state.worker, request.state.facts.client
    worker.check_room(model.engine, 1, client)
    token_ids = await encode(model, inputs, "input")
    for index, ids in enumerate(token_ids):
        if len(ids) > model.engine.max_length:
            with naming("input", index, of=len(token_ids)):
                raise ContextLengthError(
                    f"the model's context is {model.engine.max_length} tokens, but the text has "
                    f"{len(ids)}; shorten it"
                )
    prefix = model.tokenizer.prefix_ids

    def mean(ids: Sequence[int], states: Tensor) -> Tensor:
        """Of the text's own tokens, where there are any."""
        is_framed = ids[: len(prefix)] == prefix and len(ids) > len(prefix)
        return states[len(prefix) if is_framed else 0 :].float().mean(dim=0).cpu()

    work = worker.hidden_states(
        *(model.name, model.engine, token_ids, deadline),
        client=client,
        summarize=mean,
        shares_with=sharing(request),
        adapter=model.adapter_number,
    )
    means = await unless_gone(request.receive, work)
    return torch.stack(means), sum(map(len, token_ids))


async def _embed_by_task(
    request: Request, model: ServedTask, inputs: Sequence[str | list[int]], deadline: float
) -> tuple[Tensor, int]:
    rows = [{"text": text} for text in inputs if isinstance(text, str)]
    if len(rows) < len(inputs):
        raise InvalidBodyError("input: this model reads texts, not token ids", "input")
    found = await unless_gone(
        request.receive,
        request.app.state.task_worker.predict(
            model.name, model.opened, rows, deadline, client=request.state.facts.client
        ),
    )
    return torch.tensor([one["embedding"] for one in found.predictions]), found.num_tokens


def _inputs(body: EmbeddingRequest) -> Sequence[str | list[int]]:
    given: Any = body.input
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def _written(vector: Tensor, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    values: list[float] = vector.tolist()
    return values
