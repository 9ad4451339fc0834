"""The routes of tasks, which the tasks describe: `/classify`, `/fill_mask`, `/choose`, …

Rows of requests that come together are computed together; keys, limits, deadlines, metrics and errors are
those of all routes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request

from full_stack_transformer.errors import ModelError
from full_stack_transformer.serving.http.bodies import InvalidBodyError, body_schema, parse_body
from full_stack_transformer.serving.routes.answering import unless_gone
from full_stack_transformer.serving.routes.embeddings import embed, find_embedding
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.served import ServedTask
from full_stack_transformer.serving.workers.task_worker import Predicted
from full_stack_transformer.tasks.catalogue import TASKS
from full_stack_transformer.tasks.opening import task_class
from full_stack_transformer.tasks.routes import Route
from full_stack_transformer.tasks.task import Prediction, Task


def make_task_router(models: ServedModels) -> APIRouter:
    """The routes of all tasks; which of them have a model, `/version` says.

    Raises:
        ModelError: two tasks have different routes of one path.
    """
    router = APIRouter(tags=["other tasks"])
    paths: dict[str, Route] = {}
    for cls in _tasks(models):
        for route in cls.routes:
            if route.path not in paths:
                paths[route.path] = route
                _add_route(router, models, route, cls.name)
            elif paths[route.path] != route:
                raise ModelError(
                    f"{cls.__name__} has a route {route.path} of its own, but another task has one of this "
                    "path; name it otherwise"
                )
    return router


def _tasks(models: ServedModels) -> Iterator[type[Task]]:
    """Those of the package, and those of one's own that are served."""
    yield from map(task_class, TASKS)
    yield from (type(model.task) for model in models.of_tasks)


def _add_route(router: APIRouter, models: ServedModels, route: Route, task: str) -> None:
    async def answer(request: Request) -> Any:
        body: Any = await parse_body(request, route.body)
        try:
            rows = route.rows(body)
        except ValueError as error:
            raise InvalidBodyError(str(error), str(error).partition(":")[0]) from None
        if route.needs_vectors:
            model = find_embedding(models, body.model)
            vectors, _ = await embed(request, model, [row["text"] for row in rows])
            predictions = [{"embedding": vector} for vector in vectors.tolist()]
            return route.answer(model=model.name, **route.reply(predictions))
        model = models.find_task(body.model, route, task)
        predictions = await _predict(request, model, rows)
        return route.answer(model=model.name, **route.reply(predictions))

    router.add_api_route(
        route.path,
        answer,
        methods=["POST"],
        name=route.path.strip("/"),
        description=route.summary,
        response_model=route.answer,
        openapi_extra=body_schema(route.body),
    )


async def _predict(
    request: Request, model: ServedTask, rows: Sequence[Mapping[str, Any]]
) -> list[Prediction]:
    state: Any = request.app.state
    deadline = time.monotonic() + state.request_timeout_seconds
    work = state.task_worker.predict(
        model.name, model.opened, rows, deadline, client=request.state.facts.client
    )
    found: Predicted = await unless_gone(request.receive, work)
    return found.predictions
