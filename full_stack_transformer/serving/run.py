"""`fst serve`: open a model, listen, say where."""

import contextlib
import logging
import signal
import socket

import uvicorn

from full_stack_transformer.arguments import ServeArguments
from full_stack_transformer.errors import MachineError
from full_stack_transformer.generation.open_engine import open_engine
from full_stack_transformer.modelling.model_directory import find_model_directory, open_model
from full_stack_transformer.serving.app import make_app
from full_stack_transformer.serving.engine_worker import EngineWorker

logger = logging.getLogger(__name__)

_SECONDS_TO_FINISH = 30


def serve(arguments: ServeArguments) -> int:
    """Serve until SIGTERM or Ctrl-C; requests under way are finished.

    Raises:
        ModelError: there is no model to serve.
        MachineError: the port is in use or forbidden.
    """
    find_model_directory(arguments.model)  # a wrong path is said before the port is taken
    listener = _listen(arguments.host, arguments.port)
    model = open_model(arguments.model, device=arguments.device)
    engine = open_engine(
        model.backbone,
        num_slots=arguments.max_batch_size,
        weights_dtype=arguments.weights_dtype,
    )
    worker = EngineWorker(model, engine, max_queue_size=arguments.max_queue_size)
    host, port = listener.getsockname()[:2]
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"  # noqa: S104 (only shown)
    logger.info("serving %s at %s (documentation: %s/docs)", model.name, url, url)
    config = uvicorn.Config(
        make_app(worker),
        http="h11",  # httptools accepts headers of any size
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    # uvicorn shuts down on both signals and then raises them again, for the handlers before its own.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise MachineError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; stop what uses it, or pass --port"
        ) from error
    return listener
