"""Requests made from the service's OpenAPI description by schemathesis.

    python -m tests.hardening.schema_fuzz --schemathesis /path/to/schemathesis --cases 10000

No answer may be a server error, and /health must answer under 100 ms (p99) meanwhile. schemathesis is no
dependency: any environment that has it will do. The default suite sends `near_misses` instead.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import shutil
import sys
from typing import Any

import httpx

from tests.hardening.hostile import HostileReport
from tests.hardening.near_misses import near_miss
from tests.hardening.raw import ask_raw, post, quantile, watch_health
from tests.hardening.service import ADMIN_KEY, Service, hardening_service

_MAX_ANSWER_BYTES = 1024
_AS_ADMIN = f"authorization: Bearer {ADMIN_KEY}"


async def fuzz(
    service: Service, command: str, cases: int, health_seconds: list[float]
) -> tuple[int, str]:
    """Exit code and output of schemathesis, with so many cases over all operations together."""
    operations = sum(map(len, _paths(service).values()))
    words = [command, "run", f"{service.url}/openapi.json", "--checks", "not_a_server_error"]
    words += ["--max-examples", str(max(1, cases // operations))]
    words += ["--phases", "examples,coverage,fuzzing"]
    words += ["--continue-on-failure", "--seed", "1", "--request-timeout", "60", "--no-color"]
    watching = asyncio.create_task(watch_health(service.address, health_seconds))
    running = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await running.communicate()
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    assert running.returncode is not None
    return running.returncode, output.decode()


async def send_near_misses(service: Service, number: int) -> HostileReport:
    """Bodies that nearly fit, to each route that takes one."""
    report = HostileReport()
    for path, methods in _paths(service).items():
        if "post" not in methods:
            continue
        schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
        for seed in range(number):
            body = near_miss(schema, random.Random(f"{path} {seed}"))
            answer = await ask_raw(service.address, post(path, body, _AS_ADMIN))
            status = str(answer.status)
            report.num_requests += 1
            report.statuses[status] = report.statuses.get(status, 0) + 1
            is_long = status != "200" and answer.num_bytes > _MAX_ANSWER_BYTES
            if status not in ("200", "400", "404", "422", "429") or answer.was_reset or is_long:
                report.faults.append(f"{path} {status}: {json.dumps(body)[:300]}")
    return report


def _paths(service: Service) -> dict[str, Any]:
    """Operations of the OpenAPI description, by path and method."""
    paths: dict[str, Any] = httpx.get(f"{service.url}/openapi.json", timeout=60).json()["paths"]
    return paths


def num_cases(output: str) -> int:
    """Cases that schemathesis says it has made."""
    found = re.findall(r"([0-9,]+) generated", output)
    return int(found[-1].replace(",", "")) if found else 0


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--schemathesis", default=shutil.which("schemathesis"))
    parser.add_argument("--model")
    options = parser.parse_args()
    if options.schemathesis is None:
        parser.error("no schemathesis here; name one with --schemathesis")
    health_seconds: list[float] = []
    with hardening_service(options.model, "--max_queue_size", "256") as service:
        exit_code, output = asyncio.run(
            fuzz(service, options.schemathesis, options.cases, health_seconds)
        )
        health = quantile(health_seconds, 0.99)
        print(output[-4000:])
        print(f"{num_cases(output):,} cases; /health p99 {1000 * health:.1f} ms")
        faults = asyncio.run(send_near_misses(service, 500)).faults
        print("\n".join(faults[:20]))
    return int(exit_code != 0 or bool(faults) or health > 0.1)


if __name__ == "__main__":
    sys.exit(main())
