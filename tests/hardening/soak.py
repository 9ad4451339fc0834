"""Mixed load for a long time, with an eye on the memory.

    python -m tests.hardening.soak --minutes 30

Whole answers, streams, chats, embeddings, formats, bad requests and clients that go away. After the warm-up
(the first third) the memory may grow by less than 1 MB per 10,000 requests.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.hardening.disconnects import go_away
from tests.hardening.raw import ask_raw, get, post
from tests.hardening.service import Service, hardening_service

_NUM_CLIENTS = 8


@dataclass
class SoakReport:
    """What happened."""

    num_requests: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    points: list[tuple[int, int]] = field(default_factory=list)
    """Requests so far, bytes of memory."""

    def megabytes_per_10_000(self) -> float:
        """Slope of the memory after the first third."""
        points = np.array(self.points[len(self.points) // 3 :], dtype=float)
        if len(points) < 3:
            return float("nan")
        return float(np.polyfit(points[:, 0], points[:, 1], 1)[0] * 10_000 / 1e6)

    def summary(self) -> dict[str, Any]:
        """For people."""
        return {
            "num_requests": self.num_requests,
            "statuses": self.statuses,
            "memory_megabytes": [round(self.points[place][1] / 1e6, 1) for place in (0, -1)],
            "megabytes_per_10_000_requests": round(self.megabytes_per_10_000(), 3),
        }


def _request(number: int) -> bytes:
    chance = random.Random(number)
    words = " ".join(chance.choice(("the", "a", "reader", "corpus", "é", "🙂")) for _ in range(8))
    tokens = chance.randrange(1, 12)
    kind = chance.randrange(8)
    if kind == 0:
        return post(
            "/v1/completions", {"prompt": words, "max_tokens": tokens, "logprobs": 3, "echo": True}
        )
    if kind == 1:
        return post(
            "/v1/completions", {"prompt": words, "max_tokens": tokens, "stream": True, "n": 2}
        )
    if kind == 2:
        message = {"role": "user", "content": words}
        return post("/v1/chat/completions", {"messages": [message], "max_tokens": tokens})
    if kind == 3:
        return post("/v1/embeddings", {"input": [words, words[:5]]})
    if kind == 4:
        return post("/generated_texts/", {"seed_text": words, "generation_max_len": tokens})
    if kind == 5:
        return get(chance.choice(("/health", "/metrics", "/version", "/v1/models", "/nothing")))
    if kind == 6:
        return post("/v1/completions", {"prompt": words, f"field{number}": 1})
    return post("/v1/completions", {"prompt": words, "max_tokens": tokens, "stop": ["a", "b"]})


async def soak(service: Service, seconds: float) -> SoakReport:
    """Ask for so long."""
    report, started = SoakReport(), time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() - started < seconds:
            number += _NUM_CLIENTS
            if number % 20 == 0:
                await go_away(service, number)
                status = "went away"
            else:
                status = str((await ask_raw(service.address, _request(number))).status)
            report.num_requests += 1
            report.statuses[status] = report.statuses.get(status, 0) + 1

    async def watch_memory() -> None:
        while True:
            report.points.append((report.num_requests, service.memory_bytes()))
            await asyncio.sleep(min(5.0, seconds / 30))

    watching = asyncio.create_task(watch_memory())
    await asyncio.gather(*map(client, range(_NUM_CLIENTS)))
    watching.cancel()
    return report


def holds(report: SoakReport) -> bool:
    """Whether the memory stands still and nothing unexpected came."""
    allowed = {"200", "400", "404", "429", "went away"}
    return set(report.statuses) <= allowed and not report.megabytes_per_10_000() > 1.0


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--model")
    options = parser.parse_args()
    with hardening_service(options.model) as service:
        report = asyncio.run(soak(service, 60 * options.minutes))
        print(json.dumps(report.summary(), indent=2))
    return int(not holds(report))


if __name__ == "__main__":
    sys.exit(main())
