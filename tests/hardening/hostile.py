"""Send the hostile corpus, and ask /health meanwhile.

    python -m tests.hardening.hostile --rounds 10

No answer may be 5xx, none to a bad request may be over 1 KB, no connection may be reset, and /health must
answer under 100 ms (p99).
"""

import argparse
import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass, field

from tests.hardening.corpus import HostileRequest, corpus
from tests.hardening.raw import ask_raw, quantile, watch_health
from tests.hardening.service import Service, hardening_service

_NUM_AT_ONCE = 8
_MAX_ANSWER_BYTES = 1024


@dataclass
class HostileReport:
    """What happened."""

    num_requests: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    health_seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """For people."""
        return {
            "num_requests": self.num_requests,
            "statuses": dict(sorted(self.statuses.items())),
            "num_faults": len(self.faults),
            "faults": self.faults[:20],
            "health_p50_ms": round(1000 * quantile(self.health_seconds, 0.5), 2),
            "health_p99_ms": round(1000 * quantile(self.health_seconds, 0.99), 2),
        }


async def send_corpus(service: Service, requests: list[HostileRequest]) -> HostileReport:
    """Send every request, a few at once."""
    report = HostileReport()
    places = asyncio.Semaphore(_NUM_AT_ONCE)

    async def send(request: HostileRequest) -> None:
        async with places:
            answer = await ask_raw(service.address, request.parts)
        report.num_requests += 1
        report.statuses[str(answer.status)] = report.statuses.get(str(answer.status), 0) + 1
        fault = None
        if answer.was_reset:
            fault = "reset"
        elif answer.status is not None and answer.status >= 500:
            fault = f"status {answer.status}"
        elif answer.status is None:
            fault = "no answer"
        elif answer.status < 400 and not request.is_valid:
            fault = f"served with {answer.status}"
        elif answer.status >= 400 and answer.num_bytes > _MAX_ANSWER_BYTES:
            fault = f"{answer.num_bytes} bytes"
        elif b"S3cret" in answer.body or b"Traceback" in answer.body:
            fault = "repeats the request"
        if fault is not None:
            report.faults.append(f"{request.name}: {fault}")

    watching = asyncio.create_task(watch_health(service.address, report.health_seconds))
    await asyncio.gather(*map(send, requests))
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    return report


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model")
    options = parser.parse_args()
    with hardening_service(options.model) as service:
        report = asyncio.run(send_corpus(service, corpus() * options.rounds))
        health = quantile(report.health_seconds, 0.99)
        print(json.dumps(report.summary(), indent=2))
    return int(bool(report.faults) or health > 0.1)


if __name__ == "__main__":
    sys.exit(main())
