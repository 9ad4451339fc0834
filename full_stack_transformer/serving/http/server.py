"""uvicorn with this service's connections, and an end in three steps.

    SIGTERM ── /ready says 503, requests are still taken ── nothing new, the running ones end ── errors, exit
               shutdown_delay_seconds                       shutdown_seconds

Knows no model.
"""

import asyncio
import logging
import resource
import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from full_stack_transformer.arguments.serving import LimitOptions
from full_stack_transformer.serving.http.connections import protocol_with

# After the deadline the errors are still to be written.
SECONDS_TO_SAY_ERRORS = 5
_MAX_HEADER_BYTES = 32 * 1024
_WANTED_FILES = 16_384
_FILES_BESIDE_CONNECTIONS = 128


class Server(uvicorn.Server):
    """Ends as the module says.

    Args:
        app: what answers.
        limits: of requests, and how long the end may take.
        leaving: set when the end begins.
        drain: called when nothing new is taken any more, with the seconds that running requests have.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: LimitOptions,
        *,
        leaving: threading.Event,
        drain: Callable[[float], None],
    ) -> None:
        super().__init__(_config(app, limits))
        # Its warnings are one for each malformed request: anybody could fill the disk with them.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self._limits = limits
        self._leaving = leaving
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let balancers look away, let the running requests finish, end the others with an error."""
        self._leaving.set()
        end = time.monotonic() + self._limits.shutdown_delay_seconds
        while time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        self._drain(self._limits.shutdown_seconds)
        await super().shutdown(sockets)


def _config(app: ASGIApp, limits: LimitOptions) -> uvicorn.Config:
    protocol = protocol_with(
        head_seconds=limits.header_timeout_seconds,
        body_seconds=limits.body_timeout_seconds,
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
        timeout_graceful_shutdown=int(limits.shutdown_seconds) + SECONDS_TO_SAY_ERRORS,
    )


def _allow_many_files() -> int:
    """Open files that the process may have: as many as it is allowed to want, up to a bound."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _WANTED_FILES if soft == resource.RLIM_INFINITY else min(soft, _WANTED_FILES)
