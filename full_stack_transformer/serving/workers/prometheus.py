"""Prometheus metrics of the workers, under the names and labels of vLLM and TGI, so their dashboards work.

https://docs.vllm.ai/en/stable/usage/metrics.html, https://huggingface.co/docs/text-generation-inference
What has no such name begins with `fst_`.
"""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from full_stack_transformer.generation.requests import Piece
from full_stack_transformer.serving.workers.engine_worker import EngineWorker, Ticket
from full_stack_transformer.serving.workers.models import ServedModels

_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0),
)
_REQUEST_SECONDS = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5),
    *(5.0, 10.0, 15.0, 20.0, 30.0, 60.0),
)
_NUM_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class _ModelMetrics:
    """What is counted for one model; looking labels up at each token would take as long as counting."""

    def __init__(self, families: "_Families", model_name: str) -> None:
        self.first_token = families.first_token.labels(model_name)
        self.inter_token = families.inter_token.labels(model_name)
        self.queue_time = families.queue_time.labels(model_name)
        self.latency = families.latency.labels(model_name)
        self.prompt_tokens = families.prompt_tokens.labels(model_name)
        self.generation_tokens = families.generation_tokens.labels(model_name)
        self.new_tokens = families.new_tokens.labels(model_name)


class _Families:
    """Metrics with the label `model_name`, by which vLLM's dashboards choose."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=registry)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds",
            "Seconds from the queue to the first token.",
            _FIRST_TOKEN_SECONDS,
        )
        self.inter_token = histogram(
            "vllm:inter_token_latency_seconds",
            "Seconds between two tokens of a text.",
            _TOKEN_SECONDS,
        )
        self.queue_time = histogram(
            "vllm:request_queue_time_seconds", "Seconds from the queue to a slot.", _REQUEST_SECONDS
        )
        self.latency = histogram(
            "vllm:e2e_request_latency_seconds",
            "Seconds from the queue to the last token.",
            _REQUEST_SECONDS,
        )
        self.new_tokens = histogram(
            "vllm:request_generation_tokens", "Tokens made for a text.", _NUM_TOKENS
        )
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts that were read.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens that were made.")
        self.success = counter("vllm:request_success", "Texts that ended.", "finished_reason")


class WorkerMetrics:
    """The metrics of what workers compute; updated on the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._families = _Families(registry)
        self._of_model: dict[str, _ModelMetrics] = {}
        self._task_rows = Counter(
            "fst_task_rows",
            "Rows that models of other tasks than generating computed.",
            ["model_name"],
            registry=self._registry,
        )
        self._task_seconds = Histogram(
            "fst_task_batch_seconds",
            "Seconds that a batch of such rows took.",
            ["model_name"],
            buckets=_REQUEST_SECONDS,
            registry=self._registry,
        )
        self._last_token: dict[Ticket, float] = {}

    def watch_worker(self, worker: EngineWorker, models: ServedModels) -> None:
        """Report its queues whenever the metrics are read."""
        self._registry.register(_WorkerGauges(worker, models))

    def watch_blocks(self, models: ServedModels) -> None:
        """Report the memory of keys and values of each model whenever the metrics are read."""
        self._registry.register(_BlockGauges(models))

    def watch_guesses(self, models: ServedModels) -> None:
        """Report what comes of each model's guesses whenever the metrics are read."""
        self._registry.register(_GuessCounters(models))

    def on_piece(self, ticket: Ticket, piece: Piece) -> None:
        """Count what a step did for one continuation."""
        now = time.monotonic()
        times = ticket.times
        last = self._last_token.pop(ticket, None)
        of_model = self._of_model.get(ticket.model_name)
        if of_model is None:
            of_model = _ModelMetrics(self._families, ticket.model_name)
            self._of_model[ticket.model_name] = of_model
        if last is None:
            if not times.started:  # it never left the queue
                return
            of_model.queue_time.observe(times.started - times.submitted)
            of_model.prompt_tokens.inc(len(ticket.request.prompt_ids))
            if piece.problem is None:
                of_model.first_token.observe(times.first_token - times.submitted)
        elif piece.num_tokens:
            for _ in range(piece.num_tokens):
                of_model.inter_token.observe((now - last) / piece.num_tokens)
        if piece.num_tokens:
            of_model.generation_tokens.inc(piece.num_tokens)
        if piece.finish_reason is None:
            self._last_token[ticket] = now
            return
        if piece.problem is None:
            self._families.success.labels(ticket.model_name, piece.finish_reason).inc()
        of_model.latency.observe(now - times.submitted)
        of_model.new_tokens.observe(ticket.continuation.num_tokens)

    def on_task_batch(self, model_name: str, num_rows: int, seconds: float) -> None:
        """Count a batch of another task than generating; called in its thread."""
        self._task_rows.labels(model_name).inc(num_rows)
        self._task_seconds.labels(model_name).observe(seconds)

    def forget(self, tickets: list[Ticket]) -> None:
        """Their request has ended, however far they came."""
        for ticket in tickets:
            if self._last_token.pop(ticket, None) is not None:
                self._families.success.labels(ticket.model_name, "abort").inc()


