"""Prometheus metrics and the health of one bot process, and the local port that serves them.

The metrics name no chats and no users.
"""

import time
from collections.abc import Callable

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
        self._last_contact = time.monotonic()

    def contact(self) -> None:
        """Telegram answered, or sent an update."""
        self._last_contact = time.monotonic()

    @property
    def is_healthy(self) -> bool:
        """Whether there was contact with Telegram lately."""
        return time.monotonic() - self._last_contact < _MAX_SILENCE_SECONDS


async def serve_monitoring(
    metrics: Metrics, count_jobs: Callable[[], dict[str, int]], port: int, *, always_healthy: bool
) -> web.AppRunner:
    """Listen on 127.0.0.1 for `/health` and `/metrics`.

    Args:
        metrics: what `/metrics` shows.
        count_jobs: number of pending jobs by lane.
        port: 0 for any free one.
        always_healthy: for webhooks, where silence only means that nobody writes.

    Raises:
        MachineError: the port is in use.
    """

    async def health(request: web.Request) -> web.Response:
        healthy = always_healthy or metrics.is_healthy
        status = {"status": "ok" if healthy else "telegram is silent"}
        return web.json_response(status, status=200 if healthy else 503)

    async def read_metrics(request: web.Request) -> web.Response:
        for lane, count in count_jobs().items():
            metrics.jobs.labels(lane).set(count)
        return web.Response(
            body=generate_latest(metrics.registry),
            headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/metrics", read_metrics)])
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
