"""Prometheus metrics under the names that vLLM and TGI made known; their dashboards work here.

https://docs.vllm.ai/en/stable/usage/metrics.html, https://huggingface.co/docs/text-generation-inference
What has no such name begins with `fst_`.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from full_stack_transformer.serving.engine_worker import EngineWorker, Piece, Ticket

_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0),
)
_REQUEST_SECONDS = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    60.0,
)
_NUM_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Metrics:
    """All metrics of one service; updated on the event loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "Seconds from the queue to the first token.",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self._inter_token = Histogram(
            "vllm:inter_token_latency_seconds",
            "Seconds between two tokens of a text.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._queue_time = Histogram(
            "vllm:request_queue_time_seconds",
            "Seconds from the queue to a slot.",
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._latency = Histogram(
            "vllm:e2e_request_latency_seconds",
            "Seconds from the queue to the last token.",
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "vllm:prompt_tokens", "Tokens of prompts that were read.", registry=registry
        )
        self._generation_tokens = Counter(
            "vllm:generation_tokens", "Tokens that were made.", registry=registry
        )
        self._new_tokens = Histogram(
            "vllm:request_generation_tokens",
            "Tokens made for a text.",
            buckets=_NUM_TOKENS,
            registry=registry,
        )
        self._success = Counter(
            "vllm:request_success", "Texts that ended.", ["finished_reason"], registry=registry
        )
        self._requests = Counter(
            "fst_http_requests",
            "Answers by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self._errors = Counter(
            "fst_errors", "Answers that were errors, by their kind.", ["kind"], registry=registry
        )
        self._tasks = Gauge("fst_http_tasks", "HTTP requests under way.", registry=registry)
        self._last_token: dict[Ticket, float] = {}

    def watch_worker(self, worker: EngineWorker) -> None:
        """Report its queue whenever the metrics are read."""
        self.registry.register(_WorkerGauges(worker))

    def on_piece(self, ticket: Ticket, piece: Piece) -> None:
        """Count what a step did for one continuation."""
        now = time.monotonic()
        times = ticket.times
        last = self._last_token.pop(ticket, None)
        if last is None:
            if not times.started:  # it never left the queue
                return
            self._queue_time.observe(times.started - times.submitted)
            self._prompt_tokens.inc(len(ticket.request.prompt_ids))
            if piece.problem is None:
                self._first_token.observe(times.first_token - times.submitted)
        elif piece.num_tokens:
            for _ in range(piece.num_tokens):
                self._inter_token.observe((now - last) / piece.num_tokens)
        if piece.num_tokens:
            self._generation_tokens.inc(piece.num_tokens)
        if piece.finish_reason is None:
            self._last_token[ticket] = now
            return
        if piece.problem is None:
            self._success.labels(piece.finish_reason).inc()
        self._latency.observe(now - times.submitted)
        self._new_tokens.observe(ticket.continuation.num_tokens)

    def on_task(self, change: int) -> None:
        """An HTTP request has begun (1) or ended (-1), streams and waiting ones among them."""
        self._tasks.inc(change)

    def forget(self, tickets: list[Ticket]) -> None:
        """Their request has ended, however far they came."""
        for ticket in tickets:
            if self._last_token.pop(ticket, None) is not None:
                self._success.labels("abort").inc()

    def on_answer(self, route: str, status: int, error_kind: str | None) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()
        if error_kind is not None:
            self._errors.labels(error_kind).inc()


class _WorkerGauges(Collector):
    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        """Read at the moment of asking."""
        running, waiting = self._worker.num_running, self._worker.num_waiting
        yield GaugeMetricFamily("vllm:num_requests_running", "Texts in slots.", running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Texts in the queue.", waiting)
        yield GaugeMetricFamily("tgi_batch_current_size", "Texts in slots.", running)
        yield GaugeMetricFamily("tgi_queue_size", "Texts in the queue.", waiting)
