"""`fst serve`: open models, listen, log the address, and shut down gracefully."""

import logging
import signal
import socket
import threading
from typing import Any

from full_stack_transformer import __version__
from full_stack_transformer.arguments.serving import ServeArguments
from full_stack_transformer.machine import listen
from full_stack_transformer.ray_cluster import imported_ray
from full_stack_transformer.serving.http.keys import ApiKeys, Keys
from full_stack_transformer.serving.http.server import Server
from full_stack_transformer.serving.logs import log_json_lines
from full_stack_transformer.serving.service import find_sources, open_service
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.served import ServedModel, ServedTask
from full_stack_transformer.serving.workers.task_worker import MAX_BATCH_ROWS

logger = logging.getLogger(__name__)


def main(arguments: ServeArguments) -> int:
    """Serve until SIGTERM or Ctrl-C; requests under way are finished, or told why not.

    Raises:
        ModelError: there is no model to serve.
        MachineError: the port is in use or forbidden, or Ray cannot be reached.
        UsageError: the keys cannot be read.
        KeyboardInterrupt: by Ctrl-C, after the requests.
    """
    if arguments.log_format == "json":
        log_json_lines()
    # A wrong path or key file is reported before the port is taken.
    sources = find_sources(arguments)
    keys = Keys.read(arguments)
    if arguments.ray_address is not None:
        # Here, because Ray takes 0.7 s to import and belongs to an extra.
        imported_ray()
        from full_stack_transformer.serving.replicas.run import serve_replicas

        return serve_replicas(arguments, keys)
    listener = listen(arguments.host, arguments.port)
    leaving = threading.Event()
    service = open_service(arguments, sources, keys, is_leaving=leaving.is_set)
    server = Server(service.app, arguments, leaving=leaving, drain=service.drain)
    _announce(listener, service.models, keys.clients, arguments)
    # uvicorn shuts down on both signals and then raises them again, for the handlers before its own.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[listener])
    finally:
        service.stop()
    return 0


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
