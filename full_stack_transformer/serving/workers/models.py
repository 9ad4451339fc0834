"""The models that are served, by name; `--watch` replaces one between requests.

A request keeps the model it began with, so a replaced one lives until its last request has ended.
"""

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Sequence

from full_stack_transformer.errors import (
    ModelError,
    RequestError,
    UnknownModelError,
)
from full_stack_transformer.serving.workers.opening import OpeningOptions, open_served, signature_of
from full_stack_transformer.serving.workers.served import AnyServed, ServedModel, ServedTask
from full_stack_transformer.tasks.routes import Route

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 2.0


class ServedModels:
    """Models by name, at least one; the first is the default."""

    def __init__(self, models: Sequence[AnyServed], options: OpeningOptions) -> None:
        self._models: dict[str, AnyServed] = {model.name: model for model in models}
        self._options = options
        if len(self._models) < len(models):
            names = ", ".join(model.name for model in models)
            raise ModelError(f"every model needs a name of its own, found {names}; use NAME=PATH")

    @property
    def first(self) -> AnyServed:
        """The first of the command line."""
        return next(iter(self._models.values()))

    @property
    def all(self) -> list[AnyServed]:
        """Every model, in the order of the command line."""
        return list(self._models.values())

    @property
    def generating(self) -> list[ServedModel]:
        """Those that continue texts."""
        return [model for model in self.all if isinstance(model, ServedModel)]

    @property
    def bases(self) -> list[ServedModel]:
        """Those of them that are no adapters: one for each engine."""
        return [model for model in self.generating if model.adapter is None]

    @property
    def adapters(self) -> list[ServedModel]:
        """Adapters beside them."""
        return [model for model in self.generating if model.adapter is not None]

    @property
    def of_tasks(self) -> list[ServedTask]:
        """Those of other tasks."""
        return [model for model in self.all if isinstance(model, ServedTask)]

    def find(self, name: str | None) -> ServedModel:
        """The generating model of that name; the first one without a name.

        Raises:
            UnknownModelError: no model has this name.
            RequestError: it is for another task.
        """
        found = next(iter(self.generating), self.first) if name is None else self.find_any(name)
        if isinstance(found, ServedTask):
            raise RequestError(
                f"{found.name} is a model for {found.task.name}, it does not generate text; /docs "
                "lists the routes"
            )
        return found

    def find_task(self, name: str | None, route: Route, task: str) -> ServedTask:
        """The model of that name whose task has a route; the first one of them without a name.

        Args:
            name: of the model.
            route: what is asked.
            task: the task that the route belongs to, for the error.

        Raises:
            UnknownModelError: no model has this name.
            RequestError: it is for another task.
        """
        those = [model for model in self.of_tasks if route in model.task.routes]
        found = next(iter(those), self.first) if name is None else self.find_any(name)
        if isinstance(found, ServedModel) or route not in found.task.routes:
            raise RequestError(
                f"{found.name} is a model for {found.facts.task}; this route needs one for {task}"
            )
        return found

    def find_any(self, name: str | None) -> AnyServed:
        """The model of that name; the first one without a name.

        Raises:
            UnknownModelError: no model has this name.
        """
        if name is None:
            return self.first
        found = self._models.get(name)
        if found is None:
            raise UnknownModelError(
                f"no model of this name is served; there are: {', '.join(self._models)[:300]}"
            )
        return found

    def add(self, model: ServedModel) -> None:
        """Serve one more, or another one of the same name."""
        self._models[model.name] = model

    def remove(self, name: str) -> None:
        """Serve it no longer."""
        del self._models[name]

    async def watch(self, follow: Callable[[], Awaitable[None]]) -> None:
        """Replace models whose directory has changed, until cancelled.

        Args:
            follow: called after each look, for adapters.
        """
        failed: dict[str, object] = {}
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
            for model in (*self.bases, *self.of_tasks):
                signature = signature_of(model.path, self._options)
                if signature in (model.signature, None) or failed.get(model.name) == signature:
                    continue
                try:
                    new = await asyncio.to_thread(
                        open_served, model.name, model.path, self._options
                    )
                except (
                    Exception
                ) as error:  # the old model goes on, whatever is wrong with the new one
                    failed[model.name] = signature
                    logger.warning("the new model at %s cannot be served: %s", model.path, error)
                    continue
                self._models[model.name] = new = _as_successor(new, model.num_swaps + 1)
                logger.info("now serving %s at step %s", new.name, new.facts.step)
            await follow()


def _as_successor(model: AnyServed, num_swaps: int) -> AnyServed:
    return dataclasses.replace(model, num_swaps=num_swaps)
