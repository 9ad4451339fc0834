"""Ten times the load that the service can serve, then slow sockets beside honest clients.

    python -m tests.hardening.overload --seconds 60 --slow_sockets 500

Capacity is what closed-loop clients get, one for each slot. Then ten times as many requests arrive as that,
at random moments (open loop). Goodput must be 0.95 of the capacity, the admitted p95 within 1.2 of what the
queue's length implies, the p95 of 429 under 50 ms. With sockets that send a head a byte a second, the p95 of
others may be 1.5 times that without them. On a model of the preset "base" with random weights: ten times
what the tiny one can serve is more than one Python process can even refuse.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hardening.raw import RawAnswer, ask_raw, connected, get, post, quantile
from tests.hardening.service import Service, hardening_service
from tests.serving.tiny_model import make_tiny_model

_SLOTS, _QUEUE = 8, 16
_NEW_TOKENS = 32
_PROMPT = "The reader of a small corpus"


@dataclass
class LoadReport:
    """What clients saw."""

    seconds: float = 0.0
    served_seconds: list[float] = field(default_factory=list)
    refused_seconds: list[float] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def note(self, answer: RawAnswer) -> None:
        """Count an answer."""
        if answer.status == 200:
            self.served_seconds.append(answer.seconds)
        elif answer.status == 429 and b"retry-after:" in answer.head:
            self.refused_seconds.append(answer.seconds)
        else:
            self.others.append(f"{answer.status} {answer.was_reset} {answer.body[:200]!r}")

    @property
    def requests_per_second(self) -> float:
        """Served ones."""
        return len(self.served_seconds) / self.seconds


def _request(number: int) -> bytes:
    body: dict[str, Any] = {"prompt": f"{_PROMPT} {number}", "max_tokens": _NEW_TOKENS}
    return post("/v1/completions", body | {"min_tokens": _NEW_TOKENS, "seed": number})


async def closed_loop(service: Service, num_clients: int, seconds: float) -> LoadReport:
    """Each client asks again as soon as it has its answer."""
    report, started = LoadReport(), time.perf_counter()

    async def ask_again(number: int) -> None:
        while time.perf_counter() - started < seconds:
            number += num_clients
            report.note(await ask_raw(service.address, _request(number)))

    await asyncio.gather(*map(ask_again, range(num_clients)))
    report.seconds = time.perf_counter() - started
    return report


async def open_loop(service: Service, requests_per_second: float, seconds: float) -> LoadReport:
    """Requests arrive at random moments, however many are under way."""
    report, asking = LoadReport(), set()
    chance, number = random.Random(0), 0
    started = time.perf_counter()

    async def ask(number: int) -> None:
        report.note(await ask_raw(service.address, _request(number)))

    while (now := time.perf_counter() - started) < seconds:
        while number < now * requests_per_second:
            number += 1
            task = asyncio.create_task(ask(number))
            asking.add(task)
            task.add_done_callback(asking.discard)
        await asyncio.sleep(chance.expovariate(requests_per_second))
    await asyncio.gather(*asking)
    # The queue is full to the end, so the service works until its last answer.
    report.seconds = time.perf_counter() - started
    return report


@contextlib.asynccontextmanager
async def slow_sockets(service: Service, number: int) -> AsyncIterator[None]:
    """So many sockets that send the head of a request a byte a second, opened again when they are closed."""

    async def drip() -> None:
        while True:
            with contextlib.suppress(ConnectionError):
                async with connected(service.address) as (_, writer):
                    for byte in get("/health"):
                        writer.write(bytes([byte]))
                        await asyncio.sleep(1.0)
                        if writer.transport.is_closing():
                            break

    dripping = [asyncio.create_task(drip()) for _ in range(number)]
    try:
        yield
    finally:
        for task in dripping:
            task.cancel()
        await asyncio.gather(*dripping, return_exceptions=True)


async def measure(
    service: Service, seconds: float, num_slow: int, *, factor: float = 10
) -> dict[str, Any]:
    """All of it."""
    await closed_loop(service, _SLOTS, min(2.0, seconds))
    capacity = await closed_loop(service, _SLOTS, seconds)
    overloaded = await open_loop(service, factor * capacity.requests_per_second, seconds)
    # A request that is admitted last waits for the queue before it, and is then served itself.
    service_seconds = _SLOTS / capacity.requests_per_second
    bound = service_seconds * (1 + _QUEUE / _SLOTS)
    idle = await closed_loop(service, 2, seconds / 2)
    async with slow_sockets(service, num_slow):
        await asyncio.sleep(1)
        beside = await closed_loop(service, 2, seconds / 2)
    return {
        "capacity_requests_per_second": round(capacity.requests_per_second, 2),
        "goodput_ratio": round(overloaded.requests_per_second / capacity.requests_per_second, 3),
        "num_served": len(overloaded.served_seconds),
        "num_refused": len(overloaded.refused_seconds),
        "others": [*capacity.others, *overloaded.others, *beside.others][:10],
        "admitted_p50_seconds": round(quantile(overloaded.served_seconds, 0.5), 3),
        "admitted_p95_seconds": round(quantile(overloaded.served_seconds, 0.95), 3),
        "admitted_p95_to_bound": round(quantile(overloaded.served_seconds, 0.95) / bound, 3),
        "refused_p50_ms": round(1000 * quantile(overloaded.refused_seconds, 0.5), 2),
        "refused_p95_ms": round(1000 * quantile(overloaded.refused_seconds, 0.95), 2),
        "num_slow_sockets": num_slow,
        "p95_beside_slow_sockets_ratio": round(
            quantile(beside.served_seconds, 0.95) / quantile(idle.served_seconds, 0.95), 3
        ),
    }


def holds(report: dict[str, Any]) -> bool:
    """Whether the bounds are kept."""
    return bool(
        not report["others"]
        and report["goodput_ratio"] >= 0.95
        and report["admitted_p95_to_bound"] <= 1.2
        and report["refused_p95_ms"] < 50
        and report["p95_beside_slow_sockets_ratio"] <= 1.5
    )


SERVICE_OPTIONS = ("--max_batch_size", str(_SLOTS), "--max_queue_size", str(_QUEUE))


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slow_sockets", type=int, default=500)
    parser.add_argument("--model")
    parser.add_argument("--preset", default="base")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        model = options.model
        if model is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = make_tiny_model(root, preset=options.preset)
        service = stack.enter_context(hardening_service(model, *SERVICE_OPTIONS))
        report = asyncio.run(measure(service, options.seconds, options.slow_sockets))
        print(json.dumps(report, indent=2))
    return int(not holds(report))


if __name__ == "__main__":
    sys.exit(main())
