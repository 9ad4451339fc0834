"""Everything behind the socket: models, the threads that compute, and the application that asks them.

One process has one of it: `fst serve`, and each replica of a cluster. Knows no socket and no signal.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from full_stack_transformer.arguments.checks import num_bytes
from full_stack_transformer.arguments.serving import ServeArguments
from full_stack_transformer.generation.open_draft import DraftSource
from full_stack_transformer.modelling.places import find_model
from full_stack_transformer.serving.app import AppOptions, make_app
from full_stack_transformer.serving.http.keys import Keys
from full_stack_transformer.serving.workers.adapters import open_adapters
from full_stack_transformer.serving.workers.engine_worker import EngineWorker
from full_stack_transformer.serving.workers.grammars import Grammars
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.opening import OpeningOptions, open_served
from full_stack_transformer.serving.workers.prometheus import WorkerMetrics
from full_stack_transformer.serving.workers.task_worker import TaskWorker

# The engine's thread holds the interpreter for milliseconds; others must not wait for Python's usual five.
_SECONDS_OF_INTERPRETER = 0.001


@dataclass(frozen=True)
class Service:
    """Models that are open, and their application."""

    app: ASGIApp
    models: ServedModels
    registry: CollectorRegistry
    worker: EngineWorker
    task_worker: TaskWorker
    grammars: Grammars

    def drain(self, seconds: float) -> None:
        """Take nothing new; end what is not finished after `seconds` with an error."""
        for one in (self.worker, self.task_worker, self.grammars):
            one.drain(seconds)

    def stop(self) -> None:
        """End the threads."""
        self.worker.stop()
        self.task_worker.stop()


def open_service(
    arguments: ServeArguments,
    sources: Sequence[tuple[str | None, Path]],
    keys: Keys,
    *,
    is_leaving: Callable[[], bool] = lambda: False,
) -> Service:
    """Open the models and start their threads.

    Args:
        arguments: of the command.
        sources: names and paths of the models.
        keys: who may ask.
        is_leaving: whether balancers should send no more requests, though they are still taken.

    Raises:
        ModelError: a model cannot be served.
    """
    sys.setswitchinterval(_SECONDS_OF_INTERPRETER)
    models = _open_models(arguments, sources)
    open_adapters(arguments.adapters, models, most=arguments.max_adapters)
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    queue_size = arguments.max_queue_size
    worker = EngineWorker(max_queue_size=queue_size, on_piece=metrics.on_piece)
    task_worker = TaskWorker(max_queue_size=queue_size, on_batch=metrics.on_task_batch)
    grammars = Grammars(max_queue_size=queue_size)
    options = AppOptions(
        keys=keys.clients,
        admin_keys=keys.admins,
        host=arguments.host,
        allowed_hosts=arguments.allowed_hosts,
        allowed_origins=arguments.allowed_origins,
        request_timeout_seconds=arguments.request_timeout_seconds,
        max_body_bytes=arguments.max_body_bytes,
        strict_fields=arguments.strict_fields,
        prefix_cache=arguments.prefix_cache,
        watches=arguments.watch,
        adapters_root=arguments.adapters_root,
        max_adapters=arguments.max_adapters,
        is_leaving=is_leaving,
    )
    app = make_app(models, worker, task_worker, grammars, metrics, registry, options)
    return Service(app, models, registry, worker, task_worker, grammars)


def find_sources(arguments: ServeArguments) -> list[tuple[str | None, Path]]:
    """Names and paths of the models.

    Raises:
        ModelError: one of the paths has no model.
    """
    sources: list[tuple[str | None, Path]] = [(arguments.served_model_name, arguments.model)]
    for word in arguments.more_models:
        name, _, path = word.partition("=")
        sources.append((name, Path(path)))
    for _, path_ in sources:
        find_model(path_, arguments.base if path_ is arguments.model else None)
    return sources


def _open_models(
    arguments: ServeArguments, sources: Sequence[tuple[str | None, Path]]
) -> ServedModels:
    memory = None if arguments.kv_memory is None else num_bytes(arguments.kv_memory, "kv_memory")
    drafts = {}
    if arguments.draft_model is not None:
        drafts[arguments.model] = DraftSource(arguments.draft_model, arguments.draft_weights_dtype)
    opening = OpeningOptions(
        device=arguments.device,
        num_slots=arguments.max_batch_size,
        weights_dtype=arguments.weights_dtype,
        max_length=arguments.max_length,
        kv_dtype=arguments.kv_dtype,
        kv_memory=memory,
        memory_share=1 / len(sources),
        drafts=drafts,
        bases={arguments.model: arguments.base},
    )
    return ServedModels([open_served(name, path, opening) for name, path in sources], opening)
