"""Routes of models for other tasks: `/classify`, `/fill_mask`, `/choose`, `/answer`, `/label`, `/embed`,
`/similarity`.

Rows of requests that come together are computed together; keys, limits, deadlines, metrics and errors are
those of all routes.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import APIRouter, Request

from full_stack_transformer.serving.http.bodies import InvalidBodyError, body_schema, parse_body
from full_stack_transformer.serving.routes.embeddings import embed, find_embedding
from full_stack_transformer.serving.routes.generation import unless_gone
from full_stack_transformer.serving.routes.task_schemas import (
    Answer,
    AnswerRequest,
    Choice,
    ChooseRequest,
    ClassifyRequest,
    Embeddings,
    Predictions,
    Similarities,
    TextsRequest,
)
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.task_models import ServedTask
from full_stack_transformer.serving.workers.task_worker import Predicted
from full_stack_transformer.tasks.task import Prediction, Row


def make_task_router(models: ServedModels) -> APIRouter:
    """The routes; which of them have a model, `/version` says."""
    router = APIRouter(tags=["other tasks"])
    _add_predictions(router, models)
    _add_decisions(router, models)
    _add_vectors(router, models)
    return router


def _add_predictions(router: APIRouter, models: ServedModels) -> None:
    @router.post("/classify", openapi_extra=body_schema(ClassifyRequest))
    async def classify(request: Request) -> Predictions:
        """The class of each text, or of each pair, with the probability of every class."""
        body = await parse_body(request, ClassifyRequest)
        pairs: Sequence[str | None] = body.text_pairs or [None] * len(body.texts)
        if len(pairs) != len(body.texts):
            raise InvalidBodyError("text_pairs: should be one for each text", "text_pairs")
        rows = [
            {"text": text} if pair is None else {"text": text, "text_pair": pair}
            for text, pair in zip(body.texts, pairs, strict=True)
        ]
        model = models.find_task(body.model, "sequence_classification")
        return Predictions(model=model.name, predictions=await _predict(request, model, rows))

    @router.post("/fill_mask", openapi_extra=body_schema(TextsRequest))
    async def fill_mask(request: Request) -> Predictions:
        """The likeliest tokens for each mask of each text; `/version` names the mask token."""
        return await _predict_texts(request, models, "masked_lm")

    @router.post("/label", openapi_extra=body_schema(TextsRequest))
    async def label(request: Request) -> Predictions:
        """A label for each word of each text."""
        return await _predict_texts(request, models, "token_labelling")


def _add_decisions(router: APIRouter, models: ServedModels) -> None:
    @router.post("/choose", openapi_extra=body_schema(ChooseRequest))
    async def choose(request: Request) -> Choice:
        """Which of several texts goes on with a text, or answers it."""
        body = await parse_body(request, ChooseRequest)
        model = models.find_task(body.model, "multiple_choice")
        [found] = await _predict(request, model, [{"text": body.text, "choices": body.choices}])
        return Choice(model=model.name, **found)

    @router.post("/answer", openapi_extra=body_schema(AnswerRequest))
    async def answer(request: Request) -> Answer:
        """The part of a text that answers a question."""
        body = await parse_body(request, AnswerRequest)
        model = models.find_task(body.model, "span_selection")
        row = {"question": body.question, "context": body.context}
        [found] = await _predict(request, model, [row])
        return Answer(model=model.name, **found)


def _add_vectors(router: APIRouter, models: ServedModels) -> None:
    @router.post("/embed", openapi_extra=body_schema(TextsRequest))
    async def embed_texts(request: Request) -> Embeddings:
        """A vector for each text, as the model gives it."""
        body = await parse_body(request, TextsRequest)
        model = find_embedding(models, body.model)
        vectors, _ = await embed(request, model, body.texts)
        return Embeddings(model=model.name, embeddings=vectors.tolist())

    @router.post("/similarity", openapi_extra=body_schema(TextsRequest))
    async def similarity(request: Request) -> Similarities:
        """The cosine between any two of the texts."""
        body = await parse_body(request, TextsRequest)
        model = find_embedding(models, body.model)
        vectors, _ = await embed(request, model, body.texts)
        directions = torch.nn.functional.normalize(vectors, dim=-1)
        return Similarities(model=model.name, similarity=(directions @ directions.T).tolist())


async def _predict_texts(request: Request, models: ServedModels, task: str) -> Predictions:
    body = await parse_body(request, TextsRequest)
    model = models.find_task(body.model, task)
    found = await _predict(request, model, [{"text": text} for text in body.texts])
    return Predictions(model=model.name, predictions=found)


async def _predict(request: Request, model: ServedTask, rows: Sequence[Row]) -> list[Prediction]:
    state: Any = request.app.state
    deadline = time.monotonic() + state.request_timeout_seconds
    work = state.task_worker.predict(model.name, model.opened, rows, deadline)
    found: Predicted = await unless_gone(request.receive, work)
    return found.predictions
