"""`fst serve`: open models, listen, log the address, and shut down gracefully."""

import json
import logging
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from full_stack_transformer import __version__
from full_stack_transformer.arguments.checks import num_bytes
from full_stack_transformer.arguments.serving import ServeArguments
from full_stack_transformer.generation.open_draft import DraftSource
from full_stack_transformer.machine import listen
from full_stack_transformer.modelling.places import find_model
from full_stack_transformer.serving.app import AppOptions, make_app
from full_stack_transformer.serving.http.connections import protocol_with
from full_stack_transformer.serving.http.guard import (
    ADMIN_KEYS_VARIABLE,
    ApiKeys,
    read_api_keys,
)
from full_stack_transformer.serving.workers.adapters import open_adapters
from full_stack_transformer.serving.workers.engine_worker import EngineWorker
from full_stack_transformer.serving.workers.grammars import Grammars
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.opening import OpeningOptions, open_served
from full_stack_transformer.serving.workers.prometheus import WorkerMetrics
from full_stack_transformer.serving.workers.served import ServedModel, ServedTask
from full_stack_transformer.serving.workers.task_worker import MAX_BATCH_ROWS, TaskWorker

logger = logging.getLogger(__name__)

# After the deadline the errors are still to be written.
_SECONDS_TO_SAY_ERRORS = 5
_MAX_HEADER_BYTES = 32 * 1024
# The engine's thread holds the interpreter for milliseconds; others must not wait for Python's usual five.
_SECONDS_OF_INTERPRETER = 0.001
_WANTED_FILES = 16_384
_FILES_BESIDE_CONNECTIONS = 128


def main(arguments: ServeArguments) -> int:
    """Serve until SIGTERM or Ctrl-C; requests under way are finished, or told why not.

    Raises:
        ModelError: there is no model to serve.
        MachineError: the port is in use or forbidden.
        UsageError: the keys cannot be read.
        KeyboardInterrupt: by Ctrl-C, after the requests.
    """
    if arguments.log_format == "json":
        _log_json_lines()
    # A wrong path or key file is reported before the port is taken.
    sources = _sources(arguments)
    keys = read_api_keys(arguments.api_keys_file)
    admin_keys = read_api_keys(
        arguments.admin_keys_file, variable=ADMIN_KEYS_VARIABLE, option="--admin_keys_file"
    )
    listener = listen(arguments.host, arguments.port)
    models = _open_models(arguments, sources)
    open_adapters(arguments.adapters, models, most=arguments.max_adapters)
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    queue_size = arguments.max_queue_size
    worker = EngineWorker(max_queue_size=queue_size, on_piece=metrics.on_piece)
    task_worker = TaskWorker(max_queue_size=queue_size, on_batch=metrics.on_task_batch)
    grammars = Grammars(max_queue_size=queue_size)
    options = AppOptions(
        keys=keys,
        admin_keys=admin_keys,
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
    )
    app = make_app(models, worker, task_worker, grammars, metrics, registry, options)
    # Its warnings are one for each malformed request: anybody could fill the disk with them.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    sys.setswitchinterval(_SECONDS_OF_INTERPRETER)
    server = _Server(
        _config(app, arguments), [worker, task_worker, grammars], arguments.shutdown_seconds
    )
    _announce(listener, models, keys, arguments)
    # uvicorn shuts down on both signals and then raises them again, for the handlers before its own.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[listener])
    finally:
        worker.stop()
        task_worker.stop()
    return 0


def _sources(arguments: ServeArguments) -> list[tuple[str | None, Path]]:
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


def _config(app: ASGIApp, arguments: ServeArguments) -> uvicorn.Config:
    protocol = protocol_with(
        head_seconds=arguments.header_timeout_seconds,
        body_seconds=arguments.body_timeout_seconds,
        max_connections=_allow_many_files() - _FILES_BESIDE_CONNECTIONS,
    )
    return uvicorn.Config(
        app,
        http=protocol,  # on h11: httptools accepts headers of any size
        loop="asyncio",  # uvloop, where another package brought it, was never measured
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=int(arguments.shutdown_seconds) + _SECONDS_TO_SAY_ERRORS,
    )


class _Server(uvicorn.Server):
    """Tells the workers when the end begins."""

    def __init__(
        self,
        config: uvicorn.Config,
        workers: Sequence[EngineWorker | TaskWorker | Grammars],
        shutdown_seconds: float,
    ) -> None:
        super().__init__(config)
        self._workers = workers
        self._shutdown_seconds = shutdown_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, let the running requests finish, end the others with an error."""
        for worker in self._workers:
            worker.drain(self._shutdown_seconds)
        await super().shutdown(sockets)


def _announce(
    listener: socket.socket, models: ServedModels, keys: ApiKeys, arguments: ServeArguments
) -> None:
    """Log the models, the address and the keys."""
    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 (only shown)
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    summary: dict[str, Any] = {
        "url": url,
        "package_version": __version__,
        "num_api_keys": keys.num_keys,
        "models": [
            model.facts.model_dump(exclude={"description"}) | {"num_slots": _num_slots(model)}
            for model in models.all
        ],
        "max_queue_size": arguments.max_queue_size,
        "watch": arguments.watch,
    }
    if keys.is_open and not _is_local(host):
        logger.warning(
            "anybody who reaches %s may use this service; set FST_API_KEYS or --api_keys_file", host
        )
    for model in models.all:
        if model.parent is not None:
            continue
        facts = model.facts
        logger.info(
            "%s: %s, step %s, context %d tokens, %d at once, %s",
            *(model.name, facts.task, facts.step, facts.context_tokens),
            *(_num_slots(model), facts.computed_by),
        )
    for model in models.adapters:
        logger.info("%s: adapter beside %s", model.name, model.parent)
    logger.info(
        "serving %s at %s (documentation: %s/docs; %s)",
        ", ".join(model.name for model in models.all),
        *(url, url),
        "no keys" if keys.is_open else f"{keys.num_keys} keys",
        extra={"facts": summary},
    )


def _num_slots(model: ServedModel | ServedTask) -> int:
    """Texts that are computed at once."""
    return model.engine.num_slots if isinstance(model, ServedModel) else MAX_BATCH_ROWS


def _is_local(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


def _allow_many_files() -> int:
    """Open files that the process may have: as many as it is allowed to want, up to a bound."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _WANTED_FILES if soft == resource.RLIM_INFINITY else min(soft, _WANTED_FILES)


class _JsonLines(logging.Formatter):
    """One JSON object for each record: time, level, message, and what is known of a request, never texts."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = datetime.fromtimestamp(record.created, tz=UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _log_json_lines() -> None:
    """Let the root logger's handlers write JSON lines, with one for each request."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_JsonLines())
    # Lines of requests are records of the level debug, so that text logs stay quiet.
    logging.getLogger("full_stack_transformer.serving.http.guard").setLevel(logging.DEBUG)
