"""Prometheus metrics and the health of one bot process, and the local port that serves them.

The metrics name no chats and no users.
"""

import time
from collections.abc import Callable
from typing import Literal

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from full_stack_transformer.errors import MachineError

_MAX_SILENCE_SECONDS = 120.0  # a poll takes 30 s


class Metrics:
    """Counted since the start of the process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.updates = Counter(
            "telegram_bot_updates",
            "Updates by outcome",
            ["outcome"],
            registry=self.registry,
        )
        self.replies = Counter(
            "telegram_bot_replies",
            "Finished texts by finish reason",
            ["finish"],
            registry=self.registry,
        )
        self.tokens = Counter("telegram_bot_tokens", "Generated tokens", registry=self.registry)
        self.first_text_seconds = Histogram(
            "telegram_bot_first_text_seconds",
            "Seconds from a request to its first text",
            registry=self.registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60),
        )
        self.service_failures = Counter(
            "telegram_bot_service_failures",
            "Failed requests to the service",
            registry=self.registry,
        )
        self.failures = Counter(
            "telegram_bot_failures", "Errors of the bot itself", registry=self.registry
        )
        self.jobs = Gauge("telegram_bot_jobs", "Pending jobs", ["lane"], registry=self.registry)
        self.is_answering = Gauge(
            "telegram_bot_is_answering",
            "1 for the process that answers, 0 for one that starts or stands by",
            registry=self.registry,
        )
        self.state: Literal["starting", "standing by", "ok", "ending"] = "starting"
        self._count_jobs: Callable[[], dict[str, int]] = dict
        self._last_contact = time.monotonic()

    def begin(self, count_jobs: Callable[[], dict[str, int]]) -> None:
        """From now on this process answers; `count_jobs` gives the number of pending jobs by lane."""
        self._count_jobs = count_jobs
        self.state = "ok"
        self.is_answering.set(1)
        self.contact()

    def end(self) -> None:
        """The database is closed after this."""
        self._count_jobs = dict
        self.state = "ending"
        self.is_answering.set(0)

    def read(self) -> bytes:
        """Everything, as Prometheus reads it."""
        for lane, count in self._count_jobs().items():
            self.jobs.labels(lane).set(count)
        return generate_latest(self.registry)

    def contact(self) -> None:
        """Telegram answered, or sent an update."""
        self._last_contact = time.monotonic()

    @property
    def is_healthy(self) -> bool:
        """Whether there was contact with Telegram lately; one that stands by has none."""
        return self.state != "ok" or time.monotonic() - self._last_contact < _MAX_SILENCE_SECONDS


def ready_route(metrics: Metrics) -> web.RouteDef:
    """`/ready`: 200 from the process that answers and 503 from one that stands by, as balancers expect."""

    async def ready(request: web.Request) -> web.Response:
        return web.json_response(
            {"status": metrics.state}, status=200 if metrics.state == "ok" else 503
        )

    return web.get("/ready", ready)


async def serve_monitoring(metrics: Metrics, port: int, *, always_healthy: bool) -> web.AppRunner:
    """Listen on 127.0.0.1 for `/health`, `/ready` and `/metrics`.

    Args:
        metrics: what `/metrics` shows.
        port: 0 for any free one.
        always_healthy: for webhooks, where silence only means that nobody writes.

    Raises:
        MachineError: the port is in use.
    """

    async def health(request: web.Request) -> web.Response:
        healthy = always_healthy or metrics.is_healthy
        status = {"status": metrics.state if healthy else "telegram is silent"}
        return web.json_response(status, status=200 if healthy else 503)

    async def read_metrics(request: web.Request) -> web.Response:
        return web.Response(
            body=metrics.read(),
            headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    app = web.Application()
    app.add_routes(
        [web.get("/health", health), ready_route(metrics), web.get("/metrics", read_metrics)]
    )
    return await listen(app, "127.0.0.1", port, "--monitoring_port")


async def listen(app: web.Application, host: str, port: int, flag: str) -> web.AppRunner:
    """Serve an application; it listens at `runner.addresses[0]`.

    Raises:
        MachineError: the port is in use.
    """
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise MachineError(
            f"cannot listen on {host}:{port} ({error.strerror}); pass another {flag}"
        ) from None
    return runner