class _WorkerGauges(Collector):
    def __init__(self, worker: EngineWorker, models: ServedModels) -> None:
        self._worker = worker
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Read at the moment of asking."""
        gauges = [
            GaugeMetricFamily(
                "vllm:num_requests_running", "Texts in slots.", labels=["model_name"]
            ),
            GaugeMetricFamily(
                "vllm:num_requests_waiting", "What waits for a slot.", labels=["model_name"]
            ),
        ]
        for model in self._models.generating:
            for gauge, number in zip(gauges, self._worker.count(model.name), strict=True):
                gauge.add_metric([model.name], number)
        yield from gauges
        yield GaugeMetricFamily(
            "tgi_batch_current_size", "Texts in slots.", self._worker.num_running
        )
        yield GaugeMetricFamily("tgi_queue_size", "Texts in the queue.", self._worker.num_waiting)


class _BlockGauges(Collector):
    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Read at the moment of asking."""
        labels = ["model_name"]
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Fraction of the blocks that texts use.", labels=labels
        )
        blocks = GaugeMetricFamily(
            "fst_kv_blocks",
            "Blocks of keys and values: used by texts, cached for beginnings that come again, or free.",
            labels=[*labels, "state"],
        )
        waiting = GaugeMetricFamily(
            "fst_texts_waiting_for_blocks", "Running texts that wait for blocks.", labels=labels
        )
        put_back = CounterMetricFamily(
            "vllm:num_preemptions",
            "Texts that gave their blocks to an older one and were read again later.",
            labels=labels,
        )
        queried = CounterMetricFamily(
            "vllm:prefix_cache_queries", "Tokens of prompts that were looked for.", labels=labels
        )
        reused = CounterMetricFamily(
            "vllm:prefix_cache_hits", "Tokens of prompts not read again.", labels=labels
        )
        for model in self._models.bases:
            use, label = model.engine.block_use, [model.name]
            usage.add_metric(label, use.num_used / use.num_blocks)
            num_free = use.num_blocks - use.num_used - use.num_kept
            states = {"used": use.num_used, "cached": use.num_kept, "free": num_free}
            for state, number in states.items():
                blocks.add_metric([*label, state], number)
            waiting.add_metric(label, use.num_waiting)
            put_back.add_metric(label, use.num_put_back)
            queried.add_metric(label, use.num_prompt_tokens)
            reused.add_metric(label, use.num_reused_tokens)
        yield from (usage, blocks, waiting, put_back, queried, reused)


class _GuessCounters(Collector):
    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Read at the moment of asking."""
        labels = ["model_name", "kind"]
        num_drafts = CounterMetricFamily(
            "vllm:spec_decode_num_drafts",
            "How often next tokens of a text were guessed, by prompt lookup or a draft model.",
            labels=labels,
        )
        num_proposed = CounterMetricFamily(
            "vllm:spec_decode_num_draft_tokens", "Guessed tokens.", labels=labels
        )
        num_accepted = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were right.", labels=labels
        )
        are_off = GaugeMetricFamily(
            "fst_guesses_are_off",
            "1 where guesses cost more time than they save, with up to so many texts at once.",
            labels=[*labels, "num_texts"],
        )
        for model in self._models.bases:
            guesses = model.engine.guesses
            if guesses is None:
                continue
            for kind, counts in guesses.counts.items():
                num_drafts.add_metric([model.name, kind], counts.num_drafts)
                num_proposed.add_metric([model.name, kind], counts.num_proposed)
                num_accepted.add_metric([model.name, kind], counts.num_accepted)
            for (kind, num_texts), is_off in guesses.are_off.items():
                are_off.add_metric([model.name, kind, str(num_texts)], is_off)
        yield from (num_drafts, num_proposed, num_accepted, are_off)
